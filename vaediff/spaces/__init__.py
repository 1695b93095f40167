"""Where a diffusion works: one file per space."""

from ml_collections import ConfigDict

from vaediff import checks
from vaediff.errors import UserError
from vaediff.spaces.base import Space
from vaediff.spaces.latents import latent_space
from vaediff.spaces.pixels import Pixels
from vaediff.spaces.wavelets import Wavelets

SPACES = ('pixel', 'wavelet', 'latent')


def make_space(config: ConfigDict, stage: str, *, bounded: bool = False) -> Space:
  """Returns the space of `config.<stage>.space`.

  Args:
    config: of the run.
    stage: whose network works in the space.
    bounded: the network's output is in [-1, 1].

  Raises:
    UserError: for a value that is not allowed, or values that contradict each other.
  """
  section, size, channels = config[stage], config.data.image_size, config.data.channels
  checks.check(section, {'space': checks.one_of(SPACES)})
  if section.space == 'pixel':
    return Pixels(shape=(size, size, channels))
  if section.space == 'wavelet':
    if size % 2:
      raise UserError(f'space = wavelet halves the image: data.image_size must be even, got {size}')
    return Wavelets(shape=(size // 2, size // 2, 4 * channels))
  return latent_space(config, stage, bounded=bounded)
