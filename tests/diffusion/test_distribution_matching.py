"""The direction of distribution matching against Gaussians, whose denoisers and scores are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.diffusion import distribution_matching


def posterior_mean(y, mean, alpha, sigma):
  """E[x0 | y] of x0 ~ N(mean, 1), y = alpha x0 + sigma eps."""
  return mean + alpha / (alpha**2 + sigma**2) * (y - alpha * mean)


def test_the_direction_is_the_difference_of_the_scores_of_two_gaussians():
  """The gradient of KL(N(m', v) || N(m, v)) at every point is (m' - m) / v: towards the data, minus it."""
  alpha, sigma, of_data, of_student = 0.6, 0.8, -0.5, 1.5
  x0 = of_student + jax.random.normal(jax.random.key(0), (32, 4, 4, 1))
  y = alpha * x0 + sigma * jax.random.normal(jax.random.key(1), x0.shape)
  denoised = [posterior_mean(y, mean, alpha, sigma) for mean in (of_data, of_student)]
  found = distribution_matching.direction(x0, *denoised)
  scale = jnp.mean(jnp.abs(x0 - denoised[0]), axis=(1, 2, 3), keepdims=True)
  # score = (alpha E[x0 | y] - y) / sigma^2; at alpha^2 + sigma^2 = 1 both have variance 1
  wanted = alpha * (of_student - of_data) * sigma**2 / alpha / scale
  np.testing.assert_allclose(found, jnp.broadcast_to(wanted, found.shape), rtol=1e-4)


def test_equal_denoisers_leave_an_image_where_it_is():
  x0, same = jnp.ones((2, 3, 3, 1)), jnp.zeros((2, 3, 3, 1))
  assert not np.any(distribution_matching.direction(x0, same, same))
  assert not np.any(distribution_matching.direction(x0, x0, same))  # nothing to scale by


def test_the_gradient_of_the_loss_is_the_direction():
  x0, direction = (jax.random.normal(jax.random.key(k), (3, 2, 2, 1)) for k in range(2))
  grads = jax.grad(lambda x: jnp.sum(distribution_matching.loss(x, direction)))(x0)
  np.testing.assert_allclose(grads, direction / 4, rtol=1e-5)
  value = distribution_matching.loss(x0, direction)
  assert value.shape == (3,) and float(value[0]) == pytest.approx(0.5 * float(jnp.mean(direction[0] ** 2)))
