"""Adversarial losses against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.diffusion import adversarial
from vaediff.errors import UserError


def test_losses_are_log_likelihoods():
  real, fake = jnp.array([-1.5, 0.0, 2.0]), jnp.array([0.3, -4.0, 1.0])
  sigmoid = lambda x: 1 / (1 + np.exp(-np.asarray(x, np.float64)))  # noqa: E731
  np.testing.assert_allclose(
    adversarial.discriminator_loss(real, fake), -np.log(sigmoid(real)) - np.log(1 - sigmoid(fake)), rtol=1e-5
  )
  np.testing.assert_allclose(adversarial.generator_loss(fake), -np.log(sigmoid(fake)), rtol=1e-5)
  np.testing.assert_allclose(adversarial.hinge_discriminator_loss(real, fake), [1.9, 0.5, 1.0], rtol=1e-6)


def test_r1_is_the_squared_gradient_of_the_first_argument_alone():
  a, b = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 2))

  def discriminate(x, other):
    return jnp.sum(jnp.sin(x) * other + other**2, axis=(1, 2, 3))

  expected = np.sum((np.cos(a) * np.asarray(b)) ** 2, axis=(1, 2, 3))
  np.testing.assert_allclose(adversarial.r1(lambda x: discriminate(x, b), a), expected, rtol=1e-5)
  # the penalty's own slope: none where the discriminator reads the second argument only
  alone = jax.grad(
    lambda b: jnp.sum(adversarial.r1(lambda x: jnp.sum(b**2, axis=(1, 2, 3)) + 0 * x[:, 0, 0, 0], a))
  )
  np.testing.assert_array_equal(alone(b), np.zeros(b.shape))


def test_weighted_learning_table():
  for epoch, weight in {
    0: 0.9975, 250: 0.989, 500: 0.9526, 750: 0.8176, 950: 0.574, 1000: 0.5, 1250: 0.182, 1500: 0.047,
    1750: 0.011, 2000: 0.0025,
  }.items():  # fmt: skip
    value = adversarial.reconstruction_weight('weighted_learning', jnp.float32(epoch / 2000))
    assert float(value) == pytest.approx(weight, abs=6e-4)


def test_other_weights():
  fraction = jnp.float32(0.25)
  values = [
    float(adversarial.reconstruction_weight(kind, fraction)) for kind in ('none', 'constant', 'linear')
  ]
  assert values == [0.0, 1.0, 0.75]
  with pytest.raises(UserError, match="'sigmoid'; valid: none, constant, linear, weighted_learning"):
    adversarial.reconstruction_weight('sigmoid', fraction)


def test_adaptive_weight_is_a_clamped_ratio_without_gradient():
  a, b = jnp.full((2, 2), 3.0), jnp.full((2, 2), 1.5)
  assert float(adversarial.adaptive_weight(a, b)) == pytest.approx(2.0, rel=1e-4)
  assert float(adversarial.adaptive_weight(a, jnp.zeros((2, 2)))) == 1e4
  five, two = jnp.float32([3, 4]), jnp.float32([0, 2])
  assert float(adversarial.adaptive_weight(five, two)) == pytest.approx(2.49987501, rel=1e-6)
  assert float(jnp.abs(jax.grad(lambda a: adversarial.adaptive_weight(a, b))(a)).max()) == 0.0
