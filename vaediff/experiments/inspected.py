"""A trained stage, looked into: guided by a weight that is given, or what its conditions show, alone.

Nothing is trained here: whoever has opened a stage draws with one of these in place of its experiment.
"""

import dataclasses

from vaediff.conditions.base import Conditions
from vaediff.conditions.weight import WEIGHT, FreeWeight
from vaediff.experiments import base
from vaediff.experiments.diffusion import Diffusion
from vaediff.experiments.quantized import replaced
from vaediff.experiments.restored import fields_of
from vaediff.types import Given, Image, Read


def with_free_weight(experiment: base.Experiment) -> base.Experiment:
  """Returns the experiment whose guidance weight is an input of its samples: one program for all weights.

  Where none is given it is the configured one. As it is where nothing is dropped in training, or where the
  network reads the weight anyway.
  """
  diffusion = experiment.diffusion
  if diffusion is None or not experiment.can_be_guided or WEIGHT in experiment.inputs:
    return experiment
  before = diffusion.denoiser
  free = FreeWeight(weight=float(diffusion.settings['guidance_weight']))
  # the last one, so that the keys of those before it stay
  conditions = Conditions((*before.conditions.each, free))
  return replaced(experiment, before, dataclasses.replace(before, conditions=conditions))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConditionsOnly(Diffusion):
  """Draws what the conditions show, such as a VAE's image of z, and nothing of the network."""

  def sample(self, read: Read, given: Given, keys: base.SampleKeys) -> dict[str, Image]:
    """Returns what stands beside a sample; {} where the conditions show nothing."""
    del keys
    return self.conditions.shown(self.conditions.complete(read, given))


def conditions_only(diffusion: Diffusion) -> ConditionsOnly:
  """Returns what draws that which stands beside a diffusion's samples."""
  return ConditionsOnly(**fields_of(diffusion))
