"""Where a diffusion works: one file per space."""

from ml_collections import ConfigDict

from vaediff import checks
from vaediff.errors import UserError
from vaediff.spaces.base import Space
from vaediff.spaces.latents import latent_space
from vaediff.spaces.pixels import Pixels
from vaediff.spaces.wavelets import Wavelets

SPACES = ('pixel', 'wavelet', 'latent')
FACTOR = 'space_factor'
"""The field of a section that makes the images of its stage smaller than the data."""


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
  factor = section[FACTOR] if FACTOR in section else 1
  if size % factor or (factor > 1 and section.space != 'pixel'):
    raise UserError(
      f'{FACTOR} is {factor}: it must divide data.image_size = {size}, and be 1 but for space = pixel, got '
      f'space = {section.space}'
    )
  if section.space == 'pixel':
    return Pixels(shape=(size // factor, size // factor, channels), factor=factor)
  if section.space == 'wavelet':
    if size % 2:
      raise UserError(f'space = wavelet halves the image: data.image_size must be even, got {size}')
    return Wavelets(shape=(size // 2, size // 2, 4 * channels))
  return latent_space(config, stage, bounded=bounded)
