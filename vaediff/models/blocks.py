"""The blocks of a network as functions of their own: what is rounded together (BRECQ: 2102.05426).

A block is the module whose own children are all the layers below it: a residual block, an attention block, a
linear map and its like. A layer that has no such module, as what halves a map, is a block by itself.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn
from jaxtyping import Array

from vaediff.models.functional import Model
from vaediff.models.observed import Layer, layers_of, visiting, zeros_of
from vaediff.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Block:
  """A part of a network.

  Attributes:
    path: its names in the parameters, joined by slashes.
    layers: of it, those that are quantized.
    module: the Flax module, by itself.
    fixed: arguments by name that are no arrays.
  """

  path: str
  layers: tuple[Layer, ...]
  module: nn.Module
  fixed: Mapping[str, Any]

  def apply(self, params: Params, args: tuple[Any, ...], named: Mapping[str, Any]) -> Array:
    """Returns its output; `params` are those below its path, in floats."""
    return self.module.apply({'params': params}, *args, **named, **self.fixed)


def path_of(layer: Layer, every: tuple[Layer, ...]) -> str:
  """Returns the path of the block that a layer is in."""
  parent = layer.path.rpartition('/')[0]
  below = [other.path for other in every if other.path.startswith(f'{parent}/')]
  return parent if parent and all('/' not in path[len(parent) + 1 :] for path in below) else layer.path


def blocks_of(model: Model, layers: tuple[Layer, ...]) -> tuple[Block, ...]:
  """Returns the blocks that have any of the layers, in the order of a forward pass; computes nothing."""
  every, found = layers_of(model), {}
  paths = {layer.path: path_of(layer, every) for layer in layers}

  def visit(module: nn.Module, path: str, call: Any, args: Any, named: Any) -> Any:
    if path in paths.values() and path not in found:
      own = tuple(layer for layer in layers if paths[layer.path] == path)
      fixed = {name: value for name, value in named.items() if not _is_arrays(value)}
      found[path] = Block(path=path, layers=own, module=module.clone(parent=None), fixed=fixed)
    return call(*args, **named)

  def run(params: Params) -> Any:
    with visiting(visit):
      return model.apply(params, *zeros_of(model.inputs))

  jax.eval_shape(run, jax.eval_shape(model.init, jax.random.key(0)))
  return tuple(found.values())


def block_io(
  model: Model, params: Params, *args: Any, blocks: tuple[Block, ...]
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any], Array]]:
  """Returns what each block is called with, arrays by place and by name, and what it returns; by its path."""
  paths, found = {block.path for block in blocks}, {}

  def visit(module: nn.Module, path: str, call: Any, inputs: Any, named: Any) -> Any:
    output = call(*inputs, **named)
    if path in paths:
      arrays = {name: value for name, value in named.items() if _is_arrays(value)}
      found[path] = (tuple(inputs), arrays, output)
    return output

  with visiting(visit):
    model.apply(params, *args)
  return found


def _is_arrays(value: Any) -> bool:
  leaves = jax.tree.leaves(value)
  return bool(leaves) and all(hasattr(leaf, 'shape') for leaf in leaves)
