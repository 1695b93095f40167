"""Conditioning augmentation: noise of a level on what a network reads of an image, and the level as an input.

A network that is trained on what an earlier one makes of data is sampled on what that one makes of nothing.
Where training noises it at levels s of its own for every example,

    c_s = alpha_s c + sigma_s eps,    s ~ U(0, max_level),

with the schedule of the stage, and the network reads c_s and s, a level can be chosen in sampling: it hides
what the two do not share (Ho et al. 2021, arXiv:2106.15282, section 4; truncated there means that the level
is that of a sampler stopped early). At level 0 nothing is changed.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vaediff.diffusion import gaussian, schedules
from vaediff.errors import UserError
from vaediff.models.ports import Port
from vaediff.types import Given, Keys

IN_SAMPLING = 'aug_level'
"""The field of a `sample` section: the level of all samples."""
UNIT_NOISE = 'drawn from N(0, I)'
"""What noise of unit variance is, in words."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noising:
  """Noise on one value.

  Attributes:
    of: name of the value.
    shape: of the value of one image.
    schedule: alpha and sigma of a level.
    max_level: in training, above 0.
    level: in sampling, in [0, max_level].
    droppable: the level is dropped with its value.
  """

  of: str
  shape: tuple[int, ...]
  schedule: schedules.Schedule
  max_level: float
  level: float
  droppable: bool

  @property
  def level_name(self) -> str:
    """Of the level, an input and a value."""
    return f'{self.of}_level'

  @property
  def noise_name(self) -> str:
    """Of the noise, an input."""
    return f'{self.of}_noise'

  @property
  def ports(self) -> Mapping[str, Port]:
    """The level, embedded as the time is."""
    return {self.level_name: Port(enters='vector', shape=(), level=True, droppable=self.droppable)}

  @property
  def inputs(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """The level, and noise of unit variance."""
    return {
      self.level_name: jax.ShapeDtypeStruct((), jnp.float32),
      self.noise_name: jax.ShapeDtypeStruct(self.shape, jnp.float32),
    }

  @property
  def ranges(self) -> Mapping[str, str]:
    """What the values of level and noise mean."""
    return {self.level_name: f'a level of noise in [0, {self.max_level:g}]', self.noise_name: UNIT_NOISE}

  def train(self, key: jax.Array, count: int) -> Given:
    """Returns a level of its own for each example, and noise."""
    key_level, key_noise = jax.random.split(key)
    return {
      self.level_name: jax.random.uniform(key_level, (count,), maxval=self.max_level),
      self.noise_name: jax.random.normal(key_noise, (count, *self.shape)),
    }

  def draw(self, keys: Keys) -> Given:
    """Returns the level of samples, and noise of each image's key."""
    return {
      self.level_name: jnp.full(keys.shape[0], self.level, jnp.float32),
      self.noise_name: jax.vmap(lambda key: jax.random.normal(key, self.shape))(keys),
    }

  def levels(self, given: Given, count: int) -> Float[Array, ' batch']:
    """Returns the levels that are given; 0 where none are."""
    return given[self.level_name] if self.level_name in given else jnp.zeros(count)

  def noised(self, value: Float[Array, 'batch *shape'], given: Given) -> Float[Array, 'batch *shape']:
    """Returns the value at its level; as it is at level 0, and where no level or no noise is given."""
    if self.level_name not in given or self.noise_name not in given:
      return value
    level = given[self.level_name]
    noisy = gaussian.q_sample(value, given[self.noise_name], level, self.schedule)
    return jnp.where(gaussian.per_example(level > 0, value), noisy, value)


def noising(
  section: ConfigDict, of: str, shape: tuple[int, ...], max_level: float, *, droppable: bool, field: str
) -> Noising | None:
  """Returns the noise on a value of a stage's section; None where training has none (`max_level` = 0).

  Raises:
    UserError: when samples ask for a level that training has never seen; `field` says which of the section's
      fields is `max_level`.
  """
  if max_level == 0:
    return None
  level = section.sample[IN_SAMPLING]
  if not 0 <= level <= max_level:
    raise UserError(
      f'sample.{IN_SAMPLING} is {level}, outside of the levels that the network is trained at: {field} = '
      f'{max_level}, so that it must be in [0, {max_level}]'
    )
  return Noising(
    of=of,
    shape=shape,
    schedule=schedules.make_schedule(section.diffusion.schedule),
    max_level=max_level,
    level=level,
    droppable=droppable,
  )


def check_level(section: ConfigDict, *, augmented: bool) -> None:
  """Raises UserError for a level in sampling where the network reads none."""
  if not augmented and section.sample[IN_SAMPLING] > 0:
    raise UserError(
      f'sample.{IN_SAMPLING} is {section.sample[IN_SAMPLING]}, but the network reads no level: it needs one '
      'trained with conditions.vae.aug_level or conditions.low_resolution.max_level above 0'
    )
