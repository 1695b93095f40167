"""Marginals, posteriors (against Bayes' rule on the joint Gaussian) and conversions."""

import itertools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.diffusion import gaussian, schedules
from vaediff.errors import UserError

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import formulation2  # noqa: E402

LINEAR = schedules.LinearBeta()
COSINE = schedules.Cosine()
BETAS = np.linspace(1e-4, 0.02, 1000)


def joint_of_chain(first: int, last: int, x0: float, x0_vae: float):
  """Means and covariance of (x_first, x_last) given x0, by walking the chain of Formulation 2.

  x_1 = a_1 x0 + x0_vae + noise, then x_i = a_i x_{i-1} + (1 - a_i) x0_vae + noise, with a_i =
  sqrt(1 - beta_i). x0_vae = 0 is DDPM.
  """
  mean, variance, covariance = x0 + x0_vae, 0.0, 0.0
  mean_first, variance_first = mean, variance
  for i in range(1, last + 1):
    root = np.sqrt(1 - BETAS[i - 1])
    mean = root * mean + (1 - root) * x0_vae
    variance = root**2 * variance + BETAS[i - 1]
    covariance *= root
    if i == first:
      mean_first, variance_first, covariance = mean, variance, variance
  return mean_first, mean, variance_first, variance, covariance


@pytest.mark.parametrize('x0_vae', [0.0, -0.81])
@pytest.mark.parametrize('pair', [(1, 2), (2, 3), (9, 10), (499, 500), (999, 1000), (250, 700)])
def test_posterior_is_bayes_rule(pair, x0_vae):
  first, last = pair
  x0, x_t = 0.37, 1.3
  mean_s, mean_t, variance_s, variance_t, covariance = joint_of_chain(first, last, x0, x0_vae)
  expected_mean = mean_s + covariance / variance_t * (x_t - mean_t)
  expected_variance = variance_s - covariance**2 / variance_t
  g0, g1, variance = gaussian.posterior_coefficients(first / 1000, last / 1000, LINEAR)
  assert g0 * x0 + g1 * x_t + (1 - g1) * x0_vae == pytest.approx(expected_mean, abs=1e-12)
  assert variance == pytest.approx(expected_variance, abs=1e-12)

  arrays = [jnp.full((2, 3), value) for value in (x0, x_t, x0_vae)]
  s, t = jnp.full(2, first / 1000), jnp.full(2, last / 1000)
  mean2, variance2 = formulation2.posterior(*arrays, s, t, LINEAR)
  np.testing.assert_allclose(mean2, expected_mean, atol=2e-5)
  np.testing.assert_allclose(variance2, expected_variance, rtol=2e-4)
  mean1, variance1 = gaussian.posterior(arrays[0], arrays[1] - arrays[2], s, t, LINEAR)
  np.testing.assert_allclose(mean1 + x0_vae, expected_mean, atol=2e-5)
  np.testing.assert_array_equal(variance1, variance2)


def test_posterior_at_the_first_step_is_a_point_mass():
  assert gaussian.posterior_coefficients(0.0, 0.001, LINEAR) == (1.0, 0.0, 0.0)
  x0, x_t, x0_vae = jnp.full((1, 2), 0.25), jnp.full((1, 2), 1.5), jnp.full((1, 2), -0.5)
  s, t = jnp.zeros(1), jnp.full(1, 0.001)
  mean, variance = gaussian.posterior(x0, x_t - x0_vae, s, t, LINEAR)
  np.testing.assert_allclose(mean, 0.25, rtol=1e-6)
  np.testing.assert_array_equal(variance, 0)
  mean, variance = formulation2.posterior(x0, x_t, x0_vae, s, t, LINEAR)
  np.testing.assert_allclose(mean, 0.25 - 0.5, rtol=1e-6)
  np.testing.assert_array_equal(variance, 0)


@pytest.mark.parametrize(
  'i, kappa, tolerance',
  [(1, 1.0, 0), (2, 0.54529, 5e-6), (500, 0.0058933, 5e-8), (1000, 0.0100513, 5e-8)],
)
def test_kappa_of_formulation2(i, kappa, tolerance):
  """The coefficient of x0_vae, found from the posterior mean itself by moving x0_vae alone."""
  _, g1, _ = gaussian.posterior_coefficients((i - 1) / 1000, i / 1000, LINEAR)
  assert abs(1 - g1 - kappa) <= tolerance
  zero, one = jnp.zeros((1, 1)), jnp.ones((1, 1))
  s, t = jnp.full(1, (i - 1) / 1000), jnp.full(1, i / 1000)
  mean, _ = formulation2.posterior(zero, zero, one, s, t, LINEAR)
  assert float(mean[0, 0]) == pytest.approx(kappa, abs=5e-6)


def test_q_sample_takes_one_time_per_example(key):
  key_x0, key_eps = jax.random.split(key)
  x0 = jax.random.normal(key_x0, (3, 4, 4, 2))
  eps = jax.random.normal(key_eps, (3, 4, 4, 2))
  t = jnp.array([0.001, 0.5, 1.0])
  y = np.asarray(gaussian.q_sample(x0, eps, t, LINEAR))
  np.testing.assert_allclose(y[0], np.sqrt(1 - 1e-4) * x0[0] + 0.01 * eps[0], atol=1e-6)
  alpha_bar = np.prod(1 - BETAS[:500])
  expected = np.sqrt(alpha_bar) * x0[1] + np.sqrt(1 - alpha_bar) * eps[1]
  np.testing.assert_allclose(y[1], expected, atol=1e-6)
  np.testing.assert_allclose(y[2], eps[2], atol=0.03)


CONVERTERS = {'x0': gaussian.to_x0, 'eps': gaussian.to_eps, 'v': gaussian.to_v}


@pytest.mark.parametrize('schedule', [LINEAR, COSINE])
@pytest.mark.parametrize('pair', itertools.product(CONVERTERS, CONVERTERS))
def test_conversions_agree_with_the_definitions(schedule, pair, key):
  """From each target to each other one, and back; x0 and eps are what made y_t."""
  source, destination = pair
  key_x0, key_eps = jax.random.split(key)
  x0 = jax.random.uniform(key_x0, (5, 2, 2, 3), minval=-1)
  eps = jax.random.normal(key_eps, (5, 2, 2, 3))
  t = jnp.array([0.1, 0.3, 0.5, 0.7, 0.9])
  y = gaussian.q_sample(x0, eps, t, schedule)
  truth = {'x0': np.asarray(x0), 'eps': np.asarray(eps)}
  alpha = schedule.alpha(np.asarray(t))[:, None, None, None]
  sigma = schedule.sigma(np.asarray(t))[:, None, None, None]
  truth['v'] = alpha * truth['eps'] - sigma * truth['x0']
  for name, value in truth.items():
    np.testing.assert_allclose(gaussian.target(name, x0, eps, t, schedule), value, atol=1e-6)
  output = gaussian.target(source, x0, eps, t, schedule)
  there = CONVERTERS[destination](source, output, y, t, schedule)
  # The worst factor here is 1 / alpha at t = 0.9 of the linear table, 61.
  np.testing.assert_allclose(there, truth[destination], atol=3e-5)
  back = CONVERTERS[source](destination, there, y, t, schedule)
  np.testing.assert_allclose(back, truth[source], atol=3e-5)


@pytest.mark.parametrize('schedule', [LINEAR, COSINE])
def test_v_is_safe_in_float32_at_both_ends(schedule, key):
  """v -> (x0, eps) loses only a few float32 roundings at t = 0.001 and 1, where 1/alpha is 157."""
  key_x0, key_eps = jax.random.split(key)
  x0 = jax.random.uniform(key_x0, (2, 64), minval=-1)
  eps = jax.random.normal(key_eps, (2, 64))
  t = jnp.array([0.001, 1.0])
  y = gaussian.q_sample(x0, eps, t, schedule)
  v = gaussian.target('v', x0, eps, t, schedule)
  np.testing.assert_allclose(gaussian.to_x0('v', v, y, t, schedule), x0, atol=2e-6)
  np.testing.assert_allclose(gaussian.to_eps('v', v, y, t, schedule), eps, atol=2e-6)


def test_unknown_prediction():
  x, t = jnp.zeros((1, 2)), jnp.ones(1)
  message = r"prediction must be one of \['x0', 'eps', 'v'\], got 'score'"
  with pytest.raises(UserError, match=message):
    gaussian.target('score', x, x, t, LINEAR)
  for converter in CONVERTERS.values():
    with pytest.raises(UserError, match=message):
      converter('score', x, x, t, LINEAR)
