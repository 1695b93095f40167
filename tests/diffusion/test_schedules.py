"""Schedules against their published tables and formulas, and in float32 against float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.diffusion import schedules
from vaediff.errors import UserError

ALL = [schedules.LinearBeta(), schedules.LinearBeta(train_steps=7), schedules.Cosine()]


def test_linear_beta_marginal_by_recursion():
  """Mean and variance of y_i = sqrt(1 - beta_i) y_{i-1} + sqrt(beta_i) n, from y_0 = x0."""
  schedule = schedules.LinearBeta()
  mean, variance = 1.0, 0.0
  for i in range(1, 1001):
    beta = 1e-4 + (0.02 - 1e-4) * (i - 1) / 999
    mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
    assert abs(schedule.alpha(i / 1000) - mean) < 1e-12
    assert abs(schedule.sigma(i / 1000) ** 2 - variance) < 1e-12
    assert schedule.beta((i - 1) / 1000, i / 1000) == pytest.approx(beta, rel=1e-9)


def test_linear_beta_published_values():
  schedule = schedules.LinearBeta()
  assert schedule.alpha(0.0) == 1.0
  assert schedule.sigma(0.0) == 0.0
  assert schedule.logsnr(0.0) == np.inf
  assert schedule.alpha(1.0) == pytest.approx(0.00635, abs=5e-6)  # sqrt(4.04e-5)
  assert schedule.alpha(0.5) == pytest.approx(0.28, abs=5e-3)


def test_linear_beta_is_log_linear_between_points():
  schedule = schedules.LinearBeta()
  ends = schedule.log_alpha_bar(np.array([0.499, 0.5]))
  assert schedule.log_alpha_bar(0.49925) == pytest.approx(0.75 * ends[0] + 0.25 * ends[1], rel=1e-12)


def test_cosine_is_a_cosine_with_bounded_logsnr():
  schedule = schedules.Cosine()
  t = np.linspace(0.05, 0.95, 19)
  np.testing.assert_allclose(schedule.alpha(t), np.cos(np.pi * t / 2), atol=1e-4)
  assert schedule.logsnr(0.0) == pytest.approx(20, rel=1e-9)
  assert schedule.logsnr(1.0) == pytest.approx(-20, rel=1e-9)
  b = math.atan(math.exp(-10))
  a = math.atan(math.exp(10)) - b
  np.testing.assert_allclose(schedule.logsnr(t), -2 * np.log(np.tan(a * t + b)), atol=1e-12)


def test_cosine_unequal_bounds():
  schedule = schedules.Cosine(logsnr_min=-8.0, logsnr_max=12.0)
  assert schedule.logsnr(0.0) == pytest.approx(12, rel=1e-9)
  assert schedule.logsnr(1.0) == pytest.approx(-8, rel=1e-9)


@pytest.mark.parametrize('schedule', ALL)
def test_identities(schedule):
  t = np.linspace(0.01, 1.0, 57)
  alpha, sigma = schedule.alpha(t), schedule.sigma(t)
  np.testing.assert_allclose(alpha**2 + sigma**2, 1, atol=1e-12)
  np.testing.assert_allclose(schedule.logsnr(t), 2 * np.log(alpha / sigma), rtol=1e-10, atol=1e-12)
  assert np.all(np.diff(schedule.logsnr(t)) < 0)
  beta = schedule.beta(t[:-1], t[1:])
  # q(y_t | y_s) composed with q(y_s | x0) is q(y_t | x0).
  ratio = alpha[1:] / alpha[:-1]
  np.testing.assert_allclose(ratio**2 * sigma[:-1] ** 2 + beta, sigma[1:] ** 2, atol=1e-12)


@pytest.mark.parametrize('schedule', ALL)
def test_float32_on_device_is_accurate_at_both_ends(schedule):
  t = np.array([1e-3, 2e-3, 0.1, 0.5, 0.9, 0.998, 0.999, 1.0], np.float32)
  on_device = {
    name: np.asarray(jax.jit(getattr(schedule, name))(jnp.asarray(t)))
    for name in ('alpha', 'sigma', 'logsnr')
  }
  for name in ('alpha', 'sigma'):
    np.testing.assert_allclose(on_device[name], getattr(schedule, name)(t), rtol=3e-6)
  np.testing.assert_allclose(on_device['logsnr'], schedule.logsnr(t), rtol=2e-6, atol=1e-5)
  assert on_device['alpha'].dtype == np.float32


def test_sigma_does_not_cancel_in_float32():
  """1 - alpha^2 in float32 would be wrong in the second digit here."""
  schedule = schedules.LinearBeta()
  t = jnp.array([1e-6], jnp.float32)  # log alpha_bar = -1e-3 * 1.00005e-4
  expected = math.sqrt(-math.expm1(math.log1p(-1e-4) * 1e-3))
  assert float(schedule.sigma(t)[0]) == pytest.approx(expected, rel=1e-6)


def test_sample_time_on_a_table_covers_exactly_the_table(key):
  t = np.asarray(schedules.sample_time(schedules.LinearBeta(train_steps=4), key, 4000))
  values, counts = np.unique(t, return_counts=True)
  np.testing.assert_array_equal(values, [0.25, 0.5, 0.75, 1.0])
  assert np.all(abs(counts - 1000) < 5 * math.sqrt(750))


def test_sample_time_continuous_is_uniform(key):
  t = np.sort(np.asarray(schedules.sample_time(schedules.Cosine(), key, 4000)))
  assert t[0] > 0
  assert t[-1] <= 1
  # Kolmogorov-Smirnov distance; 2 / sqrt(n) is exceeded with probability below 1e-3.
  assert np.max(abs(t - np.arange(1, 4001) / 4000)) < 2 / math.sqrt(4000)


def test_make_schedule():
  assert schedules.make_schedule('linear', train_steps=10) == schedules.LinearBeta(train_steps=10)
  assert schedules.make_schedule('cosine').train_steps == 0
  for name in schedules.SCHEDULES:
    assert isinstance(schedules.make_schedule(name), schedules.Schedule)
  with pytest.raises(UserError, match=r"schedule\.name .*'cosine', 'iddpm_cosine', 'linear'.*'sigmoid'"):
    schedules.make_schedule('sigmoid')
  with pytest.raises(UserError, match=r'schedule\.beta_min is not an option.*logsnr_min'):
    schedules.make_schedule('cosine', beta_min=0.1)


@pytest.mark.parametrize(
  'name, options, message',
  [
    ('linear', {'train_steps': 0}, r'train_steps must be >= 1.*got 0'),
    ('linear', {'beta_min': 0.5, 'beta_max': 0.1}, r'beta_min=0.5, beta_max=0.1'),
    ('linear', {'beta_max': 1.0}, r'beta_max=1.0'),
    ('cosine', {'logsnr_min': 5.0, 'logsnr_max': 5.0}, r'logsnr_min=5.0'),
    ('cosine', {'train_steps': -1}, r'train_steps must be >= 0.*got -1'),
  ],
)
def test_bad_options(name, options, message):
  with pytest.raises(UserError, match=message):
    schedules.make_schedule(name, **options)


@pytest.mark.parametrize(
  ('train_steps', 'expected'),
  [
    (1000, {1: 4.12842248e-5, 2: 4.61417527e-5, 501: 0.00315569144, 999: 0.749999393, 1000: 0.999}),
    (4000, {1: 9.86581881e-6}),
  ],
)
def test_betas_of_iddpm_cosine(train_steps, expected):
  betas = schedules.IddpmCosine(train_steps=train_steps).betas()
  for i, beta in expected.items():
    assert betas[i - 1] == pytest.approx(beta, rel=2e-9)
  assert np.sum(betas == schedules.IddpmCosine.LARGEST_BETA) == 1


def test_alpha_bar_of_iddpm_cosine():
  schedule = schedules.make_schedule('iddpm_cosine')
  assert np.exp(schedule.log_alpha_bar(0.501)) == pytest.approx(0.492285, abs=5e-7)
  assert float(schedule.alpha(jnp.float32(0.501))) == pytest.approx(np.sqrt(0.492285), abs=1e-6)
  with pytest.raises(UserError, match='train_steps must be >= 1 for iddpm_cosine, got 0'):
    schedules.IddpmCosine(train_steps=0)


def test_betas_of_latent_diffusion():
  betas = schedules.make_schedule('sqrt_linear').betas()
  np.testing.assert_allclose(betas[[0, -1]], [0.0015, 0.0195], rtol=1e-12)
  np.testing.assert_allclose(np.diff(np.sqrt(betas), 2), 0, atol=1e-15)


def test_schedules_are_hashable_static_arguments():
  alpha = jax.jit(lambda schedule, t: schedule.alpha(t), static_argnums=0)
  assert float(alpha(schedules.LinearBeta(), jnp.ones(1))[0]) == pytest.approx(0.00635, abs=5e-6)
