"""Learned variances: the tables of Improved DDPM's interpolation, the terms of its bound, their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.diffusion import gaussian, grids, likelihood, samplers, schedules
from vaediff.errors import UserError

LINEAR = schedules.LinearBeta()
TABLE = likelihood.table_times(LINEAR)
STEPS = likelihood.steps_of(LINEAR, TABLE)
BITS = 1 / np.log(2)


@pytest.mark.parametrize(
  ('t', 'beta', 'posterior', 'log_beta', 'log_posterior', 'at_0', 'at_03', 'at_15'),
  [
    (0, 0.0001, 0, -9.2103404, -9.8167251, -9.5135328, -9.4225750, -9.0587442),
    (1, 0.00011991992, 5.45318766e-5, -9.0286864, -9.8167251, -9.4227058, -9.3044999, -8.8316767),
    (10, 0.000299199199, 0.00025846362, -8.1144010, -8.2607556, -8.1875783, -8.1656251, -8.0778123),
    (100, 0.00209199199, 0.00205455353, -6.1696386, -6.1876967, -6.1786676, -6.1759589, -6.1651240),
    (999, 0.02, 0.0199999835, -3.9120230, -3.9120238, -3.9120234, -3.9120233, -3.9120228),
  ],
)
def test_log_variances(t, beta, posterior, log_beta, log_posterior, at_0, at_03, at_15):
  s, now = np.float64(t) / 1000, (np.float64(t) + 1) / 1000
  np.testing.assert_allclose(LINEAR.beta(s, now), beta, rtol=2e-9)
  np.testing.assert_allclose(gaussian.posterior_coefficients(s, now, LINEAR)[2], posterior, rtol=2e-9, atol=0)
  low, high = (column[::-1][t] for column in gaussian.log_variances(LINEAR, TABLE))
  np.testing.assert_allclose([low, high], [log_posterior, log_beta], atol=1e-7)
  row = likelihood.rows(STEPS, jnp.array([t]), jnp.zeros((1, 1)))
  for v, expected in ((0, at_0), (0.3, at_03), (1.5, at_15)):
    assert low + (v + 1) / 2 * (high - low) == pytest.approx(expected, abs=1e-7)
    assert (row.log_low + (v + 1) / 2 * row.log_range).item() == pytest.approx(expected, abs=2e-6)


def test_a_grid_of_one_step_has_but_one_variance():
  low, high = gaussian.log_variances(LINEAR, np.array([1.0, 0.0]))
  assert low == high == np.log(LINEAR.beta(0.0, 1.0))


@pytest.mark.parametrize(
  ('t', 'v', 'error', 'bits', 'slope'),
  [
    (100, 0.3, 0.01, 0.034749494, -2.373063664e-4),
    (1, -1.0, 0.005, 0.330699934, -0.1303021836),
    (500, 1.0, 0.02, 0.028682189, -1.203428022e-5),
  ],
)
def test_divergence_and_its_gradient(t, v, error, bits, slope):
  """`error` is that of the mean: g0 times that of x0_hat."""
  s, now = np.float64(t) / 1000, (np.float64(t) + 1) / 1000
  of_x0 = error / gaussian.posterior_coefficients(s, now, LINEAR)[0]

  def in_bits(v):
    x0 = jnp.full((1, 1, 1, 1), of_x0, jnp.float32)
    fraction = jnp.full_like(x0, (v + 1) / 2)
    nats = likelihood.learned_term(STEPS, x0, 0 * x0, fraction, jnp.array([t]), of_bytes=True)
    return likelihood.bits_per_dimension(nats, 1)[0]

  value, gradient = jax.value_and_grad(in_bits)(jnp.float32(v))
  assert float(value) == pytest.approx(bits, rel=2e-5)
  # a difference of two nearly equal numbers where Sigma is right
  assert float(gradient) == pytest.approx(slope, rel=2e-4, abs=1e-8)


@pytest.mark.parametrize(
  ('t', 'expected'), [(1, 0.00808718), (100, 0.00646715), (500, 0.01052879), (999, 0.02020346)]
)
def test_error_of_the_mean_for_an_error_of_eps(t, expected):
  s, now = np.float64(t) / 1000, (np.float64(t) + 1) / 1000
  g0 = gaussian.posterior_coefficients(s, now, LINEAR)[0]
  assert g0 * LINEAR.sigma(now) / LINEAR.alpha(now) == pytest.approx(expected, abs=6e-9)


@pytest.mark.parametrize(
  ('x', 'error', 'bits'),
  [
    (100 / 127.5 - 1, 0.0, 1.712846),
    (100 / 127.5 - 1, 0.01, 2.398145),
    (-1.0, 0.0, 0.615886),
    (1.0, -0.02, 4.212641),
  ],
)
def test_bits_of_the_last_step(x, error, bits):
  """The deviation is sqrt(1e-4), the linear table's sqrt(beta_1): fraction 1."""
  x0 = jnp.full((1, 1, 1, 1), x, jnp.float32)
  one = jnp.ones_like(x0)
  nats = likelihood.learned_term(STEPS, x0, x0 + error, one, jnp.array([0]), of_bytes=True)
  assert float(nats[0]) * BITS == pytest.approx(bits, abs=1e-4)
  of_other_data = likelihood.learned_term(STEPS, x0, x0 + error, one, jnp.array([0]), of_bytes=False)
  density = 0.5 * np.log(2 * np.pi * 1e-4) + error**2 / 2e-4
  assert float(of_other_data[0]) == pytest.approx(density, rel=1e-4)


@pytest.mark.slow
def test_each_example_has_the_term_of_its_step():
  rng = np.random.default_rng(0)
  x0 = jnp.float32(rng.integers(0, 256, (4, 2, 2, 1)) / 127.5 - 1)
  x0_hat, fraction = (
    x0 + jnp.float32(0.01 * rng.normal(size=x0.shape)),
    jnp.float32(rng.uniform(size=x0.shape)),
  )
  index = jnp.array([0, 7, 0, 999])
  together = likelihood.learned_term(STEPS, x0, x0_hat, fraction, index, of_bytes=True)
  for i in range(4):
    row = slice(i, i + 1)
    alone = likelihood.learned_term(STEPS, x0[row], x0_hat[row], fraction[row], index[row], of_bytes=True)
    np.testing.assert_allclose(together[i], alone[0], rtol=1e-6)


def test_gradients_are_finite_where_the_network_is_far_off():
  """A fresh network's x0_hat at t = 1 is off by hundreds: neither form of the term may spoil the other."""
  x0 = jnp.zeros((3, 1, 1, 1))

  def total(x0_hat, v):
    return likelihood.learned_term(
      STEPS, x0, x0_hat, (v + 1) / 2, jnp.array([0, 1, 999]), of_bytes=True
    ).sum()

  far = jnp.array([3.0, 40.0, 400.0]).reshape(3, 1, 1, 1)
  for gradient in jax.grad(total, argnums=(0, 1))(far, jnp.zeros_like(far)):
    assert np.all(np.isfinite(gradient))


# The toy: data N(0, s^2), its exact posterior ---------------------------------------------------------


def rms_error(s, t):
  """The deviation of x0 given y_t."""
  alpha, sigma = LINEAR.alpha(t), LINEAR.sigma(t)
  return s * sigma / np.sqrt(alpha**2 * s**2 + sigma**2)


def best_fractions(s, times):
  """f of the variance that makes each step's divergence smallest: beta~ + g0^2 var(x0 | y_t)."""
  low, high = gaussian.log_variances(LINEAR, times)
  g0, _, posterior = gaussian.posterior_coefficients(times[1:], times[:-1], LINEAR)
  wanted = np.log(posterior + g0**2 * rms_error(s, times[:-1]) ** 2)
  span = np.where(high > low, high - low, 1)
  return (wanted - low) / span


def toy_bound(s, variance, times):
  """The sum over all steps but the last in bits per dimension: x0_hat is off by the rms error."""
  steps = likelihood.steps_of(LINEAR, times)
  index = jnp.arange(1, len(times) - 1)
  if variance == 'learned':
    fraction = jnp.asarray(best_fractions(s, times)[::-1][1:].copy(), jnp.float32)
  else:
    fraction = jnp.full(len(index), likelihood.VARIANCES[variance])
  error = jnp.asarray(rms_error(s, steps.t[1:]), jnp.float32)
  row = likelihood.rows(steps, index, error)
  return float(jnp.sum(likelihood.divergence(row, error, fraction))) * BITS


@pytest.mark.parametrize(
  ('s', 'small', 'large', 'learned'),
  [(0.5, 6.302437, 5.645641, 5.644065), (1.0, 7.314525, 6.643827, 6.643827)],
)
def test_toy_bound_of_the_table(s, small, large, learned):
  got = [toy_bound(s, variance, TABLE) for variance in ('small', 'large', 'learned')]
  np.testing.assert_allclose(got, [small, large, learned], atol=5e-5)


@pytest.mark.parametrize(
  ('num_steps', 'small', 'large'), [(25, 151.12, 5.70606), (50, 47.45, 5.67540), (250, 9.33, 5.65038)]
)
def test_toy_bound_of_fewer_steps(num_steps, small, large):
  times = grids.time_grid(LINEAR, 'both_ends', num_steps)
  assert toy_bound(0.5, 'small', times) == pytest.approx(small, abs=6e-3)
  assert toy_bound(0.5, 'large', times) == pytest.approx(large, abs=2e-5)
  assert toy_bound(0.5, 'learned', times) == pytest.approx(5.64407, abs=2e-5)


def test_best_variance_of_the_toy():
  v = 2 * best_fractions(0.5, TABLE)[::-1] - 1
  np.testing.assert_allclose(
    v[[1, 10, 100, 500, 999]], [0.99909, 0.98783, 0.52468, -0.46885, -0.49998], atol=6e-6
  )


@pytest.mark.parametrize(('s', 'expected'), [(0.5, 7.27868e-6), (1.0, 2.91129e-5)])
def test_prior_term_of_the_toy(s, expected):
  """In bits per dimension, of data of variance s^2."""
  x0 = jnp.full((1, 1, 1, 1), s)
  assert float(likelihood.prior_term(x0, LINEAR)[0]) * BITS == pytest.approx(expected, abs=3e-7)


def test_the_bound_over_a_grid_takes_what_the_network_says():
  """bound_terms with a learned fraction is the sum that the toy computes, at any grid; each step once."""
  times = grids.time_grid(LINEAR, 'both_ends', 25)
  s = 0.5
  x0 = jnp.round(jnp.float32(s) * jax.random.normal(jax.random.key(0), (4, 4, 4, 1)) * 127.5) / 127.5
  known, fractions = jnp.asarray(times[:-1][::-1].copy()), jnp.asarray(best_fractions(s, times)[::-1].copy())

  def denoise(y, t):
    off = jnp.interp(t, known, jnp.asarray(rms_error(s, np.asarray(known, np.float64))))
    fraction = jnp.interp(t, known, fractions)
    each = gaussian.per_example(off, y) + 0 * y
    return x0 - each, gaussian.per_example(fraction, y) + 0 * y

  keys = jax.random.split(jax.random.key(1), 4)
  got = jax.jit(lambda: likelihood.bound_terms(denoise, LINEAR, x0, keys, 24, 'learned', times))()
  np.testing.assert_allclose(got['steps'] * BITS / 16, 5.64407, atol=2e-4)
  with pytest.raises(UserError, match=r'num_bound_times must be in 1\.\.24, got 25'):
    likelihood.bound_terms(denoise, LINEAR, x0, keys, 25, 'learned', times)


# Sampling --------------------------------------------------------------------------------------------


def keys_of(count):
  return jax.random.split(jax.random.key(3), count)


@pytest.mark.parametrize(('fraction', 'fixed'), [(0.0, 'small'), (1.0, 'large')])
def test_the_ends_of_a_learned_variance_are_the_fixed_ones(fraction, fixed):
  def denoise(y, t):
    return 0.3 * y

  def both(y, t):
    return 0.3 * y, jnp.full_like(y, fraction)

  y = jax.random.normal(jax.random.key(0), (2, 3, 3, 1))
  options = {'num_steps': 6, 'grid': 'both_ends'}
  learned = samplers.SAMPLERS['ddpm'](both, LINEAR, y, keys_of(2), variance='learned', **options)
  same = samplers.SAMPLERS['ddpm'](denoise, LINEAR, y, keys_of(2), variance=fixed, **options)
  np.testing.assert_allclose(learned, same, atol=1e-5)


def test_the_variance_is_that_of_each_pixel():
  """One step of x0_hat = 0 to t_end > 0 leaves noise of the pixel's own deviation."""
  fraction = jnp.broadcast_to(jnp.array([-0.5, 0.25, 2.0]), (4000, 3))

  def both(y, t):
    return jnp.zeros_like(y), fraction

  y = samplers.SAMPLERS['ddpm'](
    both, LINEAR, jnp.zeros((4000, 3)), keys_of(4000), num_steps=1, t_start=0.5, t_end=0.1, variance='learned'
  )
  low, high = gaussian.log_variances(LINEAR, np.array([0.5, 0.1]))
  expected = np.exp(0.5 * (low + np.array([-0.5, 0.25, 2.0]) * (high - low)))
  np.testing.assert_allclose(np.std(y, axis=0), expected, rtol=0.05)
  assert np.ptp(expected) > 0.2


def test_what_a_sampler_reads_beside_x0_hat():
  settings = {'variance': 'learned', 'recompute_eps': False}
  assert samplers.second_output('ddpm', settings) == samplers.FRACTION
  assert samplers.second_output('ddim', settings) == samplers.UNCLIPPED
  assert samplers.second_output('heun', settings) == ''
  settings = {'variance': 'large', 'recompute_eps': True}
  assert samplers.second_output('ddpm', settings) == samplers.second_output('ddim', settings) == ''
  with pytest.raises(UserError, match=r"sample\.variance must be one of .*'learned'.* got 'none'"):
    samplers.SAMPLERS['ddpm'](
      lambda y, t: y, LINEAR, jnp.zeros((1, 1)), keys_of(1), num_steps=2, variance='none'
    )
