"""What the sampler of a quantized diffusion does about the error of its network: it adds less noise.

The network corrects the mean of its own output, by the table `correction` among its parameters; this is what
the sampler has to do with the same table (PTQD: He et al. 2023, 2305.10657). It is in y, so for both
formulations, and it changes nothing where the sampler adds no noise.
"""

import dataclasses
import functools

from vaediff.diffusion import noise_correction
from vaediff.diffusion.samplers import Change
from vaediff.experiments.denoiser import Denoiser
from vaediff.models.quantized import CORRECTION
from vaediff.types import Read


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseCorrection:
  """Less noise than a sampler would add.

  Attributes:
    direction: what is not added is kept of the state's own noise, as the published code does.
  """

  direction: bool = False

  def change(self, read: Read, denoiser: Denoiser) -> Change | None:
    """Returns what a sampler's table becomes by that of the denoiser's network; None for one in floats."""
    if CORRECTION not in read[denoiser.network]:
      return None
    table = read[denoiser.network][CORRECTION]
    std = functools.partial(noise_correction.std_of_x0, table, denoiser.prediction, denoiser.schedule)
    return noise_correction.less_noise(denoiser.schedule, std, direction=self.direction)
