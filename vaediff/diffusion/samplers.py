"""Samplers: from the state y at t_start to x0, in one compiled scan.

Every sampler here is linear in what it has seen: each network evaluation is followed by

    y_next = keep * y_base + previous * x0_hat_previous + current * x0_hat + noise * n,

with n ~ N(0, I), so a sampler is a table of these numbers, computed on the host in float64 from the
time grid, and one `lax.scan` runs them all. The noise estimate is thereby always the one implied by
y and x0_hat, so clipping inside `denoise` stays consistent. The step onto t = 0 returns x0_hat
itself, without noise or arithmetic.

All take `(denoise, schedule, y, keys, *, num_steps, grid, t_start, t_end, trajectory)` and their
own options:

  denoise: (y, t) -> x0_hat, with one t per example; it hides network, condition, guidance and
    formulation.
  schedule: gives alpha_t and sigma_t.
  y: the state at `t_start`, float32: noise N(0, I) for t_start = 1, alpha_t x0_vae + sigma_t eps to
    refine an image from t_start < 1.
  keys: one PRNG key per example, used for nothing else. The noise of step k of example i depends on
    keys[i] and k alone, so example i is the same for every batch size. Unused where the sampler
    adds no noise.
  num_steps: steps from t_start to t_end, at least 1.
  grid: 'uniform', 'quadratic' or 'karras'; see `time_grid`.
  t_start, t_end: Python numbers, 0 <= t_end < t_start <= 1. At t_end > 0 the result is y at t_end,
    not x0.
  trajectory: if set, the result is (x0, states) with the states at the times of the grid, an array
    [num_steps + 1, batch, ...]; the first is y and the last is x0.

Imports jax, numpy, `vaediff.types` and `vaediff.errors` only.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vaediff.diffusion.gaussian import Denoise, posterior_coefficients
from vaediff.diffusion.schedules import Schedule
from vaediff.errors import UserError
from vaediff.types import Keys

State = Float[Array, 'batch *shape']
Trajectory = Float[Array, 'times batch *shape']
Times = Float[np.ndarray, ' times']
Column = Float[np.ndarray, ' rows']

KARRAS_RHO = 7.0
KARRAS_LEVEL_MIN = 0.002


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


GRIDS: dict[str, Callable[[Schedule, int, float, float], Times]] = {
  'uniform': lambda schedule, n, t_start, t_end: np.linspace(t_start, t_end, n + 1),
  'quadratic': lambda schedule, n, t_start, t_end: np.linspace(t_start**0.5, t_end**0.5, n + 1) ** 2,
  'karras': _karras_grid,
}


def time_grid(
  schedule: Schedule, kind: str, num_steps: int, t_start: float = 1.0, t_end: float = 0.0
) -> Times:
  """Returns `num_steps` + 1 strictly decreasing times, from exactly `t_start` to exactly `t_end`.

  A network trained on a table has seen only t = i/T: as long as there are enough table points,
  interior times are moved to distinct ones. With more steps than the table the times stay between
  its points.

  Args:
    schedule: its `train_steps` is T; 0 leaves times where they are.
    kind: 'uniform' in t; 'quadratic', uniform in sqrt(t), denser near data; 'karras', uniform in
      (sigma_t / alpha_t)^(1/7), ending at table point 1, or at level 0.002, before the step to
      t_end = 0.
    num_steps: at least 1.
    t_start: in (t_end, 1].
    t_end: in [0, t_start).

  Raises:
    UserError: for an unknown kind, fewer than one step, or ends out of order.
  """
  if num_steps < 1:
    raise UserError(f'sample.num_steps must be >= 1, got {num_steps}')
  if kind not in GRIDS:
    raise UserError(f'sample.grid must be one of {sorted(GRIDS)}, got {kind!r}')
  if not 0 <= t_end < t_start <= 1:
    raise UserError(
      'sample.t_start and sample.t_end must satisfy 0 <= t_end < t_start <= 1, got '
      f't_start={t_start}, t_end={t_end}'
    )
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


@dataclasses.dataclass(frozen=True)
class _Table:
  """One row per network evaluation at `time`, with the coefficients of the module's equation.

  `advance` rows make y_next the new y_base and are the steps of the grid; the others are
  intermediate.
  """

  time: Column
  keep: Column
  previous: Column
  current: Column
  noise: Column
  advance: np.ndarray


def _run(
  denoise: Denoise, y: State, keys: Keys, table: _Table, trajectory: bool
) -> State | tuple[State, Trajectory]:
  """Returns the last state, and with `trajectory` the states of all grid times, by one scan."""
  y = y.astype(jnp.float32)
  noisy = bool(np.any(table.noise))
  rows = {
    name: jnp.asarray(getattr(table, name), jnp.float32)
    for name in ('time', 'keep', 'previous', 'current', 'noise')
  }
  rows |= {'advance': jnp.asarray(table.advance), 'k': jnp.arange(len(table.time))}

  def step(carry, row):
    base, state, x0_previous = carry
    t = jnp.broadcast_to(row['time'], y.shape[:1])
    x0_hat = denoise(state, t).astype(jnp.float32)
    state = row['keep'] * base + row['previous'] * x0_previous + row['current'] * x0_hat
    if noisy:
      state += row['noise'] * jax.vmap(
        lambda key: jax.random.normal(jax.random.fold_in(key, row['k']), y.shape[1:])
      )(keys)
    base = jnp.where(row['advance'], state, base)
    return (base, state, x0_hat), state if trajectory else None

  (x0, _, _), states = jax.lax.scan(step, (y, y, jnp.zeros_like(y)), rows)
  if not trajectory:
    return x0
  return x0, jnp.concatenate([y[None], states[np.flatnonzero(table.advance)]])


def ode_coefficients(schedule: Schedule, times: Times) -> tuple[Column, Column]:
  """Returns (keep, current) of the Euler steps of d(y / sigma) / d(alpha / sigma) = x0_hat.

  The probability-flow ODE (Song et al. 2021, arXiv:2011.13456), finite at t = 1; its Euler step is
  DDIM.
  """
  alpha, sigma = schedule.alpha(times), schedule.sigma(times)
  keep = sigma[1:] / sigma[:-1]
  current = alpha[1:] - alpha[:-1] * keep
  if times[-1] == 0:
    keep[-1], current[-1] = 0.0, 1.0
  return keep, current


def _steps(
  times: Times, keep: Column, current: Column, *, previous: Column | None = None, noise: Column | None = None
) -> _Table:
  """Returns the table of one network evaluation per interval of the grid."""
  zeros = np.zeros_like(keep)
  return _Table(
    times[:-1],
    keep,
    zeros if previous is None else previous,
    current,
    zeros if noise is None else noise,
    np.ones(len(keep), bool),
  )


def _sampler(table: Callable[..., _Table]) -> Callable[..., State | tuple[State, Trajectory]]:
  """Returns the sampler with the module's arguments whose steps are `table(schedule, times, **options)`.

  It raises UserError for a bad grid.
  """

  def sample(
    denoise: Denoise,
    schedule: Schedule,
    y: State,
    keys: Keys,
    *,
    num_steps: int,
    grid: str = 'uniform',
    t_start: float = 1.0,
    t_end: float = 0.0,
    trajectory: bool = False,
    **options: Any,
  ) -> State | tuple[State, Trajectory]:
    times = time_grid(schedule, grid, num_steps, t_start, t_end)
    return _run(denoise, y, keys, table(schedule, times, **options), trajectory)

  sample.__name__, sample.__qualname__, sample.__doc__ = table.__name__, table.__qualname__, table.__doc__
  sample.options, sample.table = tuple(inspect.signature(table).parameters)[2:], table
  return sample


@_sampler
def sample_ddpm(schedule: Schedule, times: Times, variance: str = 'small') -> _Table:
  """Returns a DDPM ancestral sample (Ho et al. 2020, algorithm 2, arXiv:2006.11239), over any grid.

  y_s is drawn from q(y_s | y_t, x0_hat), with its variance for `variance` 'small' and with
  beta_{t|s} = 1 - alpha_bar_t / alpha_bar_s for 'large'; no noise in the step onto t = 0. 'small'
  is exact for data at a point and 'large' for data of unit variance.

  Raises:
    UserError: if `variance` is neither 'small' nor 'large'.
  """
  if variance not in ('small', 'large'):
    raise UserError(f"sample.variance must be one of ['large', 'small'], got {variance!r}")
  current, keep, noise = posterior_coefficients(times[1:], times[:-1], schedule)
  if variance == 'large':
    noise = schedule.beta(times[1:], times[:-1])
  if times[-1] == 0:
    keep[-1], current[-1], noise[-1] = 0.0, 1.0, 0.0
  return _steps(times, keep, current, noise=np.sqrt(noise))


@_sampler
def sample_ddim(schedule: Schedule, times: Times, eta: float = 0.0) -> _Table:
  """Returns a DDIM sample, first order (Song et al. 2020, eqs. 12 and 16, arXiv:2010.02502).

  y_s = alpha_s x0_hat + sqrt(sigma_s^2 - w^2) eps_hat + w n, with w = eta times the posterior
  standard deviation of q(y_s | y_t, x0): `eta` 0 is deterministic, 1 is `sample_ddpm` with the
  small variance.

  Raises:
    UserError: if `eta` is outside [0, 1].
  """
  if not 0 <= eta <= 1:
    raise UserError(f'sample.eta must be in [0, 1], got {eta}')
  alpha, sigma = schedule.alpha(times), schedule.sigma(times)
  variance = eta**2 * posterior_coefficients(times[1:], times[:-1], schedule)[2]
  # eps_hat = (y - alpha_t x0_hat) / sigma_t is substituted, which leaves coefficients of y and
  # x0_hat.
  keep = np.sqrt(np.maximum(sigma[1:] ** 2 - variance, 0.0)) / sigma[:-1]
  current = alpha[1:] - alpha[:-1] * keep
  if times[-1] == 0:
    keep[-1], current[-1], variance[-1] = 0.0, 1.0, 0.0
  return _steps(times, keep, current, noise=np.sqrt(variance))


@_sampler
def sample_heun(schedule: Schedule, times: Times) -> _Table:
  """Returns a sample of the probability-flow ODE by Heun's second-order method.

  The trapezoidal rule on d(y / sigma) / d(alpha / sigma) = x0_hat, after Karras et al. 2022,
  algorithm 1 (arXiv:2206.00364): a DDIM step, then the same step again with the mean of x0_hat at
  its two ends. The step onto t = 0 is plain DDIM, so 2 num_steps - 1 network evaluations.
  """
  keep, current = ode_coefficients(schedule, times)
  # Rows alternate: predict at t (x0_hat alone), correct at s (half of each x0_hat, from the same
  # y_base).
  corrects = np.tile([False, True], len(keep))
  time = np.stack([times[:-1], times[1:]], axis=1).ravel()
  keep, current = np.repeat(keep, 2), np.repeat(current, 2)
  previous = np.where(corrects, 0.5 * current, 0.0)
  current = np.where(corrects, 0.5 * current, current)
  advance = corrects
  if times[-1] == 0:
    columns = (time, keep, previous, current, advance)
    time, keep, previous, current, advance = (column[:-1] for column in columns)
    advance[-1] = True
  return _Table(time, keep, previous, current, np.zeros_like(keep), advance)


@_sampler
def sample_dpmpp_2m(schedule: Schedule, times: Times) -> _Table:
  """Returns a DPM-Solver++(2M) sample, second order (Lu et al. 2022, arXiv:2211.01095, alg. 2).

  Two-step in the log SNR: with h the steps of log(alpha / sigma), the DDIM step is taken with
  x0_hat + (h_k / 2 h_{k-1}) (x0_hat - x0_hat_previous). First order in the first step, which has no
  previous one, and in the step onto t = 0, where h is infinite.
  """
  keep, step = ode_coefficients(schedule, times)
  last = len(step) if times[-1] > 0 else len(step) - 1
  h = 0.5 * np.diff(schedule.logsnr(times[: last + 1]))
  extrapolation = np.zeros_like(step)
  extrapolation[1:last] = h[1:] / (2 * h[:-1])
  return _steps(times, keep, step * (1 + extrapolation), previous=-step * extrapolation)


@_sampler
def sample_renoise(schedule: Schedule, times: Times) -> _Table:
  """Returns a sample of multistep consistency sampling (Song et al. 2023, alg. 1, arXiv:2303.01469).

  After each x0_hat new noise is drawn: y_s = alpha_s x0_hat + sigma_s n. For networks whose x0_hat is itself
  a sample: consistency models and adversarial students.
  """
  current, noise = schedule.alpha(times[1:]), schedule.sigma(times[1:])
  if times[-1] == 0:
    current[-1], noise[-1] = 1.0, 0.0
  return _steps(times, np.zeros_like(current), current, noise=noise)


@_sampler
def sample_there_and_back(schedule: Schedule, times: Times) -> _Table:
  """Returns a sample of the stochastic sampler for distilled networks (Meng et al. 2023, arXiv:2210.03142).

  Each DDIM step is of twice the length, over two intervals of the grid, and noise takes it one interval back:
  y_s ~ q(y_s | y_r) with r < s. The last interval is a plain DDIM step.
  """
  keep, current = ode_coefficients(schedule, times)
  noise = np.zeros_like(keep)
  if len(keep) > 1:
    start, back, far = times[:-2], times[1:-1], times[2:]
    far_keep = schedule.sigma(far) / schedule.sigma(start)
    far_current = schedule.alpha(far) - schedule.alpha(start) * far_keep
    if times[-1] == 0:
      far_keep[-1], far_current[-1] = 0.0, schedule.alpha(far[-1:]).item()
    ratio = schedule.alpha(back) / schedule.alpha(far)
    keep[:-1], current[:-1] = ratio * far_keep, ratio * far_current
    noise[:-1] = np.sqrt(schedule.beta(far, back))
  return _steps(times, keep, current, noise=noise)


SAMPLERS = {
  'ddpm': sample_ddpm,
  'ddim': sample_ddim,
  'heun': sample_heun,
  'dpmpp_2m': sample_dpmpp_2m,
  'renoise': sample_renoise,
  'there_and_back': sample_there_and_back,
}


def get_sampler(name: str) -> Callable[..., State | tuple[State, Trajectory]]:
  """Returns the sampler called `name`.

  Raises:
    UserError: for an unknown name; the message lists the valid ones.
  """
  if name not in SAMPLERS:
    raise UserError(f'sample.sampler must be one of {sorted(SAMPLERS)}, got {name!r}')
  return SAMPLERS[name]


def options(name: str) -> tuple[str, ...]:
  """Returns the names of what the sampler called `name` takes beside what all of them do."""
  return get_sampler(name).options


def num_function_evaluations(name: str, num_steps: int, t_end: float = 0.0) -> int:
  """Returns how many times the sampler called `name` calls `denoise`.

  Raises:
    UserError: for an unknown name or fewer than one step.
  """
  get_sampler(name)
  if num_steps < 1:
    raise UserError(f'sample.num_steps must be >= 1, got {num_steps}')
  if name != 'heun':
    return num_steps
  return 2 * num_steps if t_end > 0 else 2 * num_steps - 1


def evaluation_times(
  name: str,
  schedule: Schedule,
  *,
  num_steps: int,
  grid: str = 'uniform',
  t_start: float = 1.0,
  **options: Any,
) -> Times:
  """Returns the times at which the sampler called `name` calls `denoise` on its way to t = 0, in order.

  Raises:
    UserError: for an unknown name, or a bad grid or option.
  """
  times = time_grid(schedule, grid, num_steps, t_start)
  return get_sampler(name).table(schedule, times, **options).time
