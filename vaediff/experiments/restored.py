"""A trained diffusion, sampled to agree with degraded images, or through the noise of an image.

Nothing is trained here: whoever has opened a stage draws with one of these in place of its experiment.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from vaediff.conditions.degraded import DEGRADED, KNOWN
from vaediff.conditions.vae import IMAGE
from vaediff.diffusion import inversion, restoration
from vaediff.diffusion.restoration import Degradation
from vaediff.errors import UserError
from vaediff.experiments import base
from vaediff.experiments.diffusion import Diffusion
from vaediff.types import Batch, Given, Image, LatentMap, Read

MEASURED = 'measured'
"""Name of A+ y, the part of an image that the degraded one gives."""
ORIGINAL = 'original'
"""Name of the image whose noise is looked for."""


def fields_of(diffusion: Diffusion) -> dict[str, Any]:
  """Returns the fields of a diffusion, to make another of."""
  return {field.name: getattr(diffusion, field.name) for field in dataclasses.fields(Diffusion)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored(Diffusion):
  """Draws images that agree with degraded ones; they are given, with `MEASURED`, `KNOWN` and labels.

  The other conditions are observed of the degraded image, as in training of an image, but for captions, which
  are given too. A VAE's image of a degraded one has its faults, above all its holes: a few times it takes the
  place of what is not known.

  Attributes:
    degradation: of the images.
    fill_rounds: how often what is not known is filled from the VAE's image, before conditions are observed.
    is_held: x0_hat agrees with the data in every step; else the conditions alone say what they are.
    level_scale: of white noise in pixels, where it is brought into the space.
  """

  degradation: Degradation
  fill_rounds: int
  is_held: bool
  level_scale: float = 1.0

  makers = ()  # no other stage's sample has a part in it

  def observe(self, read: Read, batch: Batch, x: Image, key: jax.Array | None = None) -> Given:
    """Returns nothing: it is the degraded image that is looked at, and that is given."""
    del read, batch, x, key
    return {}

  def draw(self, read: Read, keys: base.SampleKeys, indices: Int[Array, ' batch']) -> Given:
    """Returns the noise at the start."""
    drawn = super().draw(read, keys, indices)
    return {base.NOISE: drawn[base.NOISE]}

  def agree(self, x: Image, given: Given) -> Image:
    """Returns images that agree with the data."""
    return self.degradation.agree(x, given[MEASURED], given[KNOWN])

  def seen(self, read: Read, given: Given) -> Given:
    """Returns what the conditions see in the degraded images, complete."""
    own = {name: given[name] for name in (DEGRADED, KNOWN)}

    def conditions_of(x: Image) -> Given:
      return self.conditions.complete(read, {**self.conditions.observe(read, given, x, None), **own})

    x = given[DEGRADED]
    for _ in range(self.fill_rounds if self.degradation.is_linear else 0):
      image = conditions_of(x)
      if IMAGE not in image:
        break
      x = jnp.clip(self.agree(image[IMAGE], given), -1.0, 1.0)
    return conditions_of(x)

  def sample(self, read: Read, given: Given, keys: base.SampleKeys) -> dict[str, Image]:
    """Returns what the conditions show, and {'x0': images that agree with the data}."""
    seen = self.seen(read, given)
    given = {**given, **seen}
    return {**self.conditions.shown(given), **self.space.decode(read, self.maps(read, given, keys))}

  def maps(self, read: Read, given: Given, keys: base.SampleKeys) -> LatentMap:
    """Returns maps whose images agree with the data; noise is removed from where the noisy image is."""
    values = self.conditions.values(read, given)
    denoise, t_start = self.sampler_denoiser(read, values), self.settings['t_start']
    # a table is of all pixels: those that are held, and have no error of the network, get less noise too
    steps = functools.partial(self.steps, change=self.change(read))
    if not self.is_held:
      return steps(denoise, self.initial(read, given), keys.sampler, t_start)
    if not self.degradation.is_linear:
      schedule = self.denoiser.schedule
      t_start = restoration.time_of_level(schedule, self.level_scale * self.degradation.noise_std)
      y = float(schedule.alpha(t_start)) * self.space.encode(read, given[DEGRADED], None)
      return steps(denoise, y, keys.sampler, t_start)

    def agree(y: LatentMap) -> LatentMap:
      return self.space.encode(read, self.agree(self.space.decode_map(read, y), given), None)

    held = restoration.consistent(denoise, agree)
    return steps(held, self.initial(read, given), keys.sampler, t_start)


def restored(
  diffusion: Diffusion, degradation: Degradation, *, fill_rounds: int, is_held: bool, start_at_level: bool
) -> Restored:
  """Returns what restores with a trained diffusion.

  Args:
    diffusion: the trained one.
    degradation: of the images.
    fill_rounds: see `Restored`.
    is_held: see `Restored`.
    start_at_level: noise is removed from its own level on; else noise is left to the conditions.

  Raises:
    UserError: for a space where what is linear in pixels is not, or noise of no level of the schedule.
  """
  held = is_held and (degradation.is_linear or start_at_level)
  scale = 1.0
  if held:
    if not diffusion.space.is_isometric:
      raise UserError(
        "restore.method = 'consistent' holds the given pixels in every step, and latents have none: the "
        'degradation does not act there. Choose a stage that diffuses pixels or wavelets with --stages, or '
        "set restore.method = 'condition' for one that reads a degraded or a VAE's image"
      )
    scale = noise_scale(diffusion)
    if not degradation.is_linear:
      restoration.time_of_level(diffusion.denoiser.schedule, scale * degradation.noise_std)
  return Restored(
    **fields_of(diffusion), degradation=degradation, fill_rounds=fill_rounds, is_held=held, level_scale=scale
  )


def noise_scale(diffusion: Diffusion) -> float:
  """Returns the standard deviation that white noise of deviation 1 in pixels has in an isometric space."""
  y = jnp.ones((1, *diffusion.space.shape))
  return float(np.linalg.norm(y) / np.linalg.norm(diffusion.space.decode_map({}, y)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThroughNoise(Diffusion):
  """Draws images again from the noise that DDIM inversion finds for them; each is given as `ORIGINAL`.

  Attributes:
    num_steps: of the inversion, and of the way back.
  """

  num_steps: int

  @property
  def handed(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """The noise x_T, as floats of any size."""
    return {base.NOISE: jax.ShapeDtypeStruct(self.space.shape, jnp.float32)}

  def sample(self, read: Read, given: Given, keys: base.SampleKeys) -> dict[str, Array]:
    """Returns {'noise': x_T, 'x0': the images again}; the noise of samplers has no part in either."""
    given = self.conditions.complete(read, given)
    denoise = self.denoiser.denoise(read, self.conditions.values(read, given))
    y0 = self.space.encode(read, given[ORIGINAL], None)
    noise, back = inversion.round_trip(
      denoise, self.denoiser.schedule, y0, keys.sampler, num_steps=self.num_steps, grid=self.settings['grid']
    )
    return {base.NOISE: noise, **self.space.decode(read, back)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inverted(Diffusion):
  """Finds the noise of images by DDIM inversion, and hands it over as samples are given it.

  Each image is given as `ORIGINAL`.

  Attributes:
    num_steps: of the inversion.
  """

  num_steps: int

  draws_images = False
  makers = ()  # what an image is made on is given

  @property
  def handed(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """The noise that samples start from, as floats of any size."""
    return {base.NOISE: jax.ShapeDtypeStruct(self.space.shape, jnp.float32)}

  def sample(self, read: Read, given: Given, keys: base.SampleKeys) -> dict[str, Array]:
    """Returns {'noise': x_T / `sample.temperature`}, which DDIM without noise brings back to the images."""
    del keys
    given = self.conditions.complete(read, given)
    denoise = self.denoiser.denoise(read, self.conditions.values(read, given))
    y0 = self.space.encode(read, given[ORIGINAL], None)
    settings = {'num_steps': self.num_steps, 'grid': self.settings['grid']}
    x_T = inversion.invert(denoise, self.denoiser.schedule, y0, **settings)
    return {base.NOISE: x_T / self.settings['temperature']}


def inverted(diffusion: Diffusion, num_steps: int) -> Inverted:
  """Returns what finds the noise of images; raises UserError where samples read none."""
  need_noise(diffusion)
  return Inverted(**fields_of(diffusion), num_steps=num_steps)


def need_noise(diffusion: Diffusion) -> None:
  """Raises UserError for a diffusion whose samples multiply the noise that they are given by 0."""
  if not diffusion.settings['temperature']:
    raise UserError(
      'sample.temperature is 0: samples start from no noise, so that none brings an image back. Set it to '
      'another value, such as 1, where the noise of an image is looked for'
    )


def through_noise(diffusion: Diffusion, num_steps: int) -> ThroughNoise:
  """Returns what draws images again through their noise."""
  return ThroughNoise(**fields_of(diffusion), num_steps=num_steps)
