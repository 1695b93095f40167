"""What happens inside a network: its layers and blocks, and what each of them reads, without a change to it.

Calls of Flax modules are intercepted while a model is applied (`flax.linen.intercept_methods`). A layer is a
convolution or a linear map, a block what is made of them: residual blocks, attention, blocks of transformers.

Must not import diffusion, experiments, run, config or data.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vaediff.errors import UserError
from vaediff.models import (
  autoencoder_blocks,
  ncsnpp_blocks,
  token_injection,
  transformer_blocks,
  unet_blocks,
  uvit,
)
from vaediff.models.functional import Model
from vaediff.types import Params

CONV, DENSE = 'conv', 'dense'
KEPT = (
  'conv_in', '*/conv_in', 'conv_out', '*/conv_out', 'patches', 'pixels', '*/patches', '*/pixels',
  '*quant_conv', '*/style', '*/modulation',
)  # fmt: skip
"""Patterns of layers that are not quantized: the first and the last ones, and those that make norms."""
BY_EMBEDDING = 'emb'
"""The one kind of layer that reads vectors and is quantized: a block's projection of the embedding."""
JOINED = ('conv_1', 'skip', 'join')
"""Names of the layers of a block that read what is concatenated before it."""

BLOCKS = (
  unet_blocks.ResidualBlock, unet_blocks.AttentionBlock, token_injection.TokenAttention,
  ncsnpp_blocks.ResidualBlock, ncsnpp_blocks.AttentionBlock, autoencoder_blocks.ResidualBlock,
  uvit.Block, transformer_blocks.Block,
)  # fmt: skip
"""What is fitted as a whole; a layer that is in none of them is a block by itself."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
  """A convolution or a linear map of a network.

  Attributes:
    path: its names in the parameters, joined by slashes.
    kind: 'conv' or 'dense'.
    shape: of the kernel: (rows, columns, inputs, outputs) or (inputs, outputs).
    split: where a concatenation that it reads has its seam, in channels; 0 = it reads none.
    rank: of its input.
  """

  path: str
  kind: str
  shape: tuple[int, ...]
  split: int = 0
  rank: int = 4

  @property
  def parts(self) -> int:
    """How many parts of its input have scales of their own."""
    return 2 if self.split else 1

  @property
  def slices(self) -> tuple[slice, ...]:
    """The input channels of each part."""
    inputs = self.shape[-2]
    return (slice(0, self.split), slice(self.split, inputs)) if self.split else (slice(0, inputs),)


Visit = Callable[[nn.Module, str, Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], Any]
"""(module, path, call, args, kwargs) -> what the call returns."""


@contextlib.contextmanager
def visiting(visit: Visit) -> Iterator[None]:
  """Replaces every call of a module by a visit, which may make the call."""

  def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    if context.method_name != '__call__':
      return call(*args, **kwargs)
    return visit(context.module, '/'.join(context.module.path), call, args, kwargs)

  with nn.intercept_methods(intercept):
    yield


def is_layer(module: nn.Module) -> bool:
  """Returns whether it is a convolution or a linear map that `models.integers` can do."""
  if type(module) is nn.Dense:
    return True
  if type(module) is not nn.Conv or module.feature_group_count != 1 or len(module.kernel_size) != 2:
    return False
  plain = all(factor in (None, 1, (1, 1)) for factor in (module.input_dilation, module.kernel_dilation))
  return plain and (not isinstance(module.padding, str) or module.padding in ('SAME', 'VALID'))


def layers_of(model: Model) -> tuple[Layer, ...]:
  """Returns every convolution and linear map that a forward pass calls, in that order; computes nothing.

  A block that reads a map with another behind it is known by its input, which has more channels than the map
  that was made last.
  """
  found, last, seams = {}, 0, {}

  def visit(module: nn.Module, path: str, call: Any, args: Any, kwargs: Any) -> Any:
    nonlocal last
    x = args[0] if args and hasattr(args[0], 'ndim') else None
    known = x is not None and x.ndim >= 3
    if known and 0 < last < x.shape[-1]:
      seams.setdefault(path, (last, x.shape[-1]))
    if is_layer(module) and path not in found:
      found[path] = _layer(module, path, x, seams)
    result = call(*args, **kwargs)
    if hasattr(result, 'ndim') and result.ndim >= 3:
      last = result.shape[-1]
    return result

  def run(params: Params) -> Any:
    with visiting(visit):
      return without_remat(model).apply(params, *zeros_of(model.inputs))

  jax.eval_shape(run, jax.eval_shape(model.init, jax.random.key(0)))
  return tuple(found.values())


def _layer(module: nn.Module, path: str, x: Array, seams: Mapping[str, tuple[int, int]]) -> Layer:
  block, _, name = path.rpartition('/')
  inputs = x.shape[-1]
  split, whole = seams.get(path if name == 'join' else block, (0, 0)) if name in JOINED else (0, 0)
  return Layer(
    path=path,
    kind=DENSE if type(module) is nn.Dense else CONV,
    shape=(*(() if type(module) is nn.Dense else module.kernel_size), inputs, module.features),
    split=split if whole == inputs else 0,
    rank=x.ndim,
  )


def without_remat(model: Model) -> Model:
  """Returns the same network without recomputation, from inside of which nothing can be handed out."""
  if not getattr(model.module, 'remat', False):
    return model
  return dataclasses.replace(model, module=model.module.clone(remat=False))


def zeros_of(inputs: Any) -> Any:
  """Returns zeros of the shapes of a network's inputs."""
  return jax.tree.map(lambda struct: jnp.zeros(struct.shape, struct.dtype), inputs)


def quantizable(layers: tuple[Layer, ...], keep: tuple[str, ...] = ()) -> tuple[Layer, ...]:
  """Returns the layers that become whole numbers: all but those of `KEPT`, those of vectors, and `keep`.

  Args:
    layers: of the network.
    keep: patterns of paths of layers that stay as they are, as 'middle/*'.

  Raises:
    UserError: for a pattern that no layer has; names layers that there are.
  """
  for pattern in keep:
    if not any(fnmatchcase(layer.path, pattern) for layer in layers):
      shown = ', '.join(layer.path for layer in layers[:6])
      raise UserError(f'names the layer {pattern!r}, which the network does not have; layers: {shown}, ...')

  def chosen(layer: Layer) -> bool:
    of_vectors = layer.rank < 3 and layer.path.rpartition('/')[2] != BY_EMBEDDING
    return not of_vectors and not any(fnmatchcase(layer.path, pattern) for pattern in (*KEPT, *keep))

  return tuple(filter(chosen, layers))


def subtree(params: Params, path: str) -> Params:
  """Returns the parameters of a module by its path."""
  for name in filter(None, path.split('/')):
    params = params[name]
  return params


def with_subtree(params: Params, path: str, part: Params) -> Params:
  """Returns the parameters with others for the module of a path; not changed in place."""
  name, _, rest = path.partition('/')
  return {**params, name: with_subtree(params[name], rest, part) if rest else part}


def inputs_of(
  model: Model, params: Params, *args: Any, layers: tuple[Layer, ...], **kwargs: Any
) -> tuple[Any, dict[str, Array]]:
  """Returns the output, and the input of each layer by its path: of a quantized model those that it has."""
  paths, found = {layer.path for layer in layers}, {}

  def visit(module: nn.Module, path: str, call: Any, inputs: Any, others: Any) -> Any:
    if path in paths and is_layer(module):
      found[path] = inputs[0]
    return call(*inputs, **others)

  with visiting(visit):
    output = without_remat(model).apply(params, *args, **kwargs)
  return output, found


def output_and_ranges(
  model: Model, params: Params, *args: Any, layers: tuple[Layer, ...], **kwargs: Any
) -> tuple[Any, dict[str, Float[Array, 'rows parts 2']]]:
  """Returns the output, and the least and the largest number of each example in each part of an input."""
  output, found = inputs_of(model, params, *args, layers=layers, **kwargs)

  def of(layer: Layer) -> Array:
    x = found[layer.path].astype(jnp.float32)
    axes, parts = tuple(range(1, x.ndim)), [x[..., part] for part in layer.slices]
    bounds = [jnp.stack([part.min(axis=axes), part.max(axis=axes)], axis=-1) for part in parts]
    return jnp.stack(bounds, axis=1)

  return output, {layer.path: of(layer) for layer in layers if layer.path in found}


def ranges_of(
  model: Model, params: Params, *args: Any, layers: tuple[Layer, ...]
) -> dict[str, Float[Array, 'rows parts 2']]:
  """Returns the smallest and the largest number of each example in each part of each layer's input."""
  return output_and_ranges(model, params, *args, layers=layers)[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
  """A part of a network that can be run alone: a block of layers, or a layer that is in none.

  Attributes:
    path: its names in the parameters, joined by slashes.
    module: the Flax module, bound to nothing.
  """

  path: str
  module: nn.Module

  def apply(self, params: Params, *args: Any, **kwargs: Any) -> Any:
    """Returns its output for parameters of its own, those of `subtree`; dropout is off."""
    return self.module.apply({'params': params}, *args, **kwargs)


def blocks_of(model: Model) -> tuple[Block, ...]:
  """Returns the blocks of a forward pass, in the order of their calls; every layer is in one of them.

  These are the modules of `BLOCKS`, and layers by themselves.
  """
  found = {}

  def visit(module: nn.Module, path: str, call: Any, args: Any, kwargs: Any) -> Any:
    inside = any(path.startswith(f'{other}/') for other in found)
    if path and not inside and path not in found and (isinstance(module, BLOCKS) or is_layer(module)):
      found[path] = Block(path=path, module=module.clone(parent=None))
    return call(*args, **kwargs)

  def run(params: Params) -> Any:
    with visiting(visit):
      return without_remat(model).apply(params, *zeros_of(model.inputs))

  jax.eval_shape(run, jax.eval_shape(model.init, jax.random.key(0)))
  return tuple(found.values())


def block_io(
  model: Model, params: Params, *args: Any, blocks: tuple[Block, ...], **kwargs: Any
) -> dict[str, tuple[tuple[Any, ...], Any]]:
  """Returns what each block reads and gives, (args, output) by its path; a quantized model has its own."""
  paths, found = {block.path for block in blocks}, {}

  def visit(module: nn.Module, path: str, call: Any, inputs: Any, others: Any) -> Any:
    result = call(*inputs, **others)
    if path in paths:
      found[path] = (inputs, result)
    return result

  with visiting(visit):
    without_remat(model).apply(params, *args, **kwargs)
  return found
