"""Degradations of images, and denoisers that hold what a degraded image says.

A degradation without noise is linear: y = A x. With A+ its pseudo-inverse, P = A+ A is the projection on what
it keeps (its range), and any x becomes one that agrees with y by

    x + A+ (y - A x) = x + A+ y - P x,

what the data say from the data, the rest (the null space of A) from x. Applied to x0_hat in every step of a
sampler it restores without training (Wang et al. 2022, arXiv:2212.00490, eq. 10). Here

    super_resolution: A = mean over f x f pixels, A+ = repeat,
    inpaint: A = the known pixels, A+ = the same with zeros elsewhere,
    colourise: A = mean over channels, A+ = repeat,

so that A+ y is an image. Noise of level s leaves nothing exact: denoising starts at the time whose sigma_t /
alpha_t is s, from alpha_t times the noisy image, which there is a draw of q(y_t | x0).

Imports jax, numpy, `vaediff.errors`, `vaediff.types` and its own room only.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vaediff.diffusion.gaussian import Denoise
from vaediff.diffusion.schedules import Schedule
from vaediff.errors import UserError
from vaediff.types import Image, Keys

TASKS = ('super_resolution', 'inpaint', 'colourise', 'denoise')
HOLES = ('center', 'random')
Mask = Float[Array, 'batch height width 1']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Degradation:
  """What is done to images.

  Attributes:
    task: that undoes it, of `TASKS`.
    factor: super_resolution: side of the blocks of pixels that become one.
    noise_std: denoise: standard deviation, in units of the range [-1, 1].
    hole_fraction: inpaint: side of the square hole over the side of the image.
    hole: inpaint: 'center', or at a 'random' place of each image.
  """

  task: str
  factor: int
  noise_std: float
  hole_fraction: float
  hole: str = 'center'

  @property
  def is_linear(self) -> bool:
    """Whether what it keeps is exact."""
    return self.task != 'denoise'

  def check(self, size: int, channels: int, prefix: str = '') -> None:
    """Raises UserError where images of this size cannot be degraded so; `prefix` names the section."""
    if self.task not in TASKS:
      raise UserError(f'{prefix}task is {self.task!r}; valid: {", ".join(TASKS)}')
    if self.task == 'super_resolution' and (self.factor < 2 or size % self.factor):
      raise UserError(f'{prefix}factor must be >= 2 and divide the image size {size}, got {self.factor}')
    if self.task == 'denoise' and not self.noise_std > 0:
      raise UserError(f'{prefix}noise_std must be > 0, got {self.noise_std}')
    if self.task == 'inpaint' and not 0 < self.hole_fraction < 1:
      raise UserError(f'{prefix}hole_fraction must be in (0, 1), got {self.hole_fraction}')
    if self.task == 'inpaint' and self.hole not in HOLES:
      raise UserError(f'{prefix}hole is {self.hole!r}; valid: {", ".join(HOLES)}')
    if self.task == 'colourise' and channels < 2:
      raise UserError(
        f'{prefix}task = colourise needs images with colours; those of this data set have {channels} channel'
      )

  def known(self, x: Image, keys: Keys) -> Mask:
    """Returns 1 where a pixel is known and 0 in the hole; all 1 where the task has none."""
    count, height, width, _ = x.shape
    if self.task != 'inpaint':
      return jnp.ones((count, height, width, 1), jnp.float32)

    def inside(size: int, key: jax.Array) -> Array:
      side = min(max(1, round(size * self.hole_fraction)), size)
      start = (size - side) // 2
      if self.hole == 'random':
        start = jax.random.randint(key, (), 0, size - side + 1)
      place = jnp.arange(size)
      return (place >= start) & (place < start + side)

    def of_one(key: jax.Array) -> Array:
      key_rows, key_columns = jax.random.split(key)
      hole = inside(height, key_rows)[:, None] & inside(width, key_columns)[None, :]
      return 1.0 - hole[..., None].astype(jnp.float32)

    return jax.vmap(of_one)(keys)

  def project(self, x: Image, known: Mask) -> Image:
    """Returns P x = A+ A x: of x what the degradation keeps.

    Raises:
      ValueError: for noise, which keeps nothing as it is.
    """
    if self.task == 'super_resolution':
      return jnp.repeat(jnp.repeat(self.small(x), self.factor, axis=1), self.factor, axis=2)
    if self.task == 'inpaint':
      return jnp.broadcast_to(known, x.shape) * x
    if self.task == 'colourise':
      return jnp.broadcast_to(x.mean(axis=-1, keepdims=True), x.shape)
    raise ValueError(f'{self.task} has no projection')

  def small(self, x: Image) -> Array:
    """Returns the means over blocks of `factor` x `factor` pixels."""
    count, height, width, channels = x.shape
    blocks = x.reshape(count, height // self.factor, self.factor, width // self.factor, self.factor, channels)
    return blocks.mean(axis=(2, 4))

  def agree(self, x: Image, measured: Image, known: Mask) -> Image:
    """Returns x with what the degradation keeps taken from the data: x + A+ y - P x, for A+ y `measured`."""
    return x + measured - self.project(x, known)

  def degrade(self, x: Image, keys: Keys) -> tuple[Image, Image, Mask]:
    """Returns (degraded image, A+ y, known pixels), each of one image of its key alone.

    The degraded image is one to look at, in [-1, 1]: bilinear in place of A+'s repeated pixels, noise
    clipped as a file clips it. Of noise A+ y is the degraded image itself.
    """
    known = self.known(x, keys)
    if self.task == 'denoise':
      noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)
      noisy = jnp.clip(x + self.noise_std * noise, -1.0, 1.0)
      return noisy, noisy, known
    measured = self.project(x, known)
    if self.task == 'super_resolution':
      return jax.image.resize(self.small(x), x.shape, 'bilinear'), measured, known
    return measured, measured, known


def consistent(
  denoise: Denoise, agree: Callable[[Float[Array, 'batch *shape']], Float[Array, 'batch *shape']]
) -> Denoise:
  """Returns the denoiser whose x0_hat agrees with the data; `agree` makes it so.

  What a denoiser returns behind its x0_hat, as some samplers ask for, stays as it is.
  """

  def held(y, t):
    found = denoise(y, t)
    return (agree(found[0]), *found[1:]) if isinstance(found, tuple) else agree(found)

  return held


def time_of_level(schedule: Schedule, level: float) -> float:
  """Returns the time t at which sigma_t / alpha_t is `level`: 0.0584 for 0.2 and the linear table.

  Raises:
    UserError: for a level that no time of the schedule has.
  """

  def level_at(t: float) -> float:
    return float(np.exp(-0.5 * schedule.logsnr(t)))

  low, high = (1 / schedule.train_steps if schedule.train_steps else 0.0), 1.0
  least, most = level_at(low), level_at(high)
  if not least <= level <= most:
    raise UserError(
      f'the noise to be removed has the level {level:.4g}; this schedule knows levels sigma / alpha from '
      f'{least:.4g} to {most:.4g}'
    )
  for _ in range(60):  # the level increases with t
    middle = 0.5 * (low + high)
    low, high = (low, middle) if level_at(middle) > level else (middle, high)
  return 0.5 * (low + high)
