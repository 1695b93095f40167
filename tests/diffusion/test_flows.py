"""The reverse SDE by Euler-Maruyama: in distribution the ODE, to the order of the step."""

import jax
import numpy as np
import pytest

from vaediff.diffusion import flows, gaussian, samplers, schedules

LINEAR, COSINE = schedules.LinearBeta(), schedules.Cosine()
MEAN, S = 0.4, 0.5


def gain(schedule, t):
  alpha, sigma = schedule.alpha(t), schedule.sigma(t)
  return alpha * S**2 / ((alpha * S) ** 2 + sigma**2)


def denoiser(schedule):
  """The best one of x0 ~ N(MEAN, S^2)."""

  def denoise(y, t):
    each = lambda value: gaussian.per_example(value, y)
    return MEAN + each(gain(schedule, t)) * (y - each(schedule.alpha(t)) * MEAN)

  return denoise


def moments(schedule, num_steps):
  """Mean and variance of x0 from y_1 ~ N(0, 1), step by step in float64."""
  times = samplers.time_grid(schedule, 'uniform', num_steps)
  keep, current, noise = flows.sde_coefficients(schedule, times)
  mean, variance = 0.0, 1.0
  for k, t in enumerate(times[:-1]):
    slope = keep[k] + current[k] * gain(schedule, t)
    mean = slope * mean + current[k] * MEAN * (1 - gain(schedule, t) * schedule.alpha(t))
    variance = slope**2 * variance + noise[k] ** 2
  return mean, variance


@pytest.mark.parametrize('schedule', [LINEAR, COSINE])
def test_mean_and_variance_are_those_of_the_data_to_first_order(schedule):
  """x0_hat of the last step is a mean: what it lacks of the variance is of the order of the step too."""
  errors = [np.abs(np.subtract(moments(schedule, n), (MEAN, S**2))) for n in (125, 250, 500, 1000)]
  assert errors[-1][0] < 2e-3 and errors[-1][1] < 5e-3, errors
  assert errors[0][1] > 1.6 * errors[1][1] > 1.6**2 * errors[2][1], errors


@pytest.mark.parametrize('schedule', [LINEAR, pytest.param(COSINE, marks=pytest.mark.slow)])
def test_the_sampler_draws_the_same_distribution_as_the_ode(schedule):
  count = 20_000
  y = jax.random.normal(jax.random.key(0), (1, count))
  keys = jax.random.split(jax.random.key(1), 1)
  found = {}
  for name in ('euler_maruyama', 'ddim'):
    run = jax.jit(
      lambda y, keys, name=name: samplers.SAMPLERS[name](denoiser(schedule), schedule, y, keys, num_steps=500)
    )
    found[name] = np.asarray(run(y, keys))[0]
  mean, variance = moments(schedule, 500)
  sde = found['euler_maruyama']
  assert sde.mean() == pytest.approx(mean, abs=4 * S / count**0.5)
  assert sde.var() == pytest.approx(variance, abs=4 * S**2 * (2 / count) ** 0.5)
  assert sde.mean() == pytest.approx(found['ddim'].mean(), abs=0.02)
  assert sde.std() == pytest.approx(found['ddim'].std(), abs=0.02)
  assert (
    abs(np.corrcoef(sde, y[0])[0, 1]) < 0.1 < np.corrcoef(found['ddim'], y[0])[0, 1]
  )  # it forgets the start


def test_small_steps_are_those_of_ddpm():
  """Both discretise the same SDE: their coefficients differ by the square of the step's beta."""
  times = np.array([0.5, 0.499])
  b = float(np.diff(LINEAR.log_alpha_bar(times))[0])
  keep, current, noise = flows.sde_coefficients(LINEAR, times)
  g0, g1, _ = gaussian.posterior_coefficients(times[1:], times[:-1], LINEAR)
  assert keep[0] == pytest.approx(float(g1[0]), abs=2 * b**2)
  assert current[0] == pytest.approx(float(g0[0]), abs=2 * b**2)
  assert noise[0] == pytest.approx(float(LINEAR.beta(times[1:], times[:-1])[0]) ** 0.5, rel=2 * b)
