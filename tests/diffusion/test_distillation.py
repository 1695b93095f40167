"""Targets of progressive distillation against the paper's formula, and where the student's step ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.diffusion import distillation, gaussian, samplers, schedules
from vaediff.errors import UserError

LINEAR = schedules.make_schedule('linear')
COSINE = schedules.make_schedule('cosine')


def states(shape=(6, 4, 4, 1), seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def teacher(y, t):
  """Something that is neither linear in y nor constant in t."""
  return jnp.tanh(1.3 * y - t[:, None, None, None]) + 0.2 * y


def two_steps(y, t, m, s, schedule):
  """The teacher's DDIM steps t -> m -> s in float64, by x0_hat and eps_hat."""
  for start, end in ((t, m), (m, s)):
    x0_hat = np.asarray(teacher(jnp.asarray(y), jnp.full(len(y), start)), np.float64)
    eps_hat = (y - schedule.alpha(start) * x0_hat) / schedule.sigma(start)
    y = schedule.alpha(end) * x0_hat + schedule.sigma(end) * eps_hat if end else x0_hat
  return y


@pytest.mark.parametrize('schedule', [LINEAR, COSINE])
@pytest.mark.parametrize('num_steps', [1, 2, 4, 256])
def test_one_step_of_the_student_ends_where_two_of_the_teacher_do(schedule, num_steps):
  """In the jitted float32 step itself, at 512 -> 256 as at 2 -> 1."""
  steps = distillation.halving(schedule, num_steps)
  y = states()
  index = jnp.asarray(np.linspace(0, num_steps - 1, len(y)).round().astype(np.int32))
  wanted = jax.jit(lambda y, steps: distillation.target(teacher, y, index, steps))(y, steps)
  t, s = steps['grid'][index], steps['grid'][index + 1]
  landed = jax.jit(lambda y, x, t, s: distillation.ddim(y, x, t, s, schedule))(
    y, wanted, jnp.asarray(t), jnp.asarray(s)
  )
  for k, i in enumerate(np.asarray(index)):
    row = np.asarray(y[k : k + 1], np.float64)
    times = samplers.time_grid(schedule, 'uniform', 2 * num_steps)[2 * i : 2 * i + 3]
    expected = two_steps(row, *times, schedule)
    got = wanted[k : k + 1] if times[-1] == 0 else landed[k : k + 1]
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize('num_steps', [1, 4, 8])
def test_target_is_the_papers(num_steps):
  """x* = (y_s - r y_t) / (alpha_s - r alpha_t), r = sigma_s / sigma_t; x2 in the last step."""
  steps = distillation.halving(COSINE, num_steps)
  y = states((num_steps, 2, 2, 1))
  wanted = np.asarray(
    distillation.target(teacher, y, jnp.arange(num_steps), jax.tree.map(jnp.asarray, steps))
  )
  times = samplers.time_grid(COSINE, 'uniform', 2 * num_steps)
  for i in range(num_steps - 1):
    t, m, s = times[2 * i : 2 * i + 3]
    row = np.asarray(y[i : i + 1], np.float64)
    ratio = COSINE.sigma(s) / COSINE.sigma(t)
    expected = (two_steps(row, t, m, s, COSINE) - ratio * row) / (COSINE.alpha(s) - ratio * COSINE.alpha(t))
    np.testing.assert_allclose(wanted[i : i + 1], expected, atol=2e-5)
  assert steps['weight'][num_steps - 1] == 0


def test_target_lies_between_the_teachers_two():
  for num_steps in (1, 8, 256):
    weight = distillation.halving(LINEAR, num_steps)['weight']
    assert np.all((weight >= 0) & (weight <= 1))


def test_grids_are_nested_for_all_halvings_of_512():
  for num_steps in (256, 128, 64, 32, 16, 8, 4, 2, 1):
    steps = distillation.halving(LINEAR, num_steps)
    grid = samplers.time_grid(LINEAR, 'uniform', num_steps)
    np.testing.assert_allclose(steps['grid'][: num_steps + 1], grid, atol=1e-7)
    assert steps['num_steps'] == num_steps


def test_more_steps_than_the_table_are_refused():
  with pytest.raises(UserError, match='Start from fewer steps'):
    distillation.halving(LINEAR, 768)


def test_tables_of_all_halvings_have_one_size():
  """So that they share one compiled program."""
  shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), distillation.halving(LINEAR, n)) for n in (1, 16, 256)]
  assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.parametrize('num_calls', [3, 4, 7])
def test_simulation_with_enough_calls_takes_the_grids_own_steps(num_calls):
  grid = jnp.asarray(samplers.time_grid(COSINE, 'uniform', 4), jnp.float32)
  noise = states((4, 2, 2, 1), seed=1)
  index = jnp.arange(4)
  got = distillation.simulate(teacher, noise, index, grid, num_calls, COSINE)
  keys = jax.random.split(jax.random.key(0), 4)
  _, trajectory = samplers.SAMPLERS['ddim'](teacher, COSINE, noise, keys, num_steps=4, trajectory=True)
  for i in range(4):
    np.testing.assert_allclose(got[i], trajectory[i, i], atol=1e-5)


def test_simulation_in_few_calls_ends_at_the_right_time():
  """A denoiser that knows x0 leads along the one line of noise and data, whatever the steps."""
  noise, x0 = states(seed=2), states(seed=3)
  grid = jnp.asarray(distillation.halving(LINEAR, 64)['grid'])
  index = jnp.asarray([0, 1, 5, 30, 62, 63])
  y_1 = gaussian.q_sample(x0, noise, jnp.ones(6), LINEAR)
  got = distillation.simulate(lambda y, t: x0, y_1, index, grid, 4, LINEAR)
  np.testing.assert_allclose(got, gaussian.q_sample(x0, noise, grid[index], LINEAR), atol=2e-5)


@pytest.mark.parametrize('sampler', ['renoise', 'there_and_back'])
def test_samplers_of_students_keep_the_marginals_of_gaussian_data(sampler):
  """With x0 ~ N(0, s^2) and a denoiser that draws from p(x0 | y), every state has its exact variance.

  The mean of the posterior plus noise of its variance is such a denoiser.
  """
  std, count = 0.5, 20_000
  keys = jax.random.split(jax.random.key(4), count)

  def denoise(y, t):
    alpha, sigma = COSINE.alpha(t)[:, None], COSINE.sigma(t)[:, None]
    total = alpha**2 * std**2 + sigma**2
    spread = jnp.sqrt(std**2 * sigma**2 / total)
    seed = jax.random.fold_in(jax.random.key(5), (t[0] * 1000).astype(jnp.int32))
    return alpha * std**2 / total * y + spread * jax.random.normal(seed, y.shape)

  y = jax.random.normal(jax.random.key(6), (count, 1))
  x0, trajectory = samplers.SAMPLERS[sampler](denoise, COSINE, y, keys, num_steps=4, trajectory=True)
  np.testing.assert_allclose(float(x0.std()), std, rtol=0.02)
  if sampler == 'renoise':
    times = samplers.time_grid(COSINE, 'uniform', 4)
    expected = np.sqrt(COSINE.alpha(times) ** 2 * std**2 + COSINE.sigma(times) ** 2)
    np.testing.assert_allclose(np.asarray(trajectory).std(axis=(1, 2)), expected, rtol=0.02)


def test_there_and_back_by_hand():
  """Two intervals by DDIM with a known x0, and q(y_s | y_r) back: the mean and the variance of each state."""
  count, x0 = 40_000, 0.7
  keys = jax.random.split(jax.random.key(7), count)
  y = COSINE.alpha(np.array(1.0)) * x0 + COSINE.sigma(np.array(1.0)) * np.ones((count, 1), np.float32)
  _, trajectory = samplers.SAMPLERS['there_and_back'](
    lambda y, t: jnp.full_like(y, x0), COSINE, jnp.asarray(y), keys, num_steps=4, trajectory=True
  )
  times = samplers.time_grid(COSINE, 'uniform', 4)
  eps = 1.0  # the noise of the first state, kept by DDIM
  far, back = times[2], times[1]
  ratio = COSINE.alpha(back) / COSINE.alpha(far)
  mean = ratio * (COSINE.alpha(far) * x0 + COSINE.sigma(far) * eps)
  np.testing.assert_allclose(float(trajectory[1].mean()), mean, atol=0.02)
  np.testing.assert_allclose(float(trajectory[1].std()), np.sqrt(COSINE.beta(far, back)), rtol=0.02)
