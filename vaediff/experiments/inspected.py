"""A trained stage, looked into: guided by a weight that is given, what stands beside, the noise of an image.

Nothing is trained here: whoever has opened a stage draws with one of these in place of its experiment.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vaediff.conditions.base import Conditions
from vaediff.conditions.weight import WEIGHT, FreeWeight
from vaediff.diffusion import inversion
from vaediff.experiments import base
from vaediff.experiments.diffusion import Diffusion
from vaediff.experiments.quantized import replaced
from vaediff.experiments.restored import ORIGINAL, fields_of, need_noise
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
class Beside(Diffusion):
  """Draws what the conditions show, such as a VAE's image of z, and nothing of the network."""

  def sample(self, read: Read, given: Given, keys: base.SampleKeys) -> dict[str, Image]:
    """Returns what stands beside a sample; {} where the conditions show nothing."""
    del keys
    return self.conditions.shown(self.conditions.complete(read, given))


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseOf(Diffusion):
  """Finds the noise that images are made of, by DDIM inversion; each is given as `ORIGINAL`.

  With what the conditions see in the images, so that x_T holds the rest.
  """

  @property
  def handed(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """The noise, as it is."""
    return {base.NOISE: jax.ShapeDtypeStruct(self.space.shape, jnp.float32)}

  def sample(self, read: Read, given: Given, keys: base.SampleKeys) -> dict[str, Image]:
    """Returns {'noise': x_T}; nothing is drawn."""
    del keys
    given = self.conditions.complete(read, given)
    denoise = self.denoiser.denoise(read, self.conditions.values(read, given))
    y0 = self.space.encode(read, given[ORIGINAL], None)
    settings = self.settings
    noise = inversion.invert(
      denoise, self.denoiser.schedule, y0, num_steps=settings['num_steps'], grid=settings['grid']
    )
    return {base.NOISE: noise / settings['temperature']}


def beside(diffusion: Diffusion) -> Beside:
  """Returns what draws that which stands beside a diffusion's samples."""
  return Beside(**fields_of(diffusion))


def noise_of(diffusion: Diffusion) -> NoiseOf:
  """Returns what finds the noise of images; raises UserError where samples read none."""
  need_noise(diffusion)
  return NoiseOf(**fields_of(diffusion))
