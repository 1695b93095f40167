"""A degraded image: a diffusion on it learns to restore (Pandey et al. 2021, arXiv:2201.00308v1, appendix D).

It is joined to the state, for inpainting with the mask of known pixels. In training images are degraded anew
at every step; a sample is given the degraded image, or sees one in an image of the evaluation split.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array
from ml_collections import ConfigDict

from vaediff import checks
from vaediff.conditions.base import Condition, Conditions
from vaediff.data import pixels, resize
from vaediff.diffusion import restoration
from vaediff.diffusion.restoration import Degradation
from vaediff.errors import UserError
from vaediff.models.ports import Port
from vaediff.spaces import Space
from vaediff.types import Batch, Given, Image, Keys, Read, Values

DEGRADED = 'degraded'
"""Name of the condition, of its input and of its value."""
KNOWN = 'known'
"""Name of the mask: 1 where a pixel is known, 0 in the hole."""
BOUNDS = {
  'conditions.degraded.task': checks.one_of(restoration.TASKS),
  'conditions.degraded.factor': checks.count(2),
  'conditions.degraded.noise_std': checks.above(0),
  'conditions.degraded.hole_fraction': checks.inside(0, 1),
  'conditions.degraded.hole': checks.one_of(restoration.HOLES),
  'conditions.degraded.dropout': checks.below_one(),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Degraded(Condition):
  """The degraded image of each example.

  Attributes:
    degradation: what is done to images.
    space: of the state, which the image is brought into.
    image_shape: (height, width, channels).
    dropout: probability of the learned stand-ins.
  """

  degradation: Degradation
  space: Space
  image_shape: tuple[int, int, int]
  dropout: float

  name = DEGRADED
  titles = {DEGRADED: DEGRADED}
  reconstructs = True
  bounds_images = False

  @property
  def title(self) -> str:
    """Name of the degradation that the network undoes."""
    return self.degradation.task

  @property
  def has_hole(self) -> bool:
    """Whether the network reads the mask."""
    return self.degradation.task == 'inpaint'

  @property
  def ports(self) -> Mapping[str, Port]:
    """The image in the space of the state, and the mask at its size, both beside it."""
    droppable = self.dropout > 0
    ports = {DEGRADED: Port(enters='concat', shape=self.space.shape, droppable=droppable)}
    if self.has_hole:
      shape = (*self.space.shape[:2], 1)
      ports[KNOWN] = Port(enters='concat', shape=shape, droppable=droppable)
    return ports

  @property
  def inputs(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """The degraded image in [-1, 1], and the mask."""
    inputs = {DEGRADED: jax.ShapeDtypeStruct(self.image_shape, jnp.float32)}
    if self.has_hole:
      inputs[KNOWN] = jax.ShapeDtypeStruct((*self.image_shape[:2], 1), jnp.float32)
    return inputs

  @property
  def ranges(self) -> Mapping[str, str]:
    """What the values of the mask mean."""
    return {KNOWN: 'a mask: 1 where a pixel is known, 0 in the hole'} if self.has_hole else {}

  @property
  def seen(self) -> tuple[str, ...]:
    """All inputs: an image alone can supply them."""
    return tuple(self.inputs)

  def observe(self, read: Read, batch: Batch, x: Image, key: jax.Array | None) -> Given:
    """Returns the images degraded; without a key noise and holes depend on each image alone."""
    del read, batch
    if key is None:
      keys = keys_of_images(x)
    else:
      keys = key if key.ndim else jax.random.split(key, x.shape[0])
    degraded, _, known = self.degradation.degrade(x, keys)
    return {DEGRADED: degraded} | ({KNOWN: known} if self.has_hole else {})

  def values(self, read: Read, given: Given) -> Values:
    """Returns the image in the space of the state; of a mask the means over the pixels of each place."""
    values = {DEGRADED: self.space.encode(read, given[DEGRADED], None)}
    if self.has_hole:
      known = given[KNOWN]
      height, width = self.space.shape[:2]
      blocks = known.reshape(len(known), height, known.shape[1] // height, width, known.shape[2] // width, 1)
      values[KNOWN] = blocks.mean(axis=(2, 4))
    return values

  def shown(self, given: Given) -> dict[str, Image]:
    """Returns the degraded image."""
    return {DEGRADED: given[DEGRADED]}


def keys_of_images(x: Image) -> Keys:
  """Returns a key of each image that depends on its bytes alone: not on its place in a batch."""
  numbers = pixels.to_bytes(x).reshape(x.shape[0], -1).astype(jnp.uint32)
  weights = jnp.arange(numbers.shape[1], dtype=jnp.uint32)[None] * jnp.uint32(2654435761) + jnp.uint32(40503)
  sums: Array = jnp.sum(numbers * weights, axis=1, dtype=jnp.uint32)
  return jax.vmap(lambda number: jax.random.fold_in(jax.random.key(0), number))(sums)


def learned_by(conditions: Conditions) -> Degradation | None:
  """Returns what a stage has learned to undo; None where it is no stage of this kind."""
  return next((one.degradation for one in conditions.each if isinstance(one, Degraded)), None)


def degraded_condition(config: ConfigDict, stage: str, space: Space) -> Degraded:
  """Returns the condition that `config.<stage>.conditions.degraded` describes.

  Raises:
    UserError: for a value that is not allowed, or a task that the data set's images do not have.
  """
  checks.check(config[stage], BOUNDS)
  section, data = config[stage].conditions.degraded, config.data
  degradation = Degradation(
    task=section.task,
    factor=section.factor,
    noise_std=section.noise_std,
    hole_fraction=section.hole_fraction,
    hole=section.hole,
  )
  degradation.check(data.image_size, data.channels, 'conditions.degraded.')
  if data.image_size % space.shape[0]:
    raise UserError(
      f"conditions.degraded needs maps whose side divides the images', got {space.shape[0]} and "
      f'{data.image_size} (data.image_size)'
    )
  return Degraded(
    degradation=degradation,
    space=space,
    image_shape=resize.image_shape(data),
    dropout=section.dropout,
  )
