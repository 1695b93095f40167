"""Losses against numerical integration, plain means and the definition of their weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.diffusion import gaussian, losses, schedules
from vaediff.errors import UserError

LINEAR = schedules.LinearBeta()
COSINE = schedules.Cosine()
SNR_WEIGHTS = {
  'constant': lambda snr: 1.0,
  'snr': lambda snr: snr,
  'truncated_snr': lambda snr: max(snr, 1.0),
  'min_snr': lambda snr: min(snr, 5.0),
  'v': lambda snr: snr + 1,
}


def test_kl_by_numerical_integration():
  mean, logvar = np.array([0.3, -1.2, 0.0]), np.array([-2.0, 0.7, 0.0])
  z = np.linspace(-15, 15, 60001)[:, None]
  log_q = -0.5 * ((z - mean) ** 2 / np.exp(logvar) + logvar + np.log(2 * np.pi))
  log_p = -0.5 * (z**2 + np.log(2 * np.pi))
  expected = np.sum(np.exp(log_q) * (log_q - log_p)) * (z[1, 0] - z[0, 0])
  kl = losses.kl_to_standard_normal(jnp.asarray(mean)[None], jnp.asarray(logvar)[None])
  assert kl.shape == (1,)
  assert float(kl[0]) == pytest.approx(expected, rel=1e-5)


def test_kl_is_zero_at_the_prior_and_per_example():
  kl = losses.kl_to_standard_normal(jnp.array([[0.0, 0.0], [3.0, 4.0]]), jnp.zeros((2, 2)))
  np.testing.assert_allclose(kl, [0.0, 12.5], rtol=1e-6)


def test_squared_error_counts_pixels_in_zero_one():
  black, white = -jnp.ones((2, 3, 4, 2)), jnp.ones((2, 3, 4, 2))
  np.testing.assert_allclose(losses.squared_error_sum(black, white), [24, 24])


@pytest.fixture
def example(key):
  keys = jax.random.split(key, 3)
  x0 = jax.random.uniform(keys[0], (4, 3, 3, 2), minval=-1)
  eps = jax.random.normal(keys[1], (4, 3, 3, 2))
  output = jax.random.normal(keys[2], (4, 3, 3, 2))
  return x0, eps, output, jnp.array([0.05, 0.3, 0.6, 0.9])


@pytest.mark.parametrize('schedule', [LINEAR, COSINE])
@pytest.mark.parametrize('weight', SNR_WEIGHTS)
@pytest.mark.parametrize('prediction', gaussian.PREDICTIONS)
def test_weights_are_of_the_x0_error(prediction, weight, schedule, example):
  x0, eps, output, t = example
  y = gaussian.q_sample(x0, eps, t, schedule)
  x0_hat = np.asarray(gaussian.to_x0(prediction, output, y, t, schedule), np.float64)
  t64 = np.asarray(t, np.float64)
  snr = (schedule.alpha(t64) / schedule.sigma(t64)) ** 2
  expected = [SNR_WEIGHTS[weight](snr[i]) * np.mean((x0_hat[i] - np.asarray(x0[i])) ** 2) for i in range(4)]
  loss = losses.denoising_loss(prediction, output, x0, eps, t, schedule, weight)
  np.testing.assert_allclose(loss, expected, rtol=1e-4)


@pytest.mark.parametrize('schedule', [LINEAR, COSINE])
@pytest.mark.parametrize('prediction, weight', [('eps', 'snr'), ('v', 'v'), ('x0', 'constant')])
def test_natural_weights_are_exactly_the_plain_mean_squared_error(prediction, weight, schedule, example):
  x0, eps, output, _ = example
  t = jnp.array([0.001, 0.01, 0.99, 1.0])
  plain = jnp.mean((output - gaussian.target(prediction, x0, eps, t, schedule)) ** 2, axis=(1, 2, 3))
  loss = losses.denoising_loss(prediction, output, x0, eps, t, schedule, weight)
  np.testing.assert_array_equal(loss, plain)


@pytest.mark.parametrize('schedule', [LINEAR, COSINE])
@pytest.mark.parametrize('weight', SNR_WEIGHTS)
@pytest.mark.parametrize('prediction', gaussian.PREDICTIONS)
def test_finite_with_finite_gradients_at_the_ends(prediction, weight, schedule, example):
  x0, eps, output, _ = example
  t = jnp.array([0.001, 0.001, 1.0, 1.0])

  def total(output):
    return jnp.sum(losses.denoising_loss(prediction, output, x0, eps, t, schedule, weight))

  value, gradient = jax.value_and_grad(total)(output)
  assert np.isfinite(value)
  assert np.all(np.isfinite(gradient))


def test_weight_values_at_the_ends_of_the_linear_table():
  """alpha_bar_1 = 1 - 1e-4, so SNR is 9999; alpha_bar_1000 = 4.04e-5."""
  logsnr = LINEAR.logsnr(jnp.array([0.001, 1.0]))
  expected = {
    'constant': [1, 1],
    'snr': [9999, 4.036e-5],
    'truncated_snr': [9999, 1],
    'min_snr': [5, 4.036e-5],
    'v': [10000, 1.0000404],
  }
  for weight, values in expected.items():
    np.testing.assert_allclose(losses.prediction_weight('x0', weight, logsnr), values, rtol=1e-3)


def test_unknown_names():
  x, t = jnp.zeros((1, 2)), jnp.ones(1)
  with pytest.raises(UserError, match=r"loss\.weight must be one of .*'snr'.*got 'p2'"):
    losses.denoising_loss('eps', x, x, x, t, LINEAR, 'p2')
  with pytest.raises(UserError, match=r"prediction must be one of .*got 'noise'"):
    losses.denoising_loss('noise', x, x, x, t, LINEAR, 'snr')
