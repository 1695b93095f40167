"""Images as codes on several grids, and back: how `models.hierarchy` is walked from the top to the bottom."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32
from ml_collections import ConfigDict

from vaediff.errors import UserError
from vaediff.models import codebook, hierarchy
from vaediff.models.functional import Model
from vaediff.models.hierarchy import Map
from vaediff.types import Image, LatentMap, Params

Grids = tuple[Int32[Array, 'batch _ _'], ...]
"""Ids of each level, coarse first: the levels have other heights and widths."""
NETWORK = 'hierarchy'
"""Name of the network among those of its stage."""


def hierarchy_model(section: ConfigDict, data: ConfigDict) -> Model:
  """Returns the network that a stage's `model` section describes, for the images of `data`.

  Raises:
    UserError: for a field that is out of range, or a side that is not one of so many levels.
  """
  module = hierarchy.Hierarchy(image_channels=data.channels, **section.to_dict())
  size, coarsest = data.image_size, module.strides()[0]
  if size % coarsest:
    fits = [str(levels) for levels in range(1, module.num_levels) if size % (4 * 2 ** (levels - 1)) == 0]
    or_fewer = f', or set model.num_levels to {" or ".join(fits)}' if fits else ''
    raise UserError(
      f'data.image_size is {size}, but with model.num_levels = {module.num_levels} the top is {coarsest} '
      f'times smaller than the image: the side must be a multiple of {coarsest}, such as '
      f'{(size // coarsest + 1) * coarsest}{or_fewer}'
    )
  shape = (1, size, size, data.channels)
  return Model(module=module, inputs=(jax.ShapeDtypeStruct(shape, jnp.float32),))


def grids(model: Model) -> tuple[tuple[int, int], ...]:
  """Returns (height, width) of the ids of each level, coarse first."""
  side = model.inputs[0].shape[1]
  return tuple((side // stride, side // stride) for stride in model.module.strides())


def codes_key(name: str) -> str:
  """Returns the name of the parameter that holds the codes of a level."""
  return f'codes_{name}'


def codes_of(model: Model, params: Params) -> tuple[codebook.Codes, ...]:
  """Returns the codes of each level, coarse first."""
  return tuple(params[codes_key(name)] for name in model.module.names)


def walk(model: Model, params: Params, x: Image, quantise: Callable[[int, Map], Map]) -> LatentMap:
  """Returns what the decoder takes, made of images.

  Args:
    model: the network.
    params: of it.
    x: images in [-1, 1].
    quantise: (level, vectors) -> what takes their place; it is called once for each level, from the top on.
  """
  carried = None
  for level, encoded in enumerate(model.apply(params, x, method='encode')):
    z = model.apply(params, level, encoded, carried, method='vectors')
    carried = model.apply(params, level, carried, quantise(level, z), method='carry')
  return carried


def encode(model: Model, params: Params, x: Image) -> Grids:
  """Returns the ids of images in [-1, 1], coarse first."""
  books, found = codes_of(model, params), []

  def nearest(level: int, z: Map) -> Map:
    found.append(codebook.nearest(z, books[level]))
    return codebook.lookup(books[level], found[-1])

  walk(model, params, x, nearest)
  return tuple(found)


def join(model: Model, params: Params, vectors: Sequence[Map]) -> LatentMap:
  """Returns what the decoder takes, made of the vectors of each level, on the bottom's grid."""
  carried = None
  for level, q in enumerate(vectors):
    carried = model.apply(params, level, carried, q, method='carry')
  return carried


def embed(model: Model, params: Params, ids: Grids, fill: Mapping[int, Array] | None = None) -> LatentMap:
  """Returns what the decoder takes, made of ids; a level in `fill` has that vector everywhere instead."""
  vectors, fill = [], fill or {}
  for level, (book, rows) in enumerate(zip(codes_of(model, params), ids, strict=True)):
    q = codebook.lookup(book, rows)
    vectors.append(jnp.broadcast_to(fill[level].reshape(1, 1, 1, -1), q.shape) if level in fill else q)
  return join(model, params, vectors)


def decode(model: Model, params: Params, carried: LatentMap) -> Image:
  """Returns the images, not clipped, of what the decoder takes."""
  return model.apply(params, carried, method='decode')
