"""The JAX side of `benchmarks.operations`: single operations, and which of them a network is made of."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from benchmarks import jax_side
from benchmarks.cases import CASES
from vaediff.machine import cost
from vaediff.models import layers, resampling
from vaediff.models.unet_blocks import AttentionBlock

DROPOUT = 0.3
EPSILON = 1e-5


def operations_of(name: str, count: int) -> list[dict[str, Any]]:
  """Returns 'kind', 'shape' and 'times' of the operations in one pass of a U-Net over `count` images.

  The network is traced, not run. Group norms count as those with SiLU, which nearly all of them are; what
  only moves or adds numbers is left out. One 'update' stands for clipping, Adam and the parameter average.
  """
  case = CASES[name]
  experiment = jax_side.experiment_of(case)
  model = jax_side.model_of(case, experiment)
  found = Counter()

  def look(call, args, kwargs, context):
    if context.method_name == '__call__':
      module, x = context.module, args[0]
      match module:
        case nn.Conv():
          found['conv3x3', (*x.shape, module.features, module.strides[0])] += 1
        case nn.Dense():
          found['matmul', (math.prod(x.shape[:-1]), x.shape[-1], module.features)] += 1
        case layers.GroupNorm():
          found['group_norm_silu', x.shape] += 1
        case nn.Dropout() if module.rate > 0:
          found['dropout', x.shape] += 1
        case AttentionBlock():
          heads = module.options.num_heads
          found['attention', (x.shape[0], x.shape[1] * x.shape[2], heads, x.shape[3] // heads)] += 1
    return call(*args, **kwargs)

  inputs = jax.tree.map(jnp.asarray, jax_side.inputs_of(case, experiment, model, count))
  params = jax.eval_shape(model.init, jax.random.key(0))
  with nn.intercept_methods(look):
    jax.eval_shape(model.apply, params, *inputs)
  found['update', (cost.num_parameters(params),)] = 1
  return [{'kind': kind, 'shape': shape, 'times': times} for (kind, shape), times in found.items()]


def conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """Returns the 3x3 convolution, NHWC."""
  layout = ('NHWC', 'HWIO', 'NHWC')
  return jax.lax.conv_general_dilated(x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=layout)


def _conv3x3(shape: tuple[int, ...], phase: str, dtype: Any) -> Callable[[], Any]:
  batch, height, width, inputs, outputs, stride = shape
  x, kernel = _arrays(((batch, height, width, inputs), (3, 3, inputs, outputs)), dtype)
  y = conv(x, kernel, stride)
  if phase == 'forward':
    compiled = jax.jit(lambda x, kernel: conv(x, kernel, stride))
    return lambda: compiled(x, kernel)
  if phase == 'input_gradient':
    compiled = jax.jit(lambda kernel, y: jax.linear_transpose(lambda x: conv(x, kernel, stride), x)(y)[0])
    return lambda: compiled(kernel, y)
  compiled = jax.jit(lambda x, y: jax.linear_transpose(lambda kernel: conv(x, kernel, stride), kernel)(y)[0])
  return lambda: compiled(x, y)


def _function(
  kind: str, shape: tuple[int, ...]
) -> tuple[Callable[..., jax.Array], tuple[tuple[int, ...], ...]]:
  """Returns an operation other than the convolution, and the shapes of what it reads."""
  match kind:
    case 'group_norm_silu':

      def normalise(x, scale, bias):
        return nn.silu(layers.GroupNorm(epsilon=EPSILON).apply({'params': {'scale': scale, 'bias': bias}}, x))

      return normalise, (shape, shape[-1:], shape[-1:])
    case 'matmul':
      rows, inputs, outputs = shape
      return lambda x, w, b: x @ w + b[None], ((rows, inputs), (inputs, outputs), (outputs,))
    case 'attention':
      return lambda q, k, v: layers.attention(q, k, v, scale=shape[-1] ** -0.5), (shape,) * 3
    case 'fir_down':
      return resampling.fir_downsample, (shape,)
    case _:
      return resampling.fir_upsample, (shape,)


def _dropout(shape: tuple[int, ...], dtype: Any) -> Callable[[], Any]:
  (x,) = _arrays((shape,), dtype)
  module = nn.Dropout(DROPOUT, deterministic=False)

  @jax.jit
  def with_gradient(x, seed):
    y, vjp = jax.vjp(lambda x: module.apply({}, x, rngs={'dropout': jax.random.key(seed)}), x)
    return y, vjp(x)

  return lambda: with_gradient(x, 0)


def _update(shape: tuple[int, ...]) -> Callable[[], Any]:
  optimizer = jax_side.experiment_of(CASES['unet_cifar10']).optimizer

  def update(params, grads, opt_state, average, step):
    updates, opt_state = optimizer.transform.update(grads, opt_state, params)
    params = jax.tree.map(jnp.add, params, updates)
    return params, opt_state, optimizer.update_ema(average, params, step)

  compiled = jax.jit(update, donate_argnums=(0, 2, 3))
  params, grads = ({'all': array} for array in _arrays((shape, shape), jnp.float32))
  opt_state, average = optimizer.transform.init(params), optimizer.init_ema(params)

  def run():
    nonlocal params, opt_state, average
    params, opt_state, average = compiled(params, grads, opt_state, average, jnp.int32(0))
    return params, opt_state, average

  return run


def build(kind: str, shape: list[int], phase: str, *, dtype: str, compiled: bool = False) -> jax_side.Built:
  """Returns one operation in one phase: 'forward', 'with_gradient', or one of the convolution's gradients."""
  del compiled
  shape = tuple(shape)
  if kind == 'conv3x3':
    run = _conv3x3(shape, phase, dtype)
  elif kind == 'dropout':
    run = _dropout(shape, dtype)
  elif kind == 'update':
    run = _update(shape)
  else:
    function, shapes = _function(kind, shape)
    args = _arrays(shapes, dtype)
    if phase == 'forward':
      jitted = jax.jit(function)
      run = lambda: jitted(*args)
    else:

      def with_gradient(args, g):
        y, vjp = jax.vjp(function, *args)
        return y, vjp(g)

      g, jitted = jax.jit(function)(*args), jax.jit(with_gradient)
      run = lambda: jitted(args, g)
  return jax_side.Built(run, jax.block_until_ready, 0)


def _arrays(shapes: tuple[tuple[int, ...], ...], dtype: Any) -> list[jax.Array]:
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for shape in shapes]
