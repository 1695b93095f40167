"""Relaxed codes: the values of the papers' formulas in double precision, limits, gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.models import relaxed_codes

LOGITS = jnp.array([2.0, 1.0, 0.0, -1.0])
NOISE = jnp.array([0.3, -0.2, 1.1, 0.05])


@pytest.mark.parametrize(
  ('logits', 'nats'),
  [
    ((0.0, 0.0, 0.0, 0.0), 0.0),
    ((1.0, 0.0, 0.0, 0.0), 0.1179928669),
    ((2.0, 1.0, 0.0, -1.0), 0.4387573971),  # the other way round it is 0.5538953374
    ((100.0, *[0.0] * 511), 6.238324625),
    ((100.0, *[0.0] * 8191), 9.010913347),
  ],
)
def test_kl_is_that_of_the_codes_from_uniform_ones(logits, nats):
  found = relaxed_codes.kl_to_uniform(jnp.array([[logits]]))
  assert found.shape == (1, 1)
  np.testing.assert_allclose(found[0, 0], nats, atol=2e-6)


@pytest.mark.parametrize(
  ('tau', 'weights'),
  [
    (1.0, (0.639754916, 0.142748617, 0.192690478, 0.024805990)),
    (0.5, (0.875650255, 0.043596059, 0.079437199, 0.001316487)),
  ],
)
def test_weights_at_a_temperature(tau, weights):
  np.testing.assert_allclose(relaxed_codes.relax(LOGITS, NOISE, tau), weights, atol=1e-6)


@pytest.mark.parametrize('tau', [1e-6, 1e-3])
def test_a_cold_relaxation_is_one_code_and_finite(tau):
  value, gradient = jax.value_and_grad(lambda x: relaxed_codes.relax(x * 100, NOISE, tau)[0])(LOGITS)
  assert value == 1.0
  assert np.all(np.isfinite(gradient))
  half = relaxed_codes.relax(LOGITS.astype(jnp.bfloat16), NOISE, tau)
  assert half.dtype == jnp.float32


def test_straight_through_is_hard_forwards_and_soft_backwards():
  soft, back = jax.vjp(lambda x: relaxed_codes.relax(x, NOISE, 1.0), LOGITS)
  hard, hard_back = jax.vjp(
    lambda x: relaxed_codes.straight_through(relaxed_codes.relax(x, NOISE, 1.0)), LOGITS
  )
  np.testing.assert_array_equal(hard, (1, 0, 0, 0))
  assert 0.6 < float(soft[0]) < 0.7
  np.testing.assert_array_equal(back(jnp.arange(4.0))[0], hard_back(jnp.arange(4.0))[0])


def test_ids_are_the_first_of_the_largest_and_mixtures_of_one_hot_weights_are_codes(key):
  logits = jnp.array([[[0.0, 3.0, 3.0]], [[1.0, 0.0, -1.0]]])
  ids = relaxed_codes.most_likely(logits)
  np.testing.assert_array_equal(ids, [[1], [0]])
  assert ids.dtype == jnp.int32
  codes = jax.random.normal(key, (3, 5))
  mixed = relaxed_codes.mix(jax.nn.one_hot(ids, 3), codes)
  np.testing.assert_allclose(mixed, codes[ids], rtol=1e-6)


def test_noise_is_finite_and_of_a_gumbel_distribution(key):
  noise = np.asarray(relaxed_codes.gumbel(key, (200_000,)), np.float64)
  assert noise.dtype == np.float64 and np.all(np.isfinite(noise))
  assert abs(noise.mean() - np.euler_gamma) < 0.01
  assert abs(noise.var() - math.pi**2 / 6) < 0.02


@pytest.mark.parametrize(
  ('step', 'tau'),
  [(0, 1), (37_500, 0.862706), (75_000, 0.53125), (112_500, 0.199794), (150_000, 0.0625), (10**6, 0.0625)],
)
def test_the_temperature_falls_by_half_a_cosine(step, tau):
  found = relaxed_codes.temperature(jnp.int32(step), 1.0, 1 / 16, 150_000)
  np.testing.assert_allclose(found, tau, atol=1e-6)


def test_no_steps_of_a_schedule_are_its_end():
  assert relaxed_codes.temperature(0, 1.0, 0.25, 0) == 0.25
  assert relaxed_codes.warmed_up(0, 6.6, 0) == np.float32(6.6)
  warmed = [float(relaxed_codes.warmed_up(step, 2.0, 5000)) for step in (0, 2500, 5000, 9000)]
  assert warmed == [0.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize(
  ('x', 'mu', 'log_b', 'nats'),
  [
    (0.5, 0.0, 0.0, -0.6931472),
    (0.0, 0.0, 0.0, 0.4824261),
    (1.0, 2.0, -1.0, -2.1786864),
    (0.25, -0.5, -2.0, -0.3012972),
  ],
)
def test_logit_laplace(x, mu, log_b, nats):
  args = (jnp.full((1, 1, 1, 1), value) for value in (2 * x - 1, mu, log_b))
  found = relaxed_codes.logit_laplace_nll(*args, 0.1)
  np.testing.assert_allclose(found.item(), nats, atol=2e-6)


def test_logit_laplace_is_a_density_of_the_mapped_pixel():
  """Its integral over x' in (0, 1), by the substitution of the logit, is 1."""
  logits = jnp.linspace(-12.0, 12.0, 20_001)
  mapped = jax.nn.sigmoid(logits)
  x = (mapped - 0.1) / 0.4 - 1.0  # so that its x' is `mapped`, with a margin of 0.1
  x = x.reshape(1, 1, -1, 1)
  args = (x, jnp.full_like(x, 0.7), jnp.full_like(x, -1.0))
  density = jnp.exp(-relaxed_codes.logit_laplace_nll(*args, 0.1)).ravel()
  total = jnp.trapezoid(density * mapped * (1 - mapped), logits)
  np.testing.assert_allclose(total, 1.0, atol=1e-3)


@pytest.mark.parametrize('margin', [0.1, 0.2])
def test_pixels_are_mapped_there_and_back(margin):
  x = jnp.linspace(-1.0, 1.0, 11).reshape(1, 1, 11, 1)
  mapped = relaxed_codes.map_pixels(x, margin)
  np.testing.assert_allclose(mapped[0, 0, jnp.array([0, -1]), 0], (margin, 1 - margin), atol=1e-6)
  again = relaxed_codes.image_of(jnp.log(mapped) - jnp.log1p(-mapped), margin)
  np.testing.assert_allclose(again, x, atol=1e-5)


@pytest.mark.parametrize(
  ('log_b', 'sign', 'slope'), [(-4.0, 1, 1), (-4.0, -1, -1), (-9.0, 1, 0), (-9.0, -1, -1), (2.0, 1, 1)]
)
def test_the_floor_of_the_scale_lets_it_rise_and_not_fall(log_b, sign, slope):
  def loss(value):
    return sign * relaxed_codes.floored(jnp.full((1, 1, 1, 1), value), -5.0).sum()

  value, found = jax.value_and_grad(loss)(log_b)
  assert (value, found) == (sign * max(log_b, -5.0), slope)
