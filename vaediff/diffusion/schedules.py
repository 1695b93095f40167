"""Noise schedules: alpha_t, sigma_t and logsnr_t of y_t = alpha_t x0 + sigma_t eps.

Variance preserving: alpha_t^2 = alpha_bar_t, sigma_t^2 = 1 - alpha_bar_t, logsnr_t = log(alpha_t^2
/ sigma_t^2). Time t is in [0, 1]: 0 is data, 1 is noise. Everything follows from log alpha_bar
through expm1, so that no difference of nearly equal numbers is ever taken. A NumPy or Python t is
computed on the host in float64; a jax t is computed where it lives, in its own precision.

Imports jax, numpy, `vaediff.types` and `vaediff.errors` only.
"""

import dataclasses
import functools
import inspect
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vaediff.errors import UserError
from vaediff.types import Time

TimeLike = Float[Array, '...'] | Float[np.ndarray, '...'] | float


def _namespace(t: TimeLike) -> tuple[Any, Any]:
  """Returns (numpy, t as float64) for a host value and (jax.numpy, t) for a jax array."""
  return (jnp, t) if isinstance(t, jax.Array) else (np, np.asarray(t, np.float64))


@runtime_checkable
class Schedule(Protocol):
  """A variance-preserving schedule; a subclass gives `log_alpha_bar` and inherits the rest.

  Attributes:
    train_steps: T when training draws t from the table {1/T, ..., 1}; 0 when it draws t from (0,
      1].
  """

  train_steps: int

  def log_alpha_bar(self, t: TimeLike) -> TimeLike:
    """Returns log alpha_bar_t = 2 log alpha_t, never positive and strictly decreasing in t."""
    ...

  def alpha(self, t: TimeLike) -> TimeLike:
    """Returns alpha_t = sqrt(alpha_bar_t), the coefficient of x0."""
    log_alpha_bar = self.log_alpha_bar(t)
    return _namespace(log_alpha_bar)[0].exp(0.5 * log_alpha_bar)

  def sigma(self, t: TimeLike) -> TimeLike:
    """Returns sigma_t = sqrt(1 - alpha_bar_t), the coefficient of eps."""
    log_alpha_bar = self.log_alpha_bar(t)
    xp = _namespace(log_alpha_bar)[0]
    return xp.sqrt(-xp.expm1(log_alpha_bar))

  def logsnr(self, t: TimeLike) -> TimeLike:
    """Returns log(alpha_t^2 / sigma_t^2), in nats; +inf where sigma_t = 0."""
    log_alpha_bar = self.log_alpha_bar(t)
    xp = _namespace(log_alpha_bar)[0]
    with np.errstate(divide='ignore'):
      return log_alpha_bar - xp.log(-xp.expm1(log_alpha_bar))

  def beta(self, s: TimeLike, t: TimeLike) -> TimeLike:
    """Returns beta_{t|s} = 1 - alpha_bar_t / alpha_bar_s, the variance of q(y_t | y_s), s < t."""
    log_ratio = self.log_alpha_bar(t) - self.log_alpha_bar(s)
    return -_namespace(log_ratio)[0].expm1(log_ratio)


class BetaTable(Schedule):
  """A table of betas: alpha_bar_i = prod_{j<=i} (1 - beta_j), alpha_bar_0 = 1.

  Exact at t = i/T; between table points log alpha_bar is linear in t. A subclass gives `betas`.
  """

  def betas(self) -> Float[np.ndarray, ' steps']:
    """Returns beta_i for i = 1..T, float64, in (0, 1)."""
    raise NotImplementedError

  @functools.cached_property
  def table(self) -> Float[np.ndarray, ' points']:
    """Returns log alpha_bar_i for i = 0..T, float64."""
    return np.concatenate([[0.0], np.cumsum(np.log1p(-self.betas()))])

  def log_alpha_bar(self, t: TimeLike) -> TimeLike:
    """Returns log alpha_bar_t, interpolated linearly between table points; exactly 0 at t = 0."""
    xp, t = _namespace(t)
    table = xp.asarray(self.table, t.dtype)
    position = t * self.train_steps
    below = xp.clip(xp.floor(position), 0, self.train_steps - 1)
    fraction = position - below
    index = below.astype(np.int32)
    return table[index] * (1 - fraction) + table[index + 1] * fraction


@dataclasses.dataclass(frozen=True)
class LinearBeta(BetaTable):
  """The linear beta table of DDPM (Ho et al. 2020, section 4, arXiv:2006.11239).

  beta_i runs linearly from `beta_min` at i = 1 to `beta_max` at i = T.

  Raises:
    UserError: if the table has no step, or a beta lies outside (0, 1) or the two are out of order.
  """

  train_steps: int = 1000
  beta_min: float = 1e-4
  beta_max: float = 0.02

  def __post_init__(self):
    if self.train_steps < 1:
      raise UserError(f'schedule.train_steps must be >= 1 for linear, got {self.train_steps}')
    if not 0 < self.beta_min <= self.beta_max < 1:
      raise UserError(
        'schedule.beta_min and schedule.beta_max must satisfy 0 < beta_min <= beta_max < 1, got '
        f'beta_min={self.beta_min}, beta_max={self.beta_max}'
      )

  def betas(self) -> Float[np.ndarray, ' steps']:
    """Returns beta_i for i = 1..T, float64."""
    return np.linspace(self.beta_min, self.beta_max, self.train_steps)


@dataclasses.dataclass(frozen=True)
class SqrtLinearBeta(LinearBeta):
  """The beta table of latent diffusion: sqrt(beta_i) is linear (Rombach et al. 2022, arXiv:2112.10752)."""

  beta_min: float = 0.0015
  beta_max: float = 0.0195

  def betas(self) -> Float[np.ndarray, ' steps']:
    """Returns beta_i for i = 1..T, float64."""
    return np.linspace(self.beta_min**0.5, self.beta_max**0.5, self.train_steps) ** 2


@dataclasses.dataclass(frozen=True)
class IddpmCosine(BetaTable):
  """The cosine beta table of Improved DDPM (Nichol & Dhariwal 2021, eq. 17, arXiv:2102.09672).

  alpha_bar = cos^2((t + s) / (1 + s) pi / 2) over its value at t = 0, with s = `OFFSET`, and no beta above
  `LARGEST_BETA`. It is not `Cosine`, which is continuous and has bounded logsnr.

  Raises:
    UserError: if the table has no step.
  """

  train_steps: int = 1000

  OFFSET: ClassVar[float] = 0.008
  LARGEST_BETA: ClassVar[float] = 0.999

  def __post_init__(self):
    if self.train_steps < 1:
      raise UserError(f'schedule.train_steps must be >= 1 for iddpm_cosine, got {self.train_steps}')

  def betas(self) -> Float[np.ndarray, ' steps']:
    """Returns beta_i for i = 1..T, float64; the last one alone is clipped, for T of hundreds and more."""
    t = np.arange(self.train_steps + 1) / self.train_steps
    alpha_bar = np.cos((t + self.OFFSET) / (1 + self.OFFSET) * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], self.LARGEST_BETA)


@dataclasses.dataclass(frozen=True)
class Cosine(Schedule):
  """The cosine schedule, alpha_t = cos(pi t / 2) with bounded logsnr (arXiv:2202.00512).

  logsnr_t = -2 log tan(a t + b), with tan(b) = exp(-logsnr_max / 2) and tan(a + b) =
  exp(-logsnr_min / 2). sigma_0 is small but not zero: exp(-10) at the default bounds.
  `train_steps` > 0 makes training draw t from a table of that many points.

  Raises:
    UserError: if the bounds are out of order or `train_steps` is negative.
  """

  logsnr_min: float = -20.0
  logsnr_max: float = 20.0
  train_steps: int = 0

  def __post_init__(self):
    if not self.logsnr_min < self.logsnr_max:
      raise UserError(
        'schedule.logsnr_min must be below schedule.logsnr_max, got '
        f'logsnr_min={self.logsnr_min}, logsnr_max={self.logsnr_max}'
      )
    if self.train_steps < 0:
      raise UserError(f'schedule.train_steps must be >= 0 (0: continuous), got {self.train_steps}')

  def logsnr(self, t: TimeLike) -> TimeLike:
    """Returns logsnr_t in [logsnr_min, logsnr_max], nats."""
    xp, t = _namespace(t)
    from_data = np.arctan(np.exp(-0.5 * self.logsnr_max))
    from_noise = np.arctan(np.exp(0.5 * self.logsnr_min))
    slope = np.pi / 2 - from_data - from_noise
    # tan = sin / cos with cos(angle) = sin(pi/2 - angle): both angles are sums of positive terms,
    # so the float32 logsnr is as accurate near t = 1 as near t = 0.
    log_sin = xp.log(xp.sin(float(slope) * t + float(from_data)))
    log_cos = xp.log(xp.sin(float(slope) * (1 - t) + float(from_noise)))
    return 2 * (log_cos - log_sin)

  def log_alpha_bar(self, t: TimeLike) -> TimeLike:
    """Returns log alpha_bar_t = log sigmoid(logsnr_t)."""
    logsnr = self.logsnr(t)
    return -_namespace(logsnr)[0].logaddexp(0.0, -logsnr)


SCHEDULES = {
  'linear': LinearBeta,
  'sqrt_linear': SqrtLinearBeta,
  'iddpm_cosine': IddpmCosine,
  'cosine': Cosine,
}


def make_schedule(name: str, **options: Any) -> Schedule:
  """Returns the schedule called `name`, with `options` in place of its defaults.

  Raises:
    UserError: for an unknown name or option; the message lists the valid ones.
  """
  if name not in SCHEDULES:
    raise UserError(f'schedule.name must be one of {sorted(SCHEDULES)}, got {name!r}')
  valid = list(inspect.signature(SCHEDULES[name]).parameters)
  for option in options:
    if option not in valid:
      raise UserError(f'schedule.{option} is not an option of schedule {name!r}; it has {valid}')
  return SCHEDULES[name](**options)


def sample_time(schedule: Schedule, key: jax.Array, batch: int) -> Time:
  """Returns one training time per example, uniform on {1/T, ..., 1} or, continuous, on (0, 1].

  Args:
    schedule: its `train_steps` is T; 0 is continuous time.
    key: one PRNG key, used once.
    batch: number of examples.
  """
  if schedule.train_steps:
    index = jax.random.randint(key, (batch,), 1, schedule.train_steps + 1)
    return index.astype(jnp.float32) / schedule.train_steps
  return 1.0 - jax.random.uniform(key, (batch,))
