"""Consistency tuning: pairs close up, the loss against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.diffusion import consistency


def test_pairs_by_hand():
  """q = 2: at tau -> 0 the gap 1 - 1/2 (1 + 8 / 2) is negative, so r = 0; at large tau r = tau / 2."""
  tau = jnp.asarray([1e-3, 100.0])
  np.testing.assert_allclose(consistency.earlier(tau, 2.0, jnp.int32(0)), [0.0, 50.0], atol=1e-4)
  np.testing.assert_allclose(consistency.earlier(tau, 2.0, jnp.int32(3)), [1e-3 * 11 / 16, 93.75], rtol=1e-3)
  r = consistency.earlier(tau, 256.0, jnp.int32(0))
  np.testing.assert_allclose(r, [1e-3 * (1 - 5 / 256), 100 * (1 - 1 / 256)], rtol=1e-4)


@pytest.mark.parametrize('c', [0.0, 0.3])
def test_loss_by_hand(c):
  x0_hat, target = jax.random.normal(jax.random.key(1), (2, 3, 2, 2, 1))
  tau = jnp.asarray([0.1, 1.0, 10.0])
  norms = np.linalg.norm(np.asarray(x0_hat - target, np.float64).reshape(3, -1), axis=1)
  expected = (1 / np.asarray(tau) ** 2 + 4) * (np.sqrt(norms**2 + c**2) - c)
  np.testing.assert_allclose(consistency.loss(x0_hat, target, tau, c), expected, rtol=1e-5)


def test_gradient_is_finite_where_the_two_agree():
  x = jnp.ones((2, 2, 2, 1))
  grad = jax.grad(lambda y: consistency.loss(y, x, jnp.ones(2), 0.0).sum())(x)
  np.testing.assert_array_equal(grad, 0.0)
