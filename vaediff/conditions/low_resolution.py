"""A smaller image of the same thing: what makes a diffusion the next stage of a cascade.

The means of `factor` x `factor` pixels are made worse as they are, at the low resolution, then every one is
repeated `factor` times each way and concatenated to the state (Ho et al. 2021, arXiv:2106.15282). Noise has a
level, which the network reads (`conditions.augmentation`); blur and `bsr` (`data.degrade`) have none, and
belong to training alone. A stage reads nothing of another while it trains: the small images are those of the
data. In sampling they are the samples of the stage that is named.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from vaediff import checks, reads
from vaediff.conditions import augmentation
from vaediff.conditions.base import Condition
from vaediff.data import degrade
from vaediff.errors import UserError
from vaediff.models import layers
from vaediff.models.ports import Port
from vaediff.spaces import FACTOR, Space
from vaediff.types import Batch, Given, Image, Keys, Read, Values

LOW_RESOLUTION = 'low_resolution'
"""Name of the condition, and of its section."""
LOW = 'low'
"""Name of the input, the small image, and of the value."""
AUGMENTATIONS = ('none', 'noise', 'blur', 'bsr')
MOST_FACTOR = 64
BOUNDS = {
  'conditions.low_resolution.factor': checks.between(2, MOST_FACTOR),
  'conditions.low_resolution.augmentation': checks.one_of(AUGMENTATIONS),
  'conditions.low_resolution.max_level': checks.between(0, 1),
  'conditions.low_resolution.dropout': checks.below_one(),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowResolution(Condition):
  """The small image, and how strongly it is noised.

  Attributes:
    shape: of the stage's own images, (height, width, channels).
    factor: their sides over those of the small images.
    pool: the sides of the data over those of the small images.
    augmentation: of training, one of `AUGMENTATIONS`.
    noising: of 'noise', where its levels are not all 0.
    dropout: probability of the learned stand-ins of image and level.
    maker: the stage whose samples are the small images in sampling; None = they are seen in data.
  """

  shape: tuple[int, int, int]
  factor: int
  pool: int
  augmentation: str
  noising: augmentation.Noising | None
  dropout: float
  maker: reads.Sampled | None

  name = LOW_RESOLUTION
  title = LOW_RESOLUTION
  titles = {LOW: 'low resolution'}
  seen = (LOW,)
  reconstructs = True
  bounds_images = False

  @property
  def max_level(self) -> float:
    """Largest level of the noise on the small image; 0 without noise."""
    return self.noising.max_level if self.noising else 0.0

  @property
  def ports(self) -> Mapping[str, Port]:
    """The image beside the state, and the level."""
    image = Port(enters='concat', shape=self.shape, droppable=self.dropout > 0)
    return {LOW: image, **(self.noising.ports if self.noising else {})}

  @property
  def inputs(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """The small image in [-1, 1], its level and its noise."""
    image = jax.ShapeDtypeStruct(low_shape(self.shape, self.factor), jnp.float32)
    return {LOW: image, **(self.noising.inputs if self.noising else {})}

  @property
  def ranges(self) -> Mapping[str, str]:
    """Of a level and noise."""
    return self.noising.ranges if self.noising else {}

  def observe(self, read: Read, batch: Batch, x: Image, key: jax.Array | None) -> Given:
    """Returns the means of the pixels of the data."""
    del read, batch, key
    return {LOW: layers.average_pool(x, self.pool)}

  def observe_in_training(self, read: Read, batch: Batch, x: Image, key: jax.Array) -> Given:
    """Returns the same made worse: by noise of a level of its own for each example, or as it is."""
    given = self.observe(read, batch, x, None)
    if self.noising:
      return {**given, **self.noising.train(key, len(x))}
    if self.augmentation in ('blur', 'bsr'):
      worse = getattr(degrade, self.augmentation)
      given[LOW] = worse(given[LOW], jax.random.split(key, len(x)))
    return given

  def draw(self, read: Read, keys: Keys, indices: Int[Array, ' batch']) -> Given:
    """Returns the level of samples and the noise; the image cannot be drawn of nothing here."""
    del read, indices
    return self.noising.draw(keys) if self.noising else {}

  def values(self, read: Read, given: Given) -> Values:
    """Returns the small image at its level, as large as the state, and the level.

    Raises:
      UserError: when it has another shape than training had.
    """
    del read
    low, wanted = given[LOW], low_shape(self.shape, self.factor)
    if low.shape[1:] != wanted:
      raise UserError(
        f'the low-resolution image must be {" x ".join(map(str, wanted))}, 1/{self.factor} of the sides of '
        f'the stage, {self.shape[0]} x {self.shape[1]}; got {" x ".join(map(str, low.shape[1:]))}'
      )
    level = {}
    if self.noising:
      level = {self.noising.level_name: self.noising.levels(given, len(low))}
      low = self.noising.noised(low, given)
    return {LOW: layers.upsample_nearest(low, self.factor), **level}

  def shown(self, given: Given) -> dict[str, Image]:
    """Returns the small image, without noise, as large as the state."""
    return {LOW: layers.upsample_nearest(given[LOW], self.factor)}


def low_shape(shape: tuple[int, int, int], factor: int) -> tuple[int, int, int]:
  """Returns the shape of images that are `factor` times smaller."""
  return shape[0] // factor, shape[1] // factor, shape[2]


def low_resolution_condition(config: ConfigDict, stage: str, space: Space) -> LowResolution:
  """Returns the condition that `config.<stage>.conditions.low_resolution` describes.

  Raises:
    UserError: for a value that is not allowed, a space that is not of pixels, or a stage whose samples have
      another size.
  """
  section = config[stage]
  checks.check(section, BOUNDS)
  named = section.conditions[LOW_RESOLUTION]
  if section.space != 'pixel':
    raise UserError(f"conditions.low_resolution needs space = 'pixel', got {section.space!r}")
  if named.factor != int(named.factor) or space.shape[0] % named.factor:
    raise UserError(
      f'conditions.low_resolution.factor is {named.factor}: it must divide the side of the images of the '
      f'stage, {space.shape[0]}'
    )
  max_level = named.max_level if named.augmentation == 'noise' else 0.0
  return LowResolution(
    shape=space.shape,
    factor=named.factor,
    pool=named.factor * space.factor,
    augmentation=named.augmentation,
    noising=augmentation.noising(
      section,
      LOW,
      low_shape(space.shape, named.factor),
      max_level,
      droppable=named.dropout > 0,
      field='conditions.low_resolution.max_level',
    ),
    dropout=named.dropout,
    maker=maker_of(config, stage) if named.stage else None,
  )


def maker_of(config: ConfigDict, stage: str) -> reads.Sampled:
  """Returns the stage that the condition of a stage names, whose images must be those that it reads.

  Raises:
    UserError: when there is no such stage, when its images have another size, or when stages feed each other.
  """
  chain = [stage]
  while named := feeding(config, chain[-1]):
    if named in chain:
      raise UserError(
        f'conditions.low_resolution.stage: {" <- ".join([*chain, named])} would feed each other in a circle'
      )
    if named not in config or not isinstance(config[named], ConfigDict) or 'space' not in config[named]:
      raise UserError(
        f'conditions.low_resolution.stage is {named!r}, which is no stage of this config that draws images'
      )
    chain.append(named)
    level = config[stage].sample[augmentation.IN_SAMPLING]
    if feeding(config, named) and level > (most := config[named].conditions[LOW_RESOLUTION].max_level):
      raise UserError(
        f'sample.aug_level is {level}, also of the stages before this one, of which {named!r} is trained at '
        f'levels up to {most}'
      )
  small, large = (config.data.image_size // factor_of(config[name]) for name in (chain[1], stage))
  factor = config[stage].conditions[LOW_RESOLUTION].factor
  if small * factor != large:
    raise UserError(
      f'conditions.low_resolution.stage is {chain[1]!r}, whose images have {small} pixels a side; those of '
      f'this stage have {large}, and factor is {factor}: {large // factor} are needed'
    )
  workdir = config[stage].conditions[LOW_RESOLUTION].workdir
  depth = len(chain) - 1 + is_fed(config, chain[-1])
  return reads.Sampled(stage=chain[1], workdir=workdir, feeds=LOW, depth=depth)


def is_fed(config: ConfigDict, stage: str) -> bool:
  """Returns whether a prior is sampled before the first stage of a cascade, of what that one reads."""
  section = config[stage]
  known = section.conditions.values() if 'conditions' in section else ()
  return any('prior_stage' in one and bool(one.prior_stage) for one in known)


def feeding(config: ConfigDict, stage: str) -> str:
  """Returns the name of the stage whose samples a stage reads; '' = it reads none."""
  section = config[stage]
  if 'conditions' not in section or LOW_RESOLUTION not in section.conditions:
    return ''
  return section.conditions[LOW_RESOLUTION].stage


def factor_of(section: ConfigDict) -> int:
  """Returns the sides of the data over those of a stage's images."""
  return section[FACTOR] if FACTOR in section else 1
