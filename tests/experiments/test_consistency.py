"""Consistency tuning as a stage: its start, its pairs, and the map it learns where that is known."""

import dataclasses
import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vaediff import experiments
from vaediff.diffusion import samplers, schedules
from vaediff.errors import UserError
from vaediff.machine import sharding
from vaediff.optim import Optimizer
from vaediff.run import students

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import toy_denoiser  # noqa: E402


def get(variant='consistency,debug', **changes):
  config = importlib.import_module('configs.digits').get_config(variant)
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return students.resolve(config)


def build(variant='consistency,debug', **changes):
  return experiments.build(get(variant, **changes), 'consistency')


def test_it_is_sampled_in_two_steps_with_new_noise_between():
  experiment = build()
  assert experiment.num_function_evaluations == 2
  assert experiment.student.settings['sampler'] == 'renoise'
  assert experiment.student.settings['grid'] == 'quadratic'


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'refiner.diffusion.prediction': 'x0'}, "'refiner' predicts x0"),
    ({'consistency.loss.q': 1.0}, 'loss.q must be > 1, got 1.0'),
    ({'consistency.loss.huber': -1.0}, 'loss.huber must be >= 0'),
    ({'consistency.teacher.stage': 'vae'}, "teacher.stage is 'vae'"),
  ],
)
def test_bad_settings_are_named(changes, message):
  with pytest.raises(UserError, match=message):
    build(**changes)


@pytest.mark.slow
def test_small_levels_are_taught_the_image_itself():
  """At q = 2 and the smallest levels r is 0: the loss is that of denoising, of a given noise."""
  experiment = build(**{'consistency.loss.q': 2.0, 'consistency.loss.level_mean': -20.0})
  x0 = jnp.full((4, 8, 8, 1), 0.25)
  state = experiment.init(jax.random.key(0))
  read = {'denoiser': state.networks['denoiser'].params}
  values = {'x0_vae': jnp.zeros_like(x0)}
  losses = experiment.example_losses(read, {}, x0, values, jax.random.key(1), jnp.int32(0), training=True)
  # an untrained network says v = 0, so x0_hat = alpha y with y at the first time of the table
  schedule, first = experiment.student.denoiser.schedule, np.array(1 / 1000)
  alpha, sigma = schedule.alpha(first), schedule.sigma(first)
  key_eps = jax.random.split(jax.random.key(1))[1]
  eps = np.asarray(jax.random.normal(key_eps, x0.shape), np.float64)
  error = alpha * (alpha * 0.25 + sigma * eps) - 0.25
  expected = ((alpha / sigma) ** 2 + 4) * np.sqrt((error**2).sum(axis=(1, 2, 3)))
  np.testing.assert_allclose(losses, expected, rtol=1e-3)


def test_a_consistency_model_of_gaussian_data_maps_noise_to_data():
  """Trajectories of x0 ~ N(0, s^2) keep y over its deviation: f(y) = s y / sqrt(alpha^2 s^2 + sigma^2)."""
  std, schedule = 0.5, schedules.make_schedule('linear')
  experiment = build('unconditional,consistency,debug')
  optimizer = Optimizer(
    transform=optax.adam(optax.linear_schedule(0.01, 0.0, 6000)), ema_decay=0.0, ema_warmup=False
  )
  student, teacher = toy_denoiser.diffusion(experiment.student, schedule, optimizer)
  levels = {'level_mean': 3.0, 'level_std': 2.5, 'q': 2.0, 'double_every_steps': 1000, 'huber': 4.0}
  experiment = dataclasses.replace(experiment, student=student, teacher=teacher, **levels)
  frozen = {'teacher': toy_denoiser.exact(schedule, std)}

  @jax.jit
  def train(state):
    def body(state, k):
      batch = toy_denoiser.batch(std, k)
      state, _ = experiment.train_step(state, frozen, batch, jax.random.fold_in(jax.random.key(3), k))
      return state, None

    return jax.lax.scan(body, state, jnp.arange(6000))[0]

  state = jax.jit(lambda: experiment.start(experiment.init(jax.random.key(0)), frozen))()
  params = train(state).networks['denoiser'].params
  y, keys = jax.random.normal(jax.random.key(1), (4, 8, 8, 1)), jax.random.split(jax.random.key(0), 4)

  @jax.jit
  def one_step(params):
    denoise = student.denoiser.denoise({'denoiser': params}, {})
    return samplers.SAMPLERS['renoise'](denoise, schedule, y, keys, num_steps=1)

  before, after = (float(jnp.abs(one_step(p) / (std * y) - 1).max()) for p in (frozen['teacher'], params))
  assert before > 0.9  # E[x0 | pure noise] = 0
  assert after < 0.15


@pytest.mark.slow
def test_one_device_equals_eight():
  config = get()
  experiment = experiments.build(config, 'consistency')
  # not random networks, whose keys have biases without a gradient: Adam makes steps of their rounding
  teacher, vae = (experiment.frozen[name].model for name in ('teacher', 'vae'))
  frozen = {'teacher': teacher.init(jax.random.key(5)), 'vae': vae.init(jax.random.key(6)), 'prior': {}}
  image = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), np.uint8)

  def two_updates(mesh):
    state = experiment.start(experiment.init(jax.random.key(7)), frozen)
    step = jax.jit(experiment.train_step)
    batch = {'image': jax.device_put(image, sharding.batch_sharding(mesh))}
    given = sharding.replicate((state, frozen), mesh)
    state, frozen_there = given
    for k in range(2):
      state, _ = step(state, frozen_there, batch, sharding.replicate(jax.random.key(8 + k), mesh))
    return state.networks['denoiser'].params

  one = two_updates(sharding.make_mesh(config.mesh, jax.devices()[:1]))
  eight = two_updates(sharding.make_mesh(config.mesh))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, eight)


def test_an_eps_teacher_is_first_distilled_to_v():
  config = get('distill,consistency', **{'refiner.diffusion.prediction': 'eps', 'distill.from_steps': 2})
  assert config.stages == ('vae', 'refiner', 'distill_v', 'distill_1', 'consistency_v', 'consistency')
  experiment = experiments.build(config, 'consistency')
  assert experiment.teacher_source.stage == 'consistency_v' and experiment.teacher.prediction == 'v'
