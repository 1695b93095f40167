"""A sampler that adds less noise, by the table among a quantized network's parameters."""

import dataclasses
import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff import experiments
from vaediff.diffusion.restoration import Degradation
from vaediff.experiments import restored
from vaediff.experiments.corrected import NoiseCorrection
from vaediff.models.functional import Model
from vaediff.run import draw

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Halves(Model):
  """A network that says half of the state that it reads, and leaves its table to the sampler."""

  def apply(self, params, x_t, t, values, drop, key_dropout=None):
    return 0.5 * x_t


@pytest.fixture(scope='module')
def parts():
  config = importlib.import_module('configs.digits').get_config('formulation2,debug')
  config.refiner.sample.update({'sampler': 'ddpm', 'num_steps': 4, 'clip': 'none', 'variance': 'small'})
  experiment = experiments.build(config, 'refiner').diffusion
  model = experiment.denoiser.model
  model = Halves(module=model.module, inputs=model.inputs)
  return dataclasses.replace(experiment, denoiser=dataclasses.replace(experiment.denoiser, model=model))


def corrected(experiment, direction=False):
  return dataclasses.replace(experiment, noise_correction=NoiseCorrection(direction=direction))


def maps(experiment, std, x0_vae=0.0):
  keys = draw.image_keys(0, jnp.arange(2))
  noise = jax.vmap(lambda key: jax.random.normal(key, (8, 8, 1)))(keys.noise)
  table = {'times': jnp.linspace(1, 0.25, 4), 'std': jnp.full(4, std)}
  image = jnp.full((2, 8, 8, 1), x0_vae)
  given = {'noise': noise, 'x0_vae': image, 'measured': image, 'known': jnp.zeros_like(image)}
  return jax.jit(experiment.maps)({'denoiser': {'correction': table}}, given, keys)


def test_no_error_draws_the_same(parts):
  plain = maps(parts, 0.0)
  np.testing.assert_array_equal(maps(corrected(parts), 0.0), plain)
  np.testing.assert_array_equal(maps(corrected(parts, direction=True), 0.0), plain)


def test_the_error_is_taken_out_of_the_noise(parts):
  """Less of it in the samples the larger the error is; none where the sampler adds none."""
  spread = [float(jnp.std(maps(corrected(parts), std) - maps(corrected(parts), 9.0))) for std in (0, 0.2, 9)]
  assert spread[0] > spread[1] > 0.01 and spread[2] == 0
  settings = {**parts.settings, 'sampler': 'ddim', 'eta': 0.0}
  ddim = dataclasses.replace(parts, settings=settings)
  np.testing.assert_array_equal(maps(corrected(ddim), 9.0), maps(ddim, 0.0))


@pytest.mark.parametrize('is_held', [False, True])
def test_what_restores_takes_the_same_out(parts, is_held):
  """Of an image of which nothing is known, the samples are those of the stage."""
  one = Degradation(task='inpaint', factor=2, noise_std=0.2, hole_fraction=1.0)
  how = {'fill_rounds': 0, 'is_held': is_held, 'start_at_level': True}
  drawn = restored.restored(corrected(parts), one, **how)
  wanted = maps(corrected(parts), 9.0)
  np.testing.assert_allclose(maps(drawn, 9.0), wanted, atol=1e-6)
  assert float(jnp.std(wanted - maps(parts, 9.0))) > 0.02
