"""Samplers against what is known in closed form.

For x0 ~ N(0, s^2) the best denoiser is linear, x0_hat = alpha s^2 y / (alpha^2 s^2 + sigma^2), and
the probability flow scales y as the standard deviation of the marginal.
"""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from some_slow import some_slow

from vaediff.diffusion import gaussian, guidance, samplers, schedules

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import formulation2  # noqa: E402
import known_network  # noqa: E402

LINEAR = schedules.LinearBeta()
COSINE = schedules.Cosine()
SCHEDULES = [LINEAR, COSINE]
VARIANTS = {
  'ddpm_large': functools.partial(samplers.SAMPLERS['ddpm'], variance='large'),
  'ddim_half': functools.partial(samplers.SAMPLERS['ddim'], eta=0.5),
  'ddim_one': functools.partial(samplers.SAMPLERS['ddim'], eta=1.0),
  **{name: samplers.SAMPLERS[name] for name in ('ddpm', 'ddim', 'heun', 'dpmpp_2m')},
}
# these two are exact where x0_hat is a sample, not a mean
ALL = {**VARIANTS, **{name: samplers.SAMPLERS[name] for name in ('renoise', 'there_and_back')}}
DETERMINISTIC = ['ddim', 'heun', 'dpmpp_2m']


def marginal_std(schedule, t, s):
  return np.sqrt((schedule.alpha(t) * s) ** 2 + schedule.sigma(t) ** 2)


def gaussian_denoiser(schedule, s):
  def denoise(y, t):
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return gaussian.per_example(alpha * s**2 / ((alpha * s) ** 2 + sigma**2), y) * y

  return denoise


def point_denoiser(x0):
  return lambda y, t: jnp.broadcast_to(x0, y.shape)


def keys_of(count, seed=7):
  return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(count))


def noise_of(count, shape, seed=3):
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys_of(count, seed))


# Oracles.


@pytest.mark.parametrize('schedule, num_steps', [(COSINE, 3), (LINEAR, 10)])
@pytest.mark.parametrize('formulation', [1, 2])
@pytest.mark.parametrize('name', ALL)
def test_oracle_recovers_x0_through_the_network_state(name, formulation, num_steps, schedule):
  """The oracle reads x_t, as a network does, and outputs v; the result is x0, not x0 + x0_vae."""
  x0 = jnp.linspace(-1, 1, 8).reshape(2, 2, 2, 1)
  x0_vae = jnp.full((2, 2, 2, 1), -0.81)

  def network(x_t, t, values, drop):
    y = x_t - values['x0_vae'] if formulation == 2 else x_t
    return gaussian.to_v('x0', values['x0'], y, t, schedule)

  shift = 'x0_vae' if formulation == 2 else ''
  oracle = known_network.denoiser(
    network, schedule, {'vae': ('x0_vae',), 'truth': ('x0',)}, prediction='v', shift=shift
  )
  denoise = oracle.denoise(known_network.READ, {'x0_vae': x0_vae, 'x0': x0})
  y = noise_of(2, (2, 2, 1))
  result = ALL[name](denoise, schedule, y, keys_of(2), num_steps=num_steps)
  # x0 -> v divides by sigma = 0.01 at the first point of the linear table.
  np.testing.assert_allclose(result, x0, atol=1e-4)


@pytest.mark.parametrize('name', ALL)
def test_last_step_returns_x0_hat_bit_for_bit(name):
  x0 = jnp.linspace(-1, 1, 6).reshape(2, 3) / 3
  y = 1e3 * noise_of(2, (3,))
  for num_steps in (1, 2, 5):
    result = ALL[name](point_denoiser(x0), COSINE, y, keys_of(2), num_steps=num_steps)
    np.testing.assert_array_equal(result, x0)


@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('grid', sorted(samplers.GRIDS))
@pytest.mark.parametrize('name', DETERMINISTIC)
def test_deterministic_oracle_keeps_eps_along_the_way(name, grid, schedule):
  """With x0_hat = x0 every ODE solver is exact: the states are alpha_t x0 + sigma_t eps."""
  x0, eps = jnp.full((1, 4), 0.37), noise_of(1, (4,))
  t = jnp.ones(1)
  y = gaussian.q_sample(x0, eps, t, schedule)
  result, states = VARIANTS[name](
    point_denoiser(x0), schedule, y, keys_of(1), num_steps=7, grid=grid, trajectory=True
  )
  times = samplers.time_grid(schedule, grid, 7)
  assert states.shape == (8, 1, 4)
  np.testing.assert_array_equal(states[0], y)
  np.testing.assert_array_equal(states[-1], result)
  for time, state in zip(times[:-1], states[:-1], strict=True):
    expected = schedule.alpha(time) * x0 + schedule.sigma(time) * eps
    np.testing.assert_allclose(state, expected, atol=3e-6)


@pytest.mark.parametrize('name', ['ddpm', 'ddim_half', 'ddim_one'])
def test_point_data_gives_the_exact_marginal_for_any_number_of_steps(name):
  """For data at a point x0_hat is exact, and y_s ~ N(alpha_s x0, sigma_s^2) at every grid time."""
  x0, pixels = 0.37, 40_000
  y = gaussian.q_sample(jnp.full((1, pixels), x0), noise_of(1, (pixels,)), jnp.ones(1), LINEAR)
  _, states = VARIANTS[name](
    point_denoiser(jnp.float32(x0)), LINEAR, y, keys_of(1), num_steps=4, trajectory=True
  )
  for time, state in zip(samplers.time_grid(LINEAR, 'uniform', 4)[:-1], states, strict=False):
    sigma = LINEAR.sigma(time)
    assert abs(np.mean(state) - LINEAR.alpha(time) * x0) < 5 * sigma / np.sqrt(pixels)
    assert abs(np.var(state) / sigma**2 - 1) < 5 * np.sqrt(2 / pixels)


# Gaussian data.


@pytest.mark.parametrize('num_steps', [1, 3, 8])
@pytest.mark.parametrize('schedule', SCHEDULES)
def test_ddpm_large_is_exact_for_unit_variance_data(schedule, num_steps):
  """For s = 1 the reverse transition has variance beta_{t|s} and every marginal is N(0, 1)."""
  y = noise_of(1, (40_000,))
  result = samplers.SAMPLERS['ddpm'](
    gaussian_denoiser(schedule, 1.0),
    schedule,
    y,
    keys_of(1),
    num_steps=num_steps,
    t_end=0.05,
    variance='large',
  )
  assert abs(np.mean(result)) < 5 / np.sqrt(40_000)
  assert abs(np.var(result) - 1) < 5 * np.sqrt(2 / 40_000)
  # The lag-one coefficient is alpha_t / alpha_s, composed over all steps.
  correlation = np.mean(np.asarray(result) * np.asarray(y))
  assert abs(correlation - schedule.alpha(1.0) / schedule.alpha(0.05)) < 5 / np.sqrt(40_000)


@pytest.mark.parametrize('variance', ['small', 'large'])
def test_ddpm_variance_in_closed_form(variance):
  """One pixel's variance, pushed through a few steps by Bayes' rule from the betas themselves."""
  s, pixels, steps = 0.5, 40_000, 5
  log_alpha_bar = np.concatenate([[0], np.cumsum(np.log(1 - np.linspace(1e-4, 0.02, 1000)))])
  alpha_bar = np.exp(log_alpha_bar[::-200])  # i = 1000, 800, ..., 0
  expected = 1.0
  for ab_t, ab_s in zip(alpha_bar[:-2], alpha_bar[1:-1], strict=True):
    # Precision of y_s given x0 and y_t: the prior of y_s given x0, and the transition y_s -> y_t.
    a, b = ab_t / ab_s, 1 - ab_t / ab_s
    posterior_variance = 1 / (1 / (1 - ab_s) + a / b)
    gain = np.sqrt(ab_t) * s**2 / (ab_t * s**2 + 1 - ab_t)
    slope = posterior_variance * (np.sqrt(ab_s) * gain / (1 - ab_s) + np.sqrt(a) / b)
    expected = slope**2 * expected + (posterior_variance if variance == 'small' else b)
  _, states = samplers.SAMPLERS['ddpm'](
    gaussian_denoiser(LINEAR, s),
    LINEAR,
    noise_of(1, (pixels,)),
    keys_of(1),
    num_steps=steps,
    variance=variance,
    trajectory=True,
  )
  assert abs(np.var(states[-2]) / expected - 1) < 5 * np.sqrt(2 / pixels)


@pytest.mark.parametrize('name', some_slow(VARIANTS, 'ddpm', 'ddim_half'))
def test_many_steps_reach_the_marginal_of_the_data(name):
  s, pixels = 0.5, 20_000
  result = jax.jit(
    lambda y, keys: VARIANTS[name](gaussian_denoiser(LINEAR, s), LINEAR, y, keys, num_steps=500)
  )(noise_of(1, (pixels,)), keys_of(1))
  assert abs(np.mean(result)) < 5 * s / np.sqrt(pixels)
  # Sampling error, plus the first-order discretisation error of 500 steps.
  assert abs(np.std(result) / s - 1) < 5 / np.sqrt(2 * pixels) + 0.01


def test_the_noise_of_few_steps_brings_too_little_of_a_narrow_distribution():
  """From one y, DDIM with eta = 1: the deviation over that of the data, in closed form and as it is drawn."""
  s, pixels, found = 0.1, 20_000, []
  for steps in (25, 50, 250):
    times = np.linspace(1, 0, steps + 1)
    alpha, sigma = (np.asarray(part, np.float64) for part in (COSINE.alpha(times), COSINE.sigma(times)))
    gain = alpha * s**2 / ((alpha * s) ** 2 + sigma**2)
    variance = 0.0
    for i in range(steps - 1):
      added = (sigma[i + 1] / sigma[i]) ** 2 * (1 - (alpha[i] / alpha[i + 1]) ** 2)
      kept = np.sqrt(sigma[i + 1] ** 2 - added) / sigma[i]
      slope = alpha[i + 1] * gain[i] + kept * (1 - alpha[i] * gain[i])
      variance = slope**2 * variance + added
    expected = gain[-2] * np.sqrt(variance) / s
    y = jnp.zeros((1, pixels))
    drawn = VARIANTS['ddim_one'](gaussian_denoiser(COSINE, s), COSINE, y, keys_of(1), num_steps=steps)
    assert abs(np.std(drawn) / s - expected) < 5 * expected / np.sqrt(2 * pixels)
    found.append(expected)
  np.testing.assert_allclose(found, [0.70, 0.80, 0.94], atol=0.005)  # those of docs/unclip.md


def flow_error(sample, schedule, num_steps, s, t_start, t_end):
  """Relative error of the flow map from t_start to t_end, a pure scaling."""
  y = jnp.ones((1, 1))
  denoise = gaussian_denoiser(schedule, s)
  result = sample(denoise, schedule, y, keys_of(1), num_steps=num_steps, t_start=t_start, t_end=t_end)
  exact = marginal_std(schedule, t_end, s) / marginal_std(schedule, t_start, s)
  return abs(result.item() / exact - 1)


@pytest.mark.parametrize('name, order', [('ddim', 1), ('heun', 2), ('dpmpp_2m', 2)])
def test_order_of_convergence(name, order):
  """Halving the step divides the error by 2^order."""
  errors = [flow_error(VARIANTS[name], COSINE, n, 0.3, 0.8, 0.2) for n in (10, 20, 40)]
  assert errors[-1] > 3e-6  # above float32 rounding, or the ratios mean nothing
  observed = np.log2(np.array(errors[:-1]) / errors[1:])
  np.testing.assert_allclose(observed, order, atol=0.15)


@pytest.mark.parametrize('name', ['heun', 'dpmpp_2m'])
def test_second_order_beats_first_order_from_noise_to_data(name):
  """From t = 1 to t = 0 on the linear table, at equal cost, with the plain last step included."""

  def error(name, num_steps):
    y = jnp.ones((1, 1))
    denoise = gaussian_denoiser(LINEAR, 0.5)
    result = VARIANTS[name](denoise, LINEAR, y, keys_of(1), num_steps=num_steps, grid='quadratic')
    return abs(result.item() / (0.5 / marginal_std(LINEAR, 1.0, 0.5)) - 1)

  cost = len(samplers.evaluation_times(name, LINEAR, num_steps=20))
  assert error(name, 20) < 0.5 * error('ddim', cost)


# Identities between samplers.


@pytest.mark.parametrize('bound', [None, 0.2])
@pytest.mark.parametrize('schedule, grid', [(LINEAR, 'uniform'), (COSINE, 'quadratic')])
def test_ddim_with_eta_one_is_ddpm_step_by_step(schedule, grid, bound):
  """Also under clipping, because the noise estimate is the one implied by the clipped x0_hat."""
  denoise = gaussian_denoiser(schedule, 0.5)
  if bound is not None:
    denoise = guidance.clip(denoise, -bound, bound)
  y, keys = noise_of(2, (4, 4, 1)), keys_of(2)
  run = {'num_steps': 12, 'grid': grid, 'trajectory': True}
  _, ddim = samplers.SAMPLERS['ddim'](denoise, schedule, y, keys, eta=1.0, **run)
  _, ddpm = samplers.SAMPLERS['ddpm'](denoise, schedule, y, keys, variance='small', **run)
  np.testing.assert_allclose(ddim, ddpm, atol=2e-6)
  if bound is not None:
    assert np.max(abs(ddpm[-1])) <= bound


def test_ddim_step_under_clipping_recomputes_eps():
  """One step 700 -> 699 worked by hand from alpha_bar, x0_hat clipped from 1.8 to 1."""
  alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
  ab_t, ab_s, y = alpha_bar[699], alpha_bar[698], 0.4
  eps = (y - np.sqrt(ab_t)) / np.sqrt(1 - ab_t)
  expected = np.sqrt(ab_s) + np.sqrt(1 - ab_s) * eps
  result = samplers.SAMPLERS['ddim'](
    guidance.clip(point_denoiser(jnp.float32(1.8))),
    LINEAR,
    jnp.full((1, 1), y),
    keys_of(1),
    num_steps=1,
    t_start=0.7,
    t_end=0.699,
  )
  assert result.item() == pytest.approx(expected, abs=1e-6)


def test_ddim_eta_scales_the_posterior_standard_deviation():
  """800 -> 400, data at 0: mean sqrt(sigma_s^2 - w^2) eps, noise w = eta posterior std."""
  alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
  ab_t, ab_s, pixels = alpha_bar[799], alpha_bar[399], 40_000
  w = 0.6 * np.sqrt((1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s))
  y = jnp.full((1, pixels), 1.5 * np.sqrt(1 - ab_t), jnp.float32)
  run = {'num_steps': 1, 't_start': 0.8, 't_end': 0.4, 'eta': 0.6}
  result = samplers.SAMPLERS['ddim'](point_denoiser(jnp.float32(0)), LINEAR, y, keys_of(1), **run)
  assert abs(np.mean(result) - 1.5 * np.sqrt(1 - ab_s - w**2)) < 5 * w / np.sqrt(pixels)
  assert abs(np.std(result) / w - 1) < 5 / np.sqrt(2 * pixels)


def test_first_heun_and_dpm_step_without_history_is_ddim():
  """DPM-Solver++ has no history in its first step, and Heun is plain in the step onto data."""
  y, keys = noise_of(1, (5,)), keys_of(1)
  denoise = gaussian_denoiser(COSINE, 0.5)
  ends = {'num_steps': 1, 't_start': 0.8, 't_end': 0.3}
  np.testing.assert_array_equal(
    samplers.SAMPLERS['dpmpp_2m'](denoise, COSINE, y, keys, **ends),
    samplers.SAMPLERS['ddim'](denoise, COSINE, y, keys, **ends),
  )
  np.testing.assert_array_equal(
    samplers.SAMPLERS['heun'](denoise, COSINE, y, keys, num_steps=1),
    samplers.SAMPLERS['ddim'](denoise, COSINE, y, keys, num_steps=1),
  )


@pytest.mark.parametrize('name', samplers.SAMPLERS)
def test_formulations_are_the_same_chain(name):
  """A Formulation 2 network w1 x_t + w2 x0_vae is w1 y_t + (w1 + w2) x0_vae in Formulation 1."""
  w1, w2, x0_vae = 0.3, -0.2, jnp.full((2, 3), 0.7)
  clip = lambda x0_hat: jnp.clip(x0_hat, -1, 1)
  form2 = lambda y, t: clip(w1 * (y + x0_vae) + w2 * x0_vae)
  form1 = lambda y, t: clip(w1 * y + (w1 + w2) * x0_vae)
  y, keys = noise_of(2, (3,)), keys_of(2)
  sample = {**ALL, 'euler_maruyama': samplers.get_sampler('euler_maruyama')}[name]
  results = [sample(d, LINEAR, y, keys, num_steps=6) for d in (form1, form2)]
  np.testing.assert_allclose(*results, atol=1e-6)


def test_formulation2_chain_written_out_in_x_t():
  """The DDPM chain in y plus x0_vae is the chain of `formulation2.posterior` in x_t, same noise."""
  x0_vae, num_steps = jnp.full((2, 3), 0.7), 6
  network = lambda x_t: jnp.clip(0.3 * x_t - 0.1 * x0_vae, -1, 1)
  y, keys = noise_of(2, (3,)), keys_of(2)
  _, states = samplers.SAMPLERS['ddpm'](
    lambda y, t: network(y + x0_vae), LINEAR, y, keys, num_steps=num_steps, trajectory=True
  )
  times = samplers.time_grid(LINEAR, 'uniform', num_steps)
  x_t = y + x0_vae
  for k in range(num_steps):
    s, t = jnp.full(2, times[k + 1]), jnp.full(2, times[k])
    mean, variance = formulation2.posterior(network(x_t), x_t, x0_vae, s, t, LINEAR)
    noise = jax.vmap(lambda key, k=k: jax.random.normal(jax.random.fold_in(key, k), (3,)))(keys)
    x_t = mean + jnp.sqrt(variance)[:, None] * noise
    np.testing.assert_allclose(x_t - x0_vae, states[k + 1], atol=2e-5)
