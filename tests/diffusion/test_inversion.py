"""DDIM inversion against the closed form: for x0 ~ N(0, s^2) the ODE scales y as the marginal's deviation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.diffusion import gaussian, inversion, schedules
from vaediff.errors import UserError

LINEAR, COSINE = schedules.LinearBeta(), schedules.Cosine()
S = 0.5


def gain(schedule, t):
  alpha, sigma = schedule.alpha(t), schedule.sigma(t)
  return alpha * S**2 / ((alpha * S) ** 2 + sigma**2)


def denoiser(schedule):
  return lambda y, t: gaussian.per_example(gain(schedule, t), y) * y


def deviation(schedule, t):
  return np.sqrt((schedule.alpha(t) * S) ** 2 + schedule.sigma(t) ** 2)


def keys_of(count):
  return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(count))


@pytest.mark.parametrize('schedule', [LINEAR, COSINE])
@pytest.mark.parametrize('grid', ['uniform', 'karras'])
def test_x_T_is_the_ode_s_to_the_order_of_the_step(schedule, grid):
  x0 = jnp.array([[0.3, -0.7, 1.0]])
  exact = x0 * deviation(schedule, 1.0) / deviation(schedule, inversion.lowest_time(schedule))
  errors = []
  for num_steps in (50, 100, 200):
    x_T = inversion.invert(denoiser(schedule), schedule, x0, num_steps=num_steps, grid=grid)
    errors.append(float(np.abs(x_T / exact - 1).max()))
  assert errors[2] < 0.04
  assert 1.6 < errors[0] / errors[1] < 2.6 and 1.6 < errors[1] / errors[2] < 2.6, errors


def test_x0_hat_is_that_of_the_lower_noise_of_each_interval():
  """By hand, in float64: two intervals, each with the gain of its lower end."""
  low = inversion.lowest_time(LINEAR)
  assert low == 1 / 1000
  times = np.array([low, 0.501, 1.0])  # the middle one is moved to a point of the table
  alpha, sigma = LINEAR.alpha(times), LINEAR.sigma(times)
  y = 0.8
  for k in (0, 1):
    x0_hat = gain(LINEAR, times[k]) * y
    eps = (y - alpha[k] * x0_hat) / sigma[k]
    y = alpha[k + 1] * x0_hat + sigma[k + 1] * eps
  seen = []

  def denoise(y, t):
    jax.debug.callback(lambda t: seen.append(float(t[0])), t)
    return denoiser(LINEAR)(y, t)

  x_T = inversion.invert(denoise, LINEAR, jnp.full((1, 1), 0.8), num_steps=2)
  jax.effects_barrier()
  np.testing.assert_allclose(seen, times[:-1], atol=1e-3)
  assert float(x_T[0, 0]) == pytest.approx(y, rel=5e-3)


@pytest.mark.parametrize('schedule', [LINEAR, COSINE])
def test_the_round_trip_comes_back_by_the_order_of_the_step(schedule):
  x0 = jnp.linspace(-1, 1, 6).reshape(2, 3)
  trip = jax.jit(
    lambda x, n: inversion.round_trip(denoiser(schedule), schedule, x, keys_of(2), num_steps=n)[1],
    static_argnums=1,
  )
  errors = [float(np.abs(trip(x0, n) - x0).max()) for n in (25, 50, 100, 400)]
  assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02, errors
  assert 1.5 < errors[1] / errors[2] < 2.7, errors


def test_the_noise_of_a_point_is_found_exactly():
  """With x0_hat = x0 the ODE is a line: x_T = alpha_1 x0 + sigma_1 eps with the eps that x0 has at t_low."""
  x0 = jnp.full((1, 4), 0.4)
  y = jnp.linspace(-0.5, 0.5, 4)[None]
  low = inversion.lowest_time(LINEAR)
  eps = (y - LINEAR.alpha(low) * x0) / LINEAR.sigma(low)
  for num_steps in (1, 7):
    x_T, back = inversion.round_trip(lambda y, t: x0, LINEAR, y, keys_of(1), num_steps=num_steps)
    np.testing.assert_allclose(x_T, LINEAR.alpha(1.0) * x0 + LINEAR.sigma(1.0) * eps, rtol=1e-4)
    np.testing.assert_allclose(back, y, atol=1e-4)


def test_a_bad_grid_is_refused():
  with pytest.raises(UserError, match='num_steps must be >= 1, got 0'):
    inversion.invert(denoiser(LINEAR), LINEAR, jnp.ones((1, 1)), num_steps=0)
