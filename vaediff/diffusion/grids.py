"""Time grids: the times at which a sampler calls the network, from t_start down to t_end.

Imports numpy, `vaediff.diffusion.schedules` and `vaediff.errors` only.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from vaediff.diffusion.schedules import Schedule
from vaediff.errors import UserError

Times = Float[np.ndarray, ' times']

KARRAS_RHO = 7.0
KARRAS_LEVEL_MIN = 0.002
QUADRATIC_SHARE = 0.8
"""Of the table, up to where DiffuseVAE's quadratic grid reaches."""


def _karras_grid(schedule: Schedule, num_steps: int, t_start: float, t_end: float) -> Times:
  """Returns times evenly spaced in (sigma_t / alpha_t)^(1/7) (arXiv:2206.00364, eq. 5).

  The level of t = 0 is zero or arbitrary, so for t_end = 0 the spacing ends one step earlier, at
  the first table point of a table schedule and at level 0.002 (their sigma_min) in continuous time,
  and the last step goes on to 0. That level's time is at most t_start / 2.
  """

  def root_level(t):
    return np.exp(-0.5 * schedule.logsnr(t) / KARRAS_RHO)

  def time_of(roots):  # bisection: the level increases with t
    low, high = np.zeros_like(roots), np.ones_like(roots)
    for _ in range(60):
      middle = 0.5 * (low + high)
      above = root_level(middle) > roots
      low, high = np.where(above, low, middle), np.where(above, middle, high)
    return 0.5 * (low + high)

  t_low, num_intervals = t_end, num_steps
  if t_end == 0:
    if schedule.train_steps:
      t_low = 1 / schedule.train_steps
    else:
      t_low = time_of(np.array([KARRAS_LEVEL_MIN ** (1 / KARRAS_RHO)])).item()
    t_low, num_intervals = min(t_low, 0.5 * t_start), num_steps - 1
  roots = np.linspace(root_level(t_start), root_level(t_low), num_intervals + 1)
  times = time_of(roots)
  return times if t_end > 0 else np.append(times, 0.0)


def _both_ends_grid(schedule: Schedule, num_steps: int, t_start: float, t_end: float) -> Times:
  """Returns times evenly spaced from t_start to the first table point, and then 0 (arXiv:2102.09672, s. 4).

  Table points are rounded as the code of that paper does, half to even in i - 1. In continuous time the last
  interval is that of a table of a thousand, at most half of t_start. For t_end > 0 it is the uniform grid.
  """
  if t_end > 0:
    return np.linspace(t_start, t_end, num_steps + 1)
  points = schedule.train_steps or 1000
  low = min(1 / points, 0.5 * t_start) if t_start <= 1 / points or not schedule.train_steps else 1 / points
  times = np.linspace(t_start, low, num_steps)
  if schedule.train_steps and num_steps <= t_start * points:
    times = (np.rint(np.round(times * points, 9) - 1) + 1) / points
  return np.append(times, 0.0)


def _strided_indices(train_steps: int, num_steps: int, field: str) -> Int[np.ndarray, ' steps']:
  """Returns 0, s, 2 s, ... with the smallest stride s that gives exactly `num_steps` table indices."""
  stride = -(-train_steps // num_steps)
  if -(-train_steps // stride) != num_steps:
    there_are = {-(-train_steps // stride) for stride in range(1, train_steps)}
    near = sorted(there_are, key=lambda number: (abs(number - num_steps), number))
    raise UserError(
      f'{field} is {num_steps}, but no stride over a table of {train_steps} gives as many steps; '
      f'near it {near[0]} and {near[1]} exist. sample.grid = both_ends takes any number'
    )
  return np.arange(0, train_steps, stride)


def _quadratic_indices(train_steps: int, num_steps: int, field: str) -> Int[np.ndarray, ' steps']:
  """Returns the whole parts of evenly spaced roots squared, up to 0.8 T; equal ones once, so fewer steps."""
  del field
  roots = np.linspace(0, np.sqrt(QUADRATIC_SHARE * train_steps), num_steps)
  return np.unique((roots**2).astype(int))


PUBLISHED_GRIDS: dict[str, Callable[[int, int, str], Int[np.ndarray, ' steps']]] = {
  'leading': _strided_indices,  # guided-diffusion's 'ddim25'
  'published_uniform': _strided_indices,  # DiffuseVAE's 'uniform', the same
  'published_quadratic': _quadratic_indices,  # DiffuseVAE's 'quad'
}
"""(T, steps, their field) -> indices from 0, where index i is t = (i + 1) / T: to repeat figures.

They start below t = 1. The state at the first of these times is taken to be pure noise, which at t < 1 it is
not.
"""


def _published_grid(
  schedule: Schedule, kind: str, num_steps: int, t_start: float, t_end: float, field: str
) -> Times:
  """Returns the times of a published grid, highest first, and then 0; there may be fewer than asked for."""
  total = schedule.train_steps
  if not total:
    raise UserError(f'sample.grid = {kind!r} needs a table of times; this schedule is continuous')
  if (t_start, t_end) != (1, 0):
    raise UserError(
      f'sample.grid = {kind!r} has its own ends; sample.t_start must be 1 and t_end 0, got {t_start} and '
      f'{t_end}'
    )
  if not 2 <= num_steps <= total:
    raise UserError(f'{field} must be in 2 ... {total} with sample.grid = {kind!r}, got {num_steps}')
  indices = PUBLISHED_GRIDS[kind](total, num_steps, field)
  return np.append((indices[::-1] + 1) / total, 0.0)


GRIDS: dict[str, Callable[[Schedule, int, float, float], Times]] = {
  'uniform': lambda schedule, n, t_start, t_end: np.linspace(t_start, t_end, n + 1),
  'quadratic': lambda schedule, n, t_start, t_end: np.linspace(t_start**0.5, t_end**0.5, n + 1) ** 2,
  'karras': _karras_grid,
  'both_ends': _both_ends_grid,
}
ALL_GRIDS = (*GRIDS, *PUBLISHED_GRIDS)


def time_grid(
  schedule: Schedule,
  kind: str,
  num_steps: int,
  t_start: float = 1.0,
  t_end: float = 0.0,
  *,
  field: str = 'sample.num_steps',
) -> Times:
  """Returns `num_steps` + 1 strictly decreasing times, from exactly `t_start` to exactly `t_end`.

  Those of `PUBLISHED_GRIDS` alone start below 1, and one of them has fewer steps than it is asked for.

  A network trained on a table has seen only t = i/T: as long as there are enough table points,
  interior times are moved to distinct ones. With more steps than the table the times stay between
  its points.

  Args:
    schedule: its `train_steps` is T; 0 leaves times where they are.
    kind: 'uniform' in t; 'quadratic', uniform in sqrt(t), denser near data; 'karras', uniform in
      (sigma_t / alpha_t)^(1/7), ending at table point 1, or at level 0.002, before the step to
      t_end = 0; 'both_ends', uniform in t with table point 1 always in it; or a name in `PUBLISHED_GRIDS`.
    num_steps: at least 1.
    t_start: in (t_end, 1].
    t_end: in [0, t_start).
    field: of the config, which `num_steps` is of: errors name it.

  Raises:
    UserError: for an unknown kind, fewer than one step, or ends out of order.
  """
  if num_steps < 1:
    raise UserError(f'{field} must be >= 1, got {num_steps}')
  if kind not in ALL_GRIDS:
    raise UserError(f'sample.grid must be one of {sorted(ALL_GRIDS)}, got {kind!r}')
  if not 0 <= t_end < t_start <= 1:
    raise UserError(
      'sample.t_start and sample.t_end must satisfy 0 <= t_end < t_start <= 1, got '
      f't_start={t_start}, t_end={t_end}'
    )
  if kind in PUBLISHED_GRIDS:
    return _published_grid(schedule, kind, num_steps, t_start, t_end, field)
  times = GRIDS[kind](schedule, num_steps, t_start, t_end)
  times[0], times[-1] = t_start, t_end
  # Table points strictly between the ends; rounding hides that 0.3 * 1000 is not exactly 300.
  lowest = int(np.floor(np.round(t_end * schedule.train_steps, 6))) + 1
  highest = int(np.ceil(np.round(t_start * schedule.train_steps, 6))) - 1
  if num_steps - 1 <= highest - lowest + 1:
    rank = np.arange(num_steps - 1)
    nearest = np.rint(times[-2:0:-1] * schedule.train_steps)
    # index - rank is non-decreasing exactly when the indices are strictly increasing.
    slack = np.maximum.accumulate(nearest - rank)
    index = np.clip(slack, lowest, highest - (num_steps - 2)) + rank
    times[-2:0:-1] = index / schedule.train_steps
  return times
