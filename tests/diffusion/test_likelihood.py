"""The variational bound where the likelihood is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import norm

from vaediff.diffusion import gaussian, likelihood, schedules
from vaediff.errors import UserError


def to_unit(values):
  return jnp.asarray(values, jnp.float32) / 127.5 - 1


def test_uniform_bytes_have_eight_bits():
  dimensions = 3 * 32 * 32
  assert likelihood.bits_per_dimension(dimensions * np.log(256), dimensions) == pytest.approx(8, rel=1e-12)


@pytest.mark.parametrize(('mean', 'scale'), [(0.0, 0.3), (0.9, 0.01), (-1.2, 0.5), (0.1, 20.0)])
def test_the_bins_share_all_mass(mean, scale):
  x = to_unit(np.arange(256))
  log_mass = likelihood.log_discretized_gaussian(x, jnp.full(256, mean), jnp.full(256, scale))
  assert float(jnp.exp(log_mass).sum()) == pytest.approx(1, abs=2e-4)
  edges = np.concatenate([[-np.inf], (np.arange(255) + 0.5) / 127.5 - 1, [np.inf]])
  expected = np.diff(np.asarray(norm.cdf(edges, mean, scale), np.float64))
  seen = expected > 1e-4
  np.testing.assert_allclose(np.exp(log_mass)[seen], expected[seen], rtol=2e-2)


def test_mass_far_from_the_mean_is_finite():
  log_mass = likelihood.log_discretized_gaussian(to_unit([0, 255, 128]), jnp.zeros(3), jnp.full(3, 1e-2))
  assert np.isfinite(log_mass).all() and float(log_mass[0]) < -1000


STD = 0.25


def gaussian_bytes(count, size=8):
  values = np.random.default_rng(0).normal(0, STD, (count, size, size, 1))
  return np.clip(np.round((values + 1) * 127.5), 0, 255)


def entropy_in_bits():
  edges = np.concatenate([[-np.inf], (np.arange(255) + 0.5) / 127.5 - 1, [np.inf]])
  mass = np.diff(np.asarray(norm.cdf(edges, 0.0, STD), np.float64))
  return -np.sum(mass * np.log2(np.maximum(mass, 1e-300)))


def bound_in_bits(num_times, schedule, count=64, error=0.0, variance='large'):
  """With the best denoiser of Gaussian data, x0_hat = y alpha s^2 / (alpha^2 s^2 + sigma^2)."""

  def denoise(y, t):
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    return gain[:, None, None, None] * y + error

  x0 = to_unit(gaussian_bytes(count))
  keys = jax.random.split(jax.random.key(0), count)
  terms = likelihood.bound_terms(denoise, schedule, x0, keys, num_times, variance)
  return {k: likelihood.bits_per_dimension(np.asarray(v, np.float64), 64) for k, v in terms.items()}


def test_the_bound_of_the_best_denoiser_is_just_above_the_entropy():
  """Per-pixel Gaussian data: no model is below the entropy; the steps lose a few hundredths of a bit."""
  terms = bound_in_bits(999, schedules.LinearBeta())
  total = sum(terms.values())
  slack = 3 * total.std(ddof=1) / np.sqrt(len(total))
  assert entropy_in_bits() - slack < total.mean() < entropy_in_bits() + 0.08
  assert 0 < terms['prior'].mean() < 1e-4


@pytest.mark.slow
def test_small_variances_cost_at_least_0_3_bits_and_a_worse_denoiser_0_1():
  total = sum(bound_in_bits(999, schedules.LinearBeta()).values())
  small = sum(bound_in_bits(999, schedules.LinearBeta(), variance='small').values())
  assert total.mean() + 0.3 < small.mean() < total.mean() + 1  # beta_2 is as large as all noise before it
  worse = sum(bound_in_bits(999, schedules.LinearBeta(), error=0.05).values())
  assert worse.mean() > total.mean() + 0.1


@pytest.mark.slow
def test_a_few_times_estimate_the_whole_sum():
  whole = bound_in_bits(999, schedules.LinearBeta())['steps']
  few = bound_in_bits(20, schedules.LinearBeta(), count=256)['steps']
  assert abs(few.mean() - whole.mean()) < 4 * few.std(ddof=1) / 16


def test_every_index_is_visited_once():
  """With x0_hat = x0 off by one, each term is g0^2 / (2 variance) times the number of pixels."""
  schedule = schedules.LinearBeta(train_steps=10, beta_max=0.3)
  x0 = to_unit(gaussian_bytes(2))
  keys = jax.random.split(jax.random.key(0), 2)

  def denoise(y, t):
    return x0 + 1

  got = likelihood.bound_terms(denoise, schedule, x0, keys, 9, 'small')['steps']
  i = np.arange(2, 11)
  g0, _, variance = gaussian.posterior_coefficients((i - 1) / 10, i / 10, schedule)
  np.testing.assert_allclose(got, np.full(2, 64 * np.sum(g0**2 / (2 * variance))), rtol=1e-3)


def test_a_continuous_schedule_has_no_such_sum():
  with pytest.raises(UserError, match='this schedule is continuous'):
    bound_in_bits(5, schedules.Cosine())
  with pytest.raises(UserError, match=r'num_bound_times must be in 1..9, got 10'):
    bound_in_bits(10, schedules.LinearBeta(train_steps=10))
