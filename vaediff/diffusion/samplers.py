"""Samplers: from the state y at t_start to x0, in one compiled scan.

Every sampler here is linear in what it has seen: each network evaluation is followed by

    y_next = keep * y_base + previous * x0_hat_previous + current * x0_hat + noise * n,

with n ~ N(0, I), so a sampler is a table of these numbers, computed on the host in float64 from the
time grid, and one `lax.scan` runs them all. The noise estimate is thereby always the one implied by
y and x0_hat, so clipping inside `denoise` stays consistent. The step onto t = 0 returns x0_hat
itself, without noise or arithmetic. Two options need a second map of the network beside x0_hat
(`second_output`): then `denoise` returns both, and the equation has one term more, or a noise that differs
between pixels.

All take `(denoise, schedule, y, keys, *, num_steps, grid, t_start, t_end, trajectory, change)` and
their own options:

  denoise: (y, t) -> x0_hat, with one t per example; it hides network, condition, guidance and
    formulation.
  schedule: gives alpha_t and sigma_t.
  y: the state at `t_start`, float32: noise N(0, I) for t_start = 1, alpha_t x0_vae + sigma_t eps to
    refine an image from t_start < 1.
  keys: one PRNG key per example, used for nothing else. The noise of step k of example i depends on
    keys[i] and k alone, so example i is the same for every batch size. Unused where the sampler
    adds no noise.
  num_steps: steps from t_start to t_end, at least 1.
  grid: a name in `ALL_GRIDS`; see `grids.time_grid`.
  t_start, t_end: Python numbers, 0 <= t_end < t_start <= 1. At t_end > 0 the result is y at t_end,
    not x0.
  trajectory: if set, the result is (x0, states) with the states at the times of the grid, an array
    [num_steps + 1, batch, ...]; the first is y and the last is x0.
  change: of the table's columns, by name and on the host, those that are others in this run; see
    `noise_correction.less_noise`. None = none.

Imports jax, numpy, `vaediff.types` and `vaediff.errors` only.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vaediff.diffusion.flows import Column, ode_coefficients, sde_coefficients
from vaediff.diffusion.gaussian import Denoise, DenoiseBoth, log_variances, posterior_coefficients
from vaediff.diffusion.grids import ALL_GRIDS, GRIDS, Times, time_grid  # noqa: F401
from vaediff.diffusion.schedules import Schedule
from vaediff.errors import UserError
from vaediff.types import Keys

State = Float[Array, 'batch *shape']
Trajectory = Float[Array, 'times batch *shape']

FRACTION = 'fraction'
UNCLIPPED = 'unclipped'
"""What `denoise` returns beside x0_hat: the fraction of a learned log variance, or x0_hat before clipping."""


@dataclasses.dataclass(frozen=True)
class _Table:
  """One row per network evaluation at `time`, with the coefficients of the module's equation.

  `advance` rows make y_next the new y_base and are the steps of the grid; the others are
  intermediate. With `unclipped`, or `log_low` and `log_high`, `denoise` returns a second map m: then y_next
  has unclipped * m more, or n is multiplied by exp((log_low + m (log_high - log_low)) / 2), pixel by pixel.
  """

  time: Column
  keep: Column
  previous: Column
  current: Column
  noise: Column
  advance: np.ndarray
  unclipped: Column | None = None
  log_low: Column | None = None
  log_high: Column | None = None


NUMBERS = ('time', 'keep', 'previous', 'current', 'noise', 'unclipped', 'log_low', 'log_high')
Change = Callable[[Mapping[str, Column]], Mapping[str, Array]]


def _run(
  denoise: Denoise | DenoiseBoth,
  y: State,
  keys: Keys,
  table: _Table,
  trajectory: bool,
  change: Change | None = None,
) -> State | tuple[State, Trajectory]:
  """Returns the last state, and with `trajectory` the states of all grid times, by one scan."""
  y = y.astype(jnp.float32)
  noisy = bool(np.any(table.noise))
  columns = {name: getattr(table, name) for name in NUMBERS if getattr(table, name) is not None}
  rows = {name: jnp.asarray(column, jnp.float32) for name, column in columns.items()}
  rows |= change(columns) if change is not None else {}
  two_maps = not rows.keys().isdisjoint({'unclipped', 'log_low'})
  rows |= {'advance': jnp.asarray(table.advance), 'k': jnp.arange(len(table.time))}

  def step(carry, row):
    base, state, x0_previous = carry
    t = jnp.broadcast_to(row['time'], y.shape[:1])
    found = denoise(state, t)
    x0_hat, more = found if two_maps else (found, None)
    x0_hat = x0_hat.astype(jnp.float32)
    state = row['keep'] * base + row['previous'] * x0_previous + row['current'] * x0_hat
    if 'unclipped' in row:
      state += row['unclipped'] * more
    if noisy:
      scale = row['noise']
      if 'log_low' in row:
        scale *= jnp.exp(0.5 * (row['log_low'] + more * (row['log_high'] - row['log_low'])))
      state += scale * jax.vmap(
        lambda key: jax.random.normal(jax.random.fold_in(key, row['k']), y.shape[1:])
      )(keys)
    base = jnp.where(row['advance'], state, base)
    return (base, state, x0_hat), state if trajectory else None

  (x0, _, _), states = jax.lax.scan(step, (y, y, jnp.zeros_like(y)), rows)
  if not trajectory:
    return x0
  return x0, jnp.concatenate([y[None], states[np.flatnonzero(table.advance)]])


def _steps(
  times: Times,
  keep: Column,
  current: Column,
  *,
  previous: Column | None = None,
  noise: Column | None = None,
  **second: Column,
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
    **second,
  )


@dataclasses.dataclass(frozen=True)
class Sampler:
  """A sampler with the module's arguments, whose steps are the rows of a table.

  Attributes:
    table: (schedule, times, **options) -> the coefficients of its steps.
  """

  table: Callable[..., _Table]

  @property
  def options(self) -> tuple[str, ...]:
    """Names of what it takes beside what all samplers do."""
    return tuple(inspect.signature(self.table).parameters)[2:]

  def __call__(
    self,
    denoise: Denoise | DenoiseBoth,
    schedule: Schedule,
    y: State,
    keys: Keys,
    *,
    num_steps: int,
    grid: str = 'uniform',
    t_start: float = 1.0,
    t_end: float = 0.0,
    trajectory: bool = False,
    change: Change | None = None,
    **options: Any,
  ) -> State | tuple[State, Trajectory]:
    """Returns x0, or y at `t_end`, and with `trajectory` all states; see the module.

    Raises:
      UserError: for a bad grid or option.
    """
    times = time_grid(schedule, grid, num_steps, t_start, t_end)
    return _run(denoise, y, keys, self.table(schedule, times, **options), trajectory, change)


VARIANCES = ('small', 'large', 'learned')
"""Of the steps of DDPM."""


def ddpm_table(schedule: Schedule, times: Times, variance: str = 'small') -> _Table:
  """Returns the coefficients of DDPM ancestral sampling (Ho et al. 2020, algorithm 2) over any grid.

  arXiv:2006.11239. y_s is drawn from q(y_s | y_t, x0_hat), with its variance for `variance` 'small' and with
  beta_{t|s} = 1 - alpha_bar_t / alpha_bar_s for 'large'; no noise in the step onto t = 0. 'small'
  is exact for data at a point and 'large' for data of unit variance. With 'learned' `denoise` returns
  (x0_hat, fraction), and the variance is that of `gaussian.log_variances`, pixel by pixel.

  Raises:
    UserError: if `variance` is none of these.
  """
  if variance not in VARIANCES:
    raise UserError(f'sample.variance must be one of {sorted(VARIANCES)}, got {variance!r}')
  current, keep, noise = posterior_coefficients(times[1:], times[:-1], schedule)
  if variance == 'large':
    noise = schedule.beta(times[1:], times[:-1])
  second = {}
  if variance == 'learned':
    noise = np.ones_like(noise)
    second = dict(zip(('log_low', 'log_high'), log_variances(schedule, times), strict=True))
  if times[-1] == 0:
    keep[-1], current[-1], noise[-1] = 0.0, 1.0, 0.0
  return _steps(times, keep, current, noise=np.sqrt(noise), **second)


def ddim_table(schedule: Schedule, times: Times, eta: float = 0.0, recompute_eps: bool = True) -> _Table:
  """Returns the coefficients of DDIM, first order (Song et al. 2020, eqs. 12 and 16, arXiv:2010.02502).

  y_s = alpha_s x0_hat + sqrt(sigma_s^2 - w^2) eps_hat + w n, with w = eta times the posterior
  standard deviation of q(y_s | y_t, x0): `eta` 0 is deterministic, 1 is DDPM with the
  small variance. eps_hat is that of the clipped x0_hat, or, without `recompute_eps`, the network's own: then
  `denoise` returns (x0_hat clipped, x0_hat as it was), as DiffuseVAE's code does.

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
  if times[-1] == 0:
    keep[-1], variance[-1] = 0.0, 0.0
  of_eps, current = -alpha[:-1] * keep, alpha[1:].copy()
  if recompute_eps:
    current += of_eps
  if times[-1] == 0:
    current[-1] = 1.0
  second = {} if recompute_eps else {'unclipped': of_eps}
  return _steps(times, keep, current, noise=np.sqrt(variance), **second)


def heun_table(schedule: Schedule, times: Times) -> _Table:
  """Returns the coefficients of Heun's second-order method for the probability-flow ODE.

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


def dpmpp_2m_table(schedule: Schedule, times: Times) -> _Table:
  """Returns the coefficients of DPM-Solver++(2M), second order (Lu et al. 2022, arXiv:2211.01095, alg. 2).

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


def renoise_table(schedule: Schedule, times: Times) -> _Table:
  """Returns the coefficients of multistep consistency sampling (Song et al. 2023, alg. 1, arXiv:2303.01469).

  After each x0_hat new noise is drawn: y_s = alpha_s x0_hat + sigma_s n. For networks whose x0_hat is itself
  a sample: consistency models and adversarial students.
  """
  current, noise = schedule.alpha(times[1:]), schedule.sigma(times[1:])
  if times[-1] == 0:
    current[-1], noise[-1] = 1.0, 0.0
  return _steps(times, np.zeros_like(current), current, noise=noise)


def there_and_back_table(schedule: Schedule, times: Times) -> _Table:
  """Returns the coefficients of the stochastic sampler for distilled networks (Meng et al. 2023).

  arXiv:2210.03142. Each DDIM step is of twice the length, over two intervals of the grid, and noise takes it
  one interval back: y_s ~ q(y_s | y_r) with r < s. The last interval is a plain DDIM step.
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


def euler_maruyama_table(schedule: Schedule, times: Times) -> _Table:
  """Returns the coefficients of Euler-Maruyama for the reverse SDE; see `flows.sde_coefficients`."""
  keep, current, noise = sde_coefficients(schedule, times)
  return _steps(times, keep, current, noise=noise)


SAMPLERS = {
  'ddpm': Sampler(ddpm_table),
  'ddim': Sampler(ddim_table),
  'heun': Sampler(heun_table),
  'dpmpp_2m': Sampler(dpmpp_2m_table),
  'renoise': Sampler(renoise_table),
  'there_and_back': Sampler(there_and_back_table),
  'euler_maruyama': Sampler(euler_maruyama_table),
}


def get_sampler(name: str) -> Sampler:
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


def second_output(name: str, options: Mapping[str, Any]) -> str:
  """Returns the name of what a sampler with these options takes beside x0_hat; '' = nothing."""
  own = get_sampler(name).options
  if 'variance' in own and options['variance'] == 'learned':
    return FRACTION
  return UNCLIPPED if 'recompute_eps' in own and not options['recompute_eps'] else ''


def evaluation_times(
  name: str,
  schedule: Schedule,
  *,
  num_steps: int,
  grid: str = 'uniform',
  t_start: float = 1.0,
  t_end: float = 0.0,
  **options: Any,
) -> Times:
  """Returns the times at which the sampler called `name` calls `denoise` on its way to `t_end`, in order.

  Raises:
    UserError: for an unknown name, or a bad grid or option.
  """
  sampler, times = get_sampler(name), time_grid(schedule, grid, num_steps, t_start, t_end)
  return sampler.table(schedule, times, **options).time
