"""Conditioning augmentation: the level as an input, and what it does to the bias of an earlier stage."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from vaediff import experiments
from vaediff.conditions import prior
from vaediff.conditions.augmentation import Noising
from vaediff.diffusion import samplers
from vaediff.diffusion.schedules import LinearBeta, make_schedule
from vaediff.errors import UserError
from vaediff.models import layers
from vaediff.models.ports import LEVEL_SCALE


def noising(**changes):
  fields = {'of': 'x', 'shape': (2, 2, 1), 'max_level': 0.5, 'level': 0.2, 'droppable': True}
  return Noising(**{**fields, 'schedule': LinearBeta(), **changes})


def test_the_embedding_of_a_level():
  """Of 0.2 with 8 features, cosines first: as the time with that index, 199."""
  got = layers.sinusoidal_embedding(
    LEVEL_SCALE * jnp.float32([0.2]) - 1, 8, sin_first=False, last_frequency_included=False
  )
  wanted = [-0.47163, 0.49719, -0.40703, 0.98026, -0.88180, 0.86764, 0.91341, 0.19769]
  np.testing.assert_allclose(got[0], wanted, atol=2e-5)


@pytest.mark.parametrize(
  ('name', 'level', 'alpha_squared'),
  [
    ('linear', 0.1, 0.897),
    ('linear', 0.2, 0.659),
    ('linear', 0.3, 0.396),
    ('cosine', 0.1, 0.976),
    ('cosine', 0.2, 0.905),
    ('cosine', 0.3, 0.794),
  ],
)
def test_a_level_is_a_time_of_the_schedule(name, level, alpha_squared):
  one = noising(schedule=make_schedule(name))
  value = jnp.ones((1, 2, 2, 1))
  given = {'x_level': jnp.float32([level]), 'x_noise': jnp.zeros((1, 2, 2, 1))}
  np.testing.assert_allclose(one.noised(value, given) ** 2, np.full((1, 2, 2, 1), alpha_squared), atol=6e-4)
  given['x_noise'] = jnp.ones((1, 2, 2, 1))
  np.testing.assert_allclose(
    one.noised(0 * value, given) ** 2, np.full((1, 2, 2, 1), 1 - alpha_squared), atol=6e-4
  )


def test_at_level_0_and_without_a_level_nothing_is_changed():
  one, value = noising(), jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
  noise = jnp.ones((3, 2, 2, 1))
  given = {'x_level': jnp.float32([0.0, 0.3, 0.0]), 'x_noise': noise}
  got = one.noised(value, given)
  np.testing.assert_array_equal(got[0::2], value[0::2])
  assert np.all(got[1] != value[1])
  for part in ({}, {'x_noise': noise}):
    np.testing.assert_array_equal(one.noised(value, part), value)
    np.testing.assert_array_equal(one.levels(part, 3), np.zeros(3))


def test_every_example_has_a_level_of_its_own_in_training():
  drawn = noising().train(jax.random.key(3), 500)
  level = np.asarray(drawn['x_level'])
  assert level.min() >= 0 and level.max() < 0.5 and len(set(level.tolist())) > 490
  assert stats.kstest(level, stats.uniform(0, 0.5).cdf).pvalue > 0.01
  assert abs(float(drawn['x_noise'].std()) - 1) < 0.05


def test_in_sampling_the_level_is_the_same_and_the_noise_that_of_the_image():
  keys = lambda: jax.random.split(jax.random.key(4), 5)
  drawn = noising().draw(keys())
  np.testing.assert_array_equal(drawn['x_level'], np.full(5, np.float32(0.2)))
  np.testing.assert_array_equal(drawn['x_noise'][2], noising().draw(keys()[2:3])['x_noise'][0])
  assert np.any(drawn['x_noise'][0] != drawn['x_noise'][1])


COUNT, A, R, DELTA = 20_000, 0.8, 0.5, 1.0


@pytest.mark.parametrize(('level', 'kept'), [(0.0, 1.0), (0.1, 0.897), (0.2, 0.659), (0.3, 0.396)])
def test_noise_hides_the_bias_of_the_stage_before_and_keeps_the_variance(level, kept):
  """x_lo ~ N(0, 1) and x_hi = a x_lo + r n, with the exact second stage: a bias is left by alpha_s^2.

  p(x_hi | z_s) = N(a alpha_s z_s, a^2 sigma_s^2 + r^2); the first stage draws N(delta, 1).
  """
  schedule, rng = LinearBeta(), np.random.default_rng(0)
  normal = stats.norm.ppf((np.arange(COUNT) + 0.5) / COUNT).astype(np.float32)
  column = lambda: jnp.asarray(rng.permutation(normal)[:, None])
  given = {'x_level': jnp.full(COUNT, level, jnp.float32), 'x_noise': column()}
  z = noising(shape=(1,)).noised(DELTA + column(), given)
  mean = A * float(schedule.alpha(level)) * z
  variance = A**2 * float(schedule.sigma(level)) ** 2 + R**2

  def denoise(y, t):
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    return mean + variance * alpha * (y - alpha * mean) / (alpha**2 * variance + sigma**2)

  keys = jax.random.split(jax.random.key(0), COUNT)
  x = samplers.get_sampler('ddim')(denoise, schedule, column(), keys, num_steps=250, grid='uniform')
  assert float(x.mean()) == pytest.approx(A * kept * DELTA, abs=6e-3)
  assert float(x.var()) == pytest.approx(A**2 + R**2, abs=0.02)


# x0_vae -----------------------------------------------------------------------------------------------


def build(variant='formulation2,guided,debug', **changes):
  config = importlib.import_module('configs.digits').get_config(variant)
  config.update_from_flattened_dict({'refiner.conditions.vae.aug_level': 0.5, **changes})
  return experiments.build(config, 'refiner')


def test_the_shift_is_the_noised_image_for_both_branches_of_guidance():
  """One value, made once: the state, what is concatenated, and the level of every pass agree."""
  denoiser = build().denoiser
  assert list(denoiser.conditions.ports) == ['x0_vae', 'x0_vae_level']
  rng = np.random.default_rng(0)
  x0_vae, noise, y = (jnp.float32(rng.normal(size=(2, 8, 8, 1))) for _ in range(3))
  given = {'x0_vae': x0_vae, 'z': jnp.zeros((2, 16)), 'x0_vae_noise': noise}
  values = denoiser.conditions.values({}, {**given, 'x0_vae_level': jnp.float32([0.0, 0.3])})
  alpha, sigma = (getattr(denoiser.schedule, name)(0.3) for name in ('alpha', 'sigma'))
  np.testing.assert_array_equal(values['x0_vae'][0], x0_vae[0])
  np.testing.assert_allclose(values['x0_vae'][1], alpha * x0_vae[1] + sigma * noise[1], atol=1e-5)
  state, _, read, _ = denoiser.inputs(y, jnp.ones(2), values, {})
  np.testing.assert_array_equal(state, y + values['x0_vae'])
  assert set(read) == {'x0_vae', 'x0_vae_level'}
  drop = denoiser.conditions.without(('vae',), 2)
  assert set(drop) == {'x0_vae', 'x0_vae_level'}
  np.testing.assert_array_equal(denoiser.inputs(y, jnp.ones(2), values, drop)[0], y)


def test_a_start_below_t_1_has_the_noise_of_its_time_alone():
  """alpha_t x0_vae + sigma_t eps of the clean image, whatever the level of what the network reads."""
  experiment = build(**{'refiner.sample.t_start': 0.2, 'refiner.sample.aug_level': 0.3})
  noise = jax.random.normal(jax.random.key(0), (64, 8, 8, 1))
  given = {'x0_vae': jnp.full((64, 8, 8, 1), 0.4), 'z': jnp.zeros((64, 16)), 'noise': noise}
  given |= {'x0_vae_level': jnp.full(64, 0.3), 'x0_vae_noise': jnp.ones((64, 8, 8, 1))}
  alpha, sigma = (getattr(experiment.denoiser.schedule, name)(0.2) for name in ('alpha', 'sigma'))
  np.testing.assert_allclose(experiment.initial({}, given), 0.4 * alpha + sigma * noise, atol=1e-5)


@pytest.mark.slow
def test_levels_are_of_training_and_of_samples_but_not_of_what_is_encoded():
  experiment = build(**{'refiner.sample.aug_level': 0.25})
  conditions = experiment.conditions
  vae = experiment.frozen['vae'].model
  read = {'vae': jax.jit(vae.init)(jax.random.key(0)), 'prior': {}}
  x = jnp.zeros((4, 8, 8, 1))
  assert set(conditions.observe(read, {}, x, None)) == {'z'}
  assert set(conditions.observe(read, {}, x, jax.random.key(1))) == {'z'}
  seen = conditions.observe(read, {}, x, jax.random.key(1), training=True)
  assert set(seen) == {'z', 'x0_vae_level', 'x0_vae_noise'} and len(set(seen['x0_vae_level'].tolist())) == 4
  drawn = conditions.draw(read, jax.random.split(jax.random.key(2), 4), jnp.arange(4))
  assert set(drawn) == set(seen) and drawn['x0_vae_level'].tolist() == [0.25] * 4


def test_without_levels_nothing_is_another():
  """aug_level = 0 has the ports, the inputs and the keys of before."""
  experiment = build(**{'refiner.conditions.vae.aug_level': 0.0})
  assert list(experiment.conditions.ports) == ['x0_vae'] and experiment.max_level == 0
  assert set(experiment.inputs) == {'z', 'x0_vae', 'noise'}
  read = {'vae': None, 'prior': {}}
  keys = lambda: jax.random.split(jax.random.key(2), 3)
  wanted = prior.draw({}, keys(), 16)
  np.testing.assert_array_equal(experiment.conditions.draw(read, keys(), jnp.arange(3))['z'], wanted)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'refiner.sample.aug_level': 0.6},
      r'aug_level is 0.6, outside .* conditions.vae.aug_level = 0.5',
    ),
    ({'refiner.sample.aug_level': -0.1}, r'sample.aug_level must be in \[0, 1\], got -0.1'),
    (
      {'refiner.conditions.vae.aug_level': 0.0, 'refiner.sample.aug_level': 0.1},
      'sample.aug_level is 0.1, but the network reads no level',
    ),
    ({'refiner.diffusion.condition': 'none', 'refiner.diffusion.z_conditioning': True}, 'reads no x0_vae'),
  ],
)
def test_levels_that_cannot_be_are_refused(changes, message):
  with pytest.raises(UserError, match=message):
    build(**changes)
