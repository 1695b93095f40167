"""The blocks of a network as functions of their own: what is rounded together (BRECQ: 2102.05426).

A block is the module whose own children are all the layers below it: a residual block, an attention block, a
linear map and its like. A layer that has no such module, as what halves a map, is a block by itself.
"""

import dataclasses
from typing import Any

import jax
from flax import linen as nn

from vaediff.models.functional import Model
from vaediff.models.observed import Layer, layers_of, visiting, zeros_of
from vaediff.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
  """A part of a network that can be run alone.

  Attributes:
    path: its names in the parameters, joined by slashes.
    module: the Flax module, bound to nothing.
  """

  path: str
  module: nn.Module

  def apply(self, params: Params, *args: Any, **kwargs: Any) -> Any:
    """Returns its output; `params` are those below its path, in floats."""
    return self.module.apply({'params': params}, *args, **kwargs)


def blocks_of(model: Model) -> tuple[Block, ...]:
  """Returns the blocks of a forward pass, in the order of their calls; computes nothing."""
  layers, found = layers_of(model), {}
  paths = {_path_of(layer, layers) for layer in layers}

  def visit(module: nn.Module, path: str, call: Any, args: Any, named: Any) -> Any:
    if path in paths and path not in found:
      found[path] = Block(path=path, module=module.clone(parent=None))
    return call(*args, **named)

  def run(params: Params) -> Any:
    with visiting(visit):
      return model.apply(params, *zeros_of(model.inputs))

  jax.eval_shape(run, jax.eval_shape(model.init, jax.random.key(0)))
  return tuple(found.values())


def _path_of(layer: Layer, layers: tuple[Layer, ...]) -> str:
  parent = layer.path.rpartition('/')[0]
  below = [other.path for other in layers if other.path.startswith(f'{parent}/')]
  return parent if parent and all('/' not in path[len(parent) + 1 :] for path in below) else layer.path


def block_io(
  model: Model, params: Params, *args: Any, blocks: tuple[Block, ...]
) -> dict[str, tuple[tuple[Any, ...], Any]]:
  """Returns what each block reads and gives, (args, output) by its path."""
  paths, found = {block.path for block in blocks}, {}

  def visit(module: nn.Module, path: str, call: Any, inputs: Any, named: Any) -> Any:
    output = call(*inputs, **named)
    if path in paths:
      found[path] = (tuple(inputs), output)
    return output

  with visiting(visit):
    model.apply(params, *args)
  return found
