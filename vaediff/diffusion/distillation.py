"""Progressive distillation: what a student says at y_t to land in one DDIM step where its teacher's two do.

Salimans & Ho 2022, arXiv:2202.00512, section 3 and appendix G. A DDIM step from t to s is

    y_s = k y_t + c x0_hat,    k = sigma_s / sigma_t,    c = alpha_s - alpha_t k.

The teacher goes from t over m to s with x0_hats x1 and x2, the student in one step. As the product of the
teacher's two k is the student's, the student's target is

    x0* = w x1 + (1 - w) x2,    w = k_2 c_1 / (k_2 c_1 + c_2),

which equals the paper's (y_s - k y_t) / (alpha_s - k alpha_t), but subtracts nothing: w is in [0, 1], is
computed on the host in float64, and x0* lies between x1 and x2 whatever the number of steps. In the step onto
t = 0 k_2 is 0 and x0* = x2.

All is in the shifted state y: for Formulation 2 as for Formulation 1.

Imports jax, numpy, `vaediff.types`, `vaediff.errors` and its siblings only.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vaediff.diffusion.gaussian import Denoise, per_example
from vaediff.diffusion.samplers import ode_coefficients, time_grid
from vaediff.diffusion.schedules import Schedule
from vaediff.errors import UserError
from vaediff.types import Time

State = Float[Array, 'batch *shape']


Steps = dict[str, Array | np.ndarray]
"""The student's steps, each two of the teacher's, float32; step 0 starts at t = 1, rows after the last are 0.

`num_steps` int32, N; `time` where a step starts; `middle` between the teacher's two; `keep` and `current`,
(k, c) of the teacher's first; `weight` w; `grid` the student's N + 1 times. An argument of what is compiled,
and of one size, so that the halvings of a network share one program.
"""
ROWS = 1024


def halving(schedule: Schedule, num_steps: int) -> dict[str, np.ndarray]:
  """Returns `Steps` for a student of `num_steps` DDIM steps on the uniform grid, computed in float64.

  Raises:
    UserError: when the teacher's grid of twice as many steps does not contain the student's, which happens
      where there are more steps than points in the training table.
  """
  if num_steps < 1:
    raise UserError(f'a student takes at least 1 step, got {num_steps}')
  times = time_grid(schedule, 'uniform', 2 * num_steps)
  grid = time_grid(schedule, 'uniform', num_steps)
  if not np.array_equal(times[::2], grid):
    raise UserError(
      f'a student of {num_steps} steps does not step from and to times of its teacher of {2 * num_steps}: '
      f'the schedule was trained on {schedule.train_steps} times. Start from fewer steps (from_steps)'
    )
  keep, current = ode_coefficients(schedule, times)
  first = keep[1::2] * current[::2]
  columns = {
    'time': times[:-1:2],
    'middle': times[1::2],
    'keep': keep[::2],
    'current': current[::2],
    'weight': first / (first + current[1::2]),
    'grid': grid,
  }
  size = max(ROWS, num_steps) + 1
  tables = {name: np.zeros(size, np.float32) for name in columns}
  for name, values in columns.items():
    tables[name][: len(values)] = values
  return {'num_steps': np.asarray(num_steps, np.int32), **tables}


def target(teacher: Denoise, y: State, index: Int[Array, ' batch'], steps: Steps) -> State:
  """Returns x0*: the student's DDIM step with it ends where the teacher's two do.

  Args:
    teacher: (y, t) -> x0_hat.
    y: the state at `steps['time'][index]`.
    index: the student's step of each example, 0 ... N - 1.
    steps: the coefficients.
  """
  row = {name: steps[name][index] for name in ('time', 'middle', 'keep', 'current', 'weight')}
  x1 = teacher(y, row['time'])
  middle = per_example(row['keep'], y) * y + per_example(row['current'], y) * x1
  x2 = teacher(middle, row['middle'])
  weight = per_example(row['weight'], y)
  return weight * x1 + (1 - weight) * x2


def ddim(y: State, x0_hat: State, t: Time, s: Time, schedule: Schedule) -> State:
  """Returns y_s after one deterministic DDIM step from t to s <= t; y itself where s = t."""
  keep = schedule.sigma(s) / schedule.sigma(t)
  current = schedule.alpha(s) - schedule.alpha(t) * keep
  return per_example(keep, y) * y + per_example(current, y) * x0_hat


def simulate(
  denoise: Denoise,
  noise: State,
  index: Int[Array, ' batch'],
  grid: Float[Array, ' times'],
  num_calls: int,
  schedule: Schedule,
) -> State:
  """Returns y at `grid[index]`, where DDIM comes to from `noise` at t = 1 in at most `num_calls` steps.

  The steps are spread over the grid's own points, so that with `num_calls` >= index they are the grid's. It
  is the 'backward simulation' of DMD2 (Yin et al. 2024, arXiv:2405.14867), which needs no image.

  Args:
    denoise: (y, t) -> x0_hat of the student.
    noise: y at t = 1, unit variance.
    index: per example, where to stop; 0 = at the noise.
    grid: falling times from 1.
    num_calls: calls of `denoise`, at least 1.
    schedule: gives alpha and sigma.
  """

  def step(y: State, k: jax.Array) -> tuple[State, None]:
    before, after = ((index * j + num_calls - 1) // num_calls for j in (k, k + 1))
    t, s = grid[before], grid[after]
    return ddim(y, denoise(y, t), t, s, schedule), None

  y, _ = jax.lax.scan(step, noise, jnp.arange(num_calls))
  return y
