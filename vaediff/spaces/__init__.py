"""Where a diffusion works: one file per space."""

from ml_collections import ConfigDict

from vaediff.errors import UserError
from vaediff.spaces.base import Space
from vaediff.spaces.latents import latent_space
from vaediff.spaces.pixels import Pixels
from vaediff.spaces.wavelets import Wavelets

SPACES = ('pixel', 'wavelet', 'latent')


def make_space(config: ConfigDict, stage: str) -> Space:
  """Returns the space of `config.<stage>.space`.

  Raises:
    UserError: for a value that is not allowed, or values that contradict each other.
  """
  section, size, channels = config[stage], config.data.image_size, config.data.channels
  if section.space not in SPACES:
    raise UserError(f'space is {section.space!r}; valid: {", ".join(SPACES)}')
  if section.space == 'pixel':
    return Pixels(shape=(size, size, channels))
  if section.space == 'wavelet':
    if size % 2:
      raise UserError(f'space = wavelet halves the image: data.image_size must be even, got {size}')
    return Wavelets(shape=(size // 2, size // 2, 4 * channels))
  return latent_space(config, stage)
