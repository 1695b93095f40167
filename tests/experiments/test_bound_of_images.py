"""The bound of a diffusion of images: of x0_hat as the network says it, clipped, without guidance."""

import dataclasses
import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vaediff import experiments
from vaediff.diffusion import gaussian, schedules
from vaediff.models.functional import Model

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent.parent))
SCHEDULE = schedules.LinearBeta(train_steps=10, beta_max=0.3)


class Far(nn.Module):
  """x0_hat is 3 on the left and 0.25 on the right, and 0 where the label is dropped."""

  def __call__(self, x_t, t, values={}, drop={}, *, deterministic=True):  # noqa: B006
    left = jnp.arange(8).reshape(1, 1, 8, 1) < 4
    x0_hat = jnp.broadcast_to(jnp.where(left, 3.0, 0.25), x_t.shape)
    return jnp.where(drop['label'].reshape(-1, 1, 1, 1), 0.0, x0_hat) if 'label' in drop else x0_hat


def test_a_bound_is_of_the_clipped_prediction_without_guidance():
  config = importlib.import_module('configs.digits').get_config('label,unconditional,debug')
  config.refiner.sample.guidance_weight = 1.0
  built = experiments.build(config, 'refiner')
  assert built.denoiser.calls_per_step == 2
  denoiser = dataclasses.replace(
    built.denoiser, model=Model(module=Far(), inputs=()), schedule=SCHEDULE, prediction='x0'
  )
  settings = {**built.settings, 'variance': 'small', 'bound_steps': 0}
  experiment = dataclasses.replace(built, denoiser=denoiser, settings=settings)
  image = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
  batch = {'image': image, 'label': np.array([1, 2, 3], np.int32)}
  bound = jax.jit(lambda batch, keys: experiment.bound({'denoiser': {}}, batch, keys, 9))
  found = bound(batch, jax.random.split(jax.random.key(0), 3))
  assert set(found) == {'label', 'prior', 'steps', 'decoder'}
  x0 = image / 127.5 - 1
  x0_hat = np.where(np.arange(8) < 4, 1.0, 0.25).reshape(1, 1, 8, 1)
  i = np.arange(2, 11)
  g0, _, variance = gaussian.posterior_coefficients((i - 1) / 10, i / 10, SCHEDULE)
  steps = np.sum((x0 - x0_hat) ** 2, axis=(1, 2, 3)) * np.sum(g0**2 / (2 * variance))
  np.testing.assert_allclose(found['steps'], steps, rtol=1e-3)
  np.testing.assert_allclose(found['label'], np.log(10), rtol=1e-5)


class Learned(nn.Module):
  """`Far`, and a fraction of the log variance of 0 on the left and 1 on the right, as numbers in [-1, 1]."""

  def __call__(self, x_t, t, values={}, drop={}, *, deterministic=True):  # noqa: B006
    left = jnp.arange(8).reshape(1, 1, 8, 1) < 4
    says = [jnp.where(left, *ends) for ends in ((3.0, 0.25), (-1.0, 1.0))]
    return jnp.concatenate([jnp.broadcast_to(one, x_t.shape) for one in says], axis=-1)


def test_the_bound_of_a_learned_variance_takes_each_pixels_own_and_the_clipped_prediction():
  config = importlib.import_module('configs.digits').get_config('unconditional,learned_variance,debug')
  built = experiments.build(config, 'refiner')
  assert built.settings['variance'] == 'learned'
  denoiser = dataclasses.replace(
    built.denoiser, model=Model(module=Learned(), inputs=()), schedule=SCHEDULE, prediction='x0'
  )
  experiment = dataclasses.replace(built, denoiser=denoiser, settings={**built.settings, 'bound_steps': 0})
  image = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
  bound = jax.jit(lambda batch, keys: experiment.bound({'denoiser': {}}, batch, keys, 9))
  found = bound({'image': image}, jax.random.split(jax.random.key(0), 3))
  i = np.arange(2, 11)
  g0, _, variance = (
    part.reshape(-1, 1, 1, 1, 1)
    for part in gaussian.posterior_coefficients((i - 1) / 10, i / 10, SCHEDULE)
  )
  beta = SCHEDULE.beta((i - 1) / 10, i / 10).reshape(-1, 1, 1, 1, 1)
  left = (np.arange(8) < 4).reshape(1, 1, 8, 1)
  error = image / 127.5 - 1 - np.where(left, 1.0, 0.25)
  own = np.where(left, variance, beta)  # the ends of eq. 15, arXiv:2102.09672
  steps = 0.5 * (np.log(own / variance) + (variance + (g0 * error) ** 2) / own - 1)
  np.testing.assert_allclose(found['steps'], steps.sum(axis=(0, 2, 3, 4)), rtol=1e-3)
