"""The noise of images, handed over as it is: DDIM without noise brings it back, in closed form."""

import dataclasses
import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff import experiments
from vaediff.diffusion import schedules
from vaediff.errors import UserError
from vaediff.experiments import restored
from vaediff.experiments.base import sampling_keys

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[2])]
import toy_denoiser  # noqa: E402

STD = 0.5


@pytest.fixture(scope='module')
def toy():
  """A diffusion of Gaussian images and its exact network, sampled by DDIM."""
  config = importlib.import_module('configs.digits').get_config('unconditional,debug')
  config.refiner.sample.update({'sampler': 'ddim', 'num_steps': 400, 'clip': 'none'})
  like = experiments.build(config, 'refiner')
  schedule = schedules.make_schedule('cosine')
  diffusion, _ = toy_denoiser.diffusion(like, schedule, like.optimizer)
  return diffusion, {'denoiser': toy_denoiser.exact(schedule, STD)}


def test_without_noise_the_image_comes_back_and_with_noise_another_of_the_same_law(toy):
  diffusion, read = toy
  finder = restored.inverted(diffusion, 400)
  x0 = STD * jax.random.normal(jax.random.key(0), (64, 8, 8, 1))
  keys = sampling_keys(jax.random.split(jax.random.key(1), 64))
  assert not finder.draws_images and finder.makers == () and finder.handed['noise'].shape == (8, 8, 1)
  noise = jax.jit(lambda x: finder.sample(read, {restored.ORIGINAL: x}, keys))(x0)['noise']
  # the flow of a Gaussian scales: x_T = x0 * (deviation at 1) / (deviation at t_low), which is 1 / STD
  np.testing.assert_allclose(noise, x0 / STD, atol=0.1)
  assert float(jnp.std(noise)) == pytest.approx(1.0, abs=0.05)
  again = {}
  for eta in (0.0, 1.0):
    chosen = dataclasses.replace(diffusion, settings={**diffusion.settings, 'eta': eta})
    again[eta] = jax.jit(lambda y, chosen=chosen: chosen.maps(read, {'noise': y}, keys))(noise)
  assert float(jnp.sqrt(jnp.mean((again[0.0] - x0) ** 2))) < 0.03
  assert float(jnp.std(again[1.0])) == pytest.approx(STD, abs=0.03)
  assert float(jnp.sqrt(jnp.mean((again[1.0] - x0) ** 2))) > 0.4


def test_noise_is_handed_over_as_samples_of_a_temperature_read_it(toy):
  diffusion, read = toy
  cold = dataclasses.replace(diffusion, settings={**diffusion.settings, 'temperature': 0.8})
  finder = restored.inverted(cold, 400)
  x0 = STD * jax.random.normal(jax.random.key(0), (8, 8, 8, 1))
  keys = sampling_keys(jax.random.split(jax.random.key(1), 8))

  def again(x):
    return cold.maps(read, finder.sample(read, {restored.ORIGINAL: x}, keys), keys)

  assert float(jnp.sqrt(jnp.mean((jax.jit(again)(x0) - x0) ** 2))) < 0.03


def test_no_noise_is_looked_for_where_samples_start_from_none(toy):
  diffusion, _ = toy
  none = dataclasses.replace(diffusion, settings={**diffusion.settings, 'temperature': 0.0})
  with pytest.raises(UserError, match='sample.temperature is 0'):
    restored.inverted(none, 4)
