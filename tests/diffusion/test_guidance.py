"""Guidance: linear at fixed y in every prediction, the right unconditional branch, thresholding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.diffusion import gaussian, guidance, schedules
from vaediff.errors import UserError

LINEAR = schedules.LinearBeta()


def never(y, t):
  raise AssertionError('the unconditional network must not be called')


def test_weight_zero_is_the_conditional_denoiser_and_calls_nothing_else():
  conditional = lambda y, t: 0.5 * y
  denoise = guidance.guided(conditional, never, 0.0)
  y = jnp.ones((2, 3))
  np.testing.assert_array_equal(denoise(y, jnp.ones(2)), 0.5 * y)


def test_weight_minus_one_is_the_unconditional_denoiser():
  denoise = guidance.guided(lambda y, t: 0.5 * y, lambda y, t: 0.25 * y, -1.0)
  np.testing.assert_allclose(denoise(jnp.ones((2, 3)), jnp.ones(2)), 0.25)


@pytest.mark.parametrize('prediction', gaussian.PREDICTIONS)
def test_guiding_x0_is_guiding_the_network_output(prediction, key):
  keys = jax.random.split(key, 3)
  y, out_c, out_u = (jax.random.normal(k, (3, 2, 2, 1)) for k in keys)
  t = jnp.array([0.1, 0.4, 0.7])
  to_x0 = lambda output: gaussian.to_x0(prediction, output, y, t, LINEAR)
  denoise = guidance.guided(lambda y, t: to_x0(out_c), lambda y, t: to_x0(out_u), 1.5)
  expected = to_x0(2.5 * out_c - 1.5 * out_u)
  np.testing.assert_allclose(denoise(y, t), expected, rtol=1e-3, atol=1e-4)


def test_formulation_2_unconditional_branch_reads_y():
  """For x0 ~ N(0, 1), and x0 ~ N(x0_vae, s^2) given x0_vae, both denoisers are known.

  The network reads x_t; given the null condition its shift is zero. Guidance of exact denoisers
  must then be the same function of y in both formulations.
  """
  s2, x0_vae = 0.25, jnp.full((1, 4), 0.8)
  t = jnp.full(1, 0.3)
  alpha, sigma = float(LINEAR.alpha(0.3)), float(LINEAR.sigma(0.3))

  def network(x_t, condition, formulation):
    """The exact denoiser, as a function of what a network of this formulation would read."""
    if condition is None:
      return alpha * x_t
    y = x_t - gaussian.shift(formulation, condition)
    gain = alpha * s2 / (alpha**2 * s2 + sigma**2)
    return condition + gain * (y - alpha * condition)

  def denoiser(formulation):
    conditional = lambda y, t: network(y + gaussian.shift(formulation, x0_vae), x0_vae, formulation)
    return guidance.guided(conditional, lambda y, t: network(y, None, formulation), 2.0)

  y = jnp.linspace(-2, 2, 4)[None]
  gain = alpha * s2 / (alpha**2 * s2 + sigma**2)
  expected = 3 * (0.8 + gain * (np.asarray(y) - alpha * 0.8)) - 2 * alpha * np.asarray(y)
  np.testing.assert_allclose(denoiser(1)(y, t), expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(denoiser(2)(y, t), expected, rtol=1e-5, atol=1e-6)


def test_clip():
  denoise = guidance.clip(lambda y, t: 3 * y)
  y = jnp.array([[-2.0, -0.1, 0.2, 5.0]])
  np.testing.assert_allclose(denoise(y, jnp.ones(1)), [[-1, -0.3, 0.6, 1]], rtol=1e-6)
  denoise = guidance.clip(lambda y, t: y, low=0.0, high=0.1)
  np.testing.assert_allclose(denoise(y, jnp.ones(1)), [[0, 0, 0.1, 0.1]])


def test_threshold_is_per_example_and_leaves_data_range_alone():
  inside = np.linspace(-1, 1, 101)
  outside = np.linspace(-4, 4, 101)
  x0 = jnp.asarray(np.stack([inside, outside]))
  result = guidance.threshold(lambda y, t: y, percentile=100.0)(x0, jnp.ones(2))
  np.testing.assert_allclose(result[0], inside, atol=1e-6)
  np.testing.assert_allclose(result[1], outside / 4, atol=1e-6)
  # The median of |x| over 101 evenly spaced values of [-4, 4] is 2: half is clipped.
  result = guidance.threshold(lambda y, t: y, percentile=50.0)(x0, jnp.ones(2))
  np.testing.assert_allclose(result[1], np.clip(outside / 2, -1, 1), atol=1e-6)


@pytest.mark.parametrize('percentile', [0.0, -1.0, 100.5])
def test_threshold_rejects_bad_percentiles(percentile):
  with pytest.raises(UserError, match=f'got {percentile}'):
    guidance.threshold(lambda y, t: y, percentile=percentile)
