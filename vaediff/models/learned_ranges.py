"""Ranges of activations that are learned by the error of a block (Q-Diffusion: Li et al. 2023, 2302.04304).

Of each layer's input, in each part and bucket of time, one factor f = exp(a) stretches the measured range:

    x_q = f s (q - z),    q = clip(round(x / (f s)) + z, -128, 127)

The zero point z stays, and with it that 0 is exact. Rounding has the gradient of the identity, so that the
gradient of the step is that of learned step sizes (LSQ: Esser et al. 2020, 1902.08153, eq. 3), round(x / s) -
x / s within the range and its end less z beyond it. The loss is the squared error of the block's output.

Imports jax, optax and this folder's arithmetic only.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vaediff.models import adaround, integers
from vaediff.models.observed import Layer, is_layer, visiting

Steps = Mapping[str, Float[Array, '_buckets _parts']]
Zeros = Mapping[str, Int[Array, '_buckets _parts']]
"""Of a layer's input, by the path of the layer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """How ranges are learned.

  Attributes:
    num_steps: updates of each block; 0 = they stay as they were measured.
    batch_size: examples of an update.
    learning_rate: of Adam, of the logarithm of a factor; it falls to 0 as a cosine.
  """

  num_steps: int = 0
  batch_size: int = 32
  learning_rate: float = 2e-3


class Learned(NamedTuple):
  """What is learned of a block.

  Attributes:
    factors: of the ranges [buckets, parts], by path.
    error: of the block, over all examples.
    measured: the same, of the ranges as they were.
  """

  factors: dict[str, Float[Array, '_buckets _parts']]
  error: float
  measured: float


def rounded(x: Array, scale: Array, zero: Array) -> Array:
  """Returns the numbers that an input becomes, with the gradient of rounding taken to be 1."""
  steps = x.astype(jnp.float32) / scale
  steps = steps + jax.lax.stop_gradient(jnp.round(steps) - steps)
  return scale * (jnp.clip(steps + zero, integers.LOWEST, integers.HIGHEST) - zero)


def with_rounded_inputs(
  call: Callable[[], Any],
  layers: Mapping[str, Layer],
  scales: Steps,
  zeros: Zeros,
  bucket: Int[Array, ' rows'],
) -> Any:
  """Returns what a call of a module gives whose layers read rounded inputs.

  Args:
    call: of the module.
    layers: that do, by their paths in the module.
    scales: of their inputs, by the layers' own paths.
    zeros: their zero points.
    bucket: that each row is in.
  """

  def visit(module: nn.Module, path: str, call: Any, inputs: Any, others: Any) -> Any:
    if path not in layers or not is_layer(module):
      return call(*inputs, **others)
    layer, x = layers[path], inputs[0]
    shape = (-1, *(1,) * (x.ndim - 1))
    parts = [
      rounded(x[..., part], *(table[layer.path][bucket, n].reshape(shape) for table in (scales, zeros)))
      for n, part in enumerate(layer.slices)
    ]
    return call(jnp.concatenate(parts, axis=-1), *inputs[1:], **others)

  with visiting(visit):
    return call()


def learn(
  block: Callable[..., Array],
  scales: Steps,
  args: Any,
  wanted: Float[Array, 'examples *shape'],
  settings: Settings,
  key: jax.Array,
) -> Learned:
  """Returns the factors of the steps of a block's inputs; 1 where those have the smaller error over all.

  Args:
    block: (scales, *args) -> outputs, differentiable in the scales.
    scales: the measured ones.
    args: what the block is given, arrays with a row per example.
    wanted: the float block's outputs.
    settings: how they are learned.
    key: of which examples an update sees.
  """
  learned = _learned(block, dict(scales), args, wanted, key, settings=settings)
  ones = {path: jnp.ones_like(scale) for path, scale in scales.items()}

  def error(factors: Mapping[str, Array]) -> float:
    changed = {path: scales[path] * factor for path, factor in factors.items()}
    return adaround.error_over(block, changed, args, wanted, settings.batch_size)

  errors = error(learned), error(ones)
  return Learned(learned, *errors) if errors[0] < errors[1] else Learned(ones, errors[1], errors[1])


@functools.partial(jax.jit, static_argnums=0, static_argnames='settings')
def _learned(
  block: Callable[..., Array],
  scales: dict[str, Array],
  args: Any,
  wanted: Array,
  key: jax.Array,
  *,
  settings: Settings,
) -> dict[str, Array]:
  """Returns the factors after all updates, in one program."""
  adam = optax.adam(optax.cosine_decay_schedule(settings.learning_rate, settings.num_steps))
  count = len(wanted)

  def loss(a: dict[str, Array], rows: Array) -> Array:
    changed = {path: scales[path] * jnp.exp(a[path]) for path in scales}
    outputs = block(changed, *jax.tree.map(lambda x: x[rows], args))
    return adaround.block_error(outputs, wanted[rows])

  def update(carry: tuple[Any, Any], step: Array) -> tuple[tuple[Any, Any], None]:
    a, state = carry
    chosen = jax.random.randint(jax.random.fold_in(key, step), (min(settings.batch_size, count),), 0, count)
    updates, state = adam.update(jax.grad(loss)(a, chosen), state, a)
    return (optax.apply_updates(a, updates), state), None

  a = {path: jnp.zeros_like(scale) for path, scale in scales.items()}
  (a, _), _ = jax.lax.scan(update, (a, adam.init(a)), jnp.arange(settings.num_steps))
  return {path: jnp.exp(value) for path, value in a.items()}
