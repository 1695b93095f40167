"""A diffusion whose network is quantized, with the noise of its sampler lessened by that of the network.

The network corrects the mean of its own output, by the table `correction` among its parameters; this is what
the sampler has to do with the same table (PTQD: He et al. 2023, 2305.10657). It is in y, so for both
formulations, and it changes nothing where the sampler adds no noise.
"""

import dataclasses
import functools

from vaediff.diffusion import noise_correction
from vaediff.experiments import base
from vaediff.experiments.diffusion import Diffusion
from vaediff.experiments.restored import fields_of
from vaediff.models.quantized import CORRECTION
from vaediff.types import Given, LatentMap, Read


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corrected(Diffusion):
  """Draws with less noise than its sampler would add.

  Attributes:
    direction: what is not added is kept of the state's own noise, as the published code does.
  """

  direction: bool = False

  def maps(self, read: Read, given: Given, keys: base.SampleKeys) -> LatentMap:
    """Returns maps of the space after the sampler's steps; those of `Diffusion.maps` for one in floats."""
    if CORRECTION not in read[self.denoiser.network]:
      return super().maps(read, given, keys)
    values, denoiser = self.conditions.values(read, given), self.denoiser
    table = read[denoiser.network][CORRECTION]
    std = functools.partial(noise_correction.std_of_x0, table, denoiser.prediction, denoiser.schedule)
    return self.steps(
      self.reading(read, values),
      self.initial(values, given),
      keys.sampler,
      self.settings['t_start'],
      change=noise_correction.less_noise(denoiser.schedule, std, direction=self.direction),
    )


def corrected(diffusion: Diffusion, *, direction: bool = False) -> Corrected:
  """Returns a diffusion that draws with the correction among its network's parameters."""
  return Corrected(**fields_of(diffusion), direction=direction)
