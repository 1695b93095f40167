"""The variational bound of DDPM, term by term (Ho et al. 2020, arXiv:2006.11239, eqs. 5, 6, 8, 13).

  -log p(x0) <= KL(q(y_T | x0) || N(0, I)) + sum_{i=2}^T KL(q(y_{i-1} | y_i, x0) || p(y_{i-1} | y_i))
                - E log p(x0 | y_1)

Everything is in the shifted state y, so it holds for both formulations. All terms are in nats per example.
The grid is the table, or any other: its steps have the betas of `schedule.beta(s, t)`, and the sum is a bound
of the model that takes these steps.

The log variance of a step is log Sigma = f log beta + (1 - f) log beta~ (`gaussian.log_variances`): f = 0
('small') and f = 1 ('large') are DDPM's, and a network may have learned f for every pixel (Nichol & Dhariwal
2021, arXiv:2102.09672, eqs. 15 and 16).

Imports jax, numpy, `vaediff.types` and `vaediff.errors` only.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from vaediff.diffusion import gaussian
from vaediff.diffusion.gaussian import Denoise, DenoiseBoth, per_example
from vaediff.diffusion.schedules import Schedule
from vaediff.errors import UserError
from vaediff.types import Image, Keys, Time

HALF_BIN = 1 / 255
"""Half the width of a pixel's bin: 256 values in [-1, 1]."""
VARIANCES = {'small': 0.0, 'large': 1.0}
"""The fraction f of those that are not learned."""


def bits_per_dimension(nats: Float[Array, '...'] | np.ndarray | float, dimensions: int):
  """Returns nats / (dimensions * log 2): 8 for the uniform distribution over bytes."""
  return nats / (dimensions * np.log(2.0))


class Steps(NamedTuple):
  """The steps of a grid, row k from `t` to the time before it; row 0 is the step onto t = 0.

  Attributes:
    t: where the step starts.
    error: g0^2 / beta~: of the squared error of x0_hat, in the divergence at the smallest variance.
    log_low: log beta~.
    log_range: log beta - log beta~.
  """

  t: Float[np.ndarray, ' steps']
  error: Float[np.ndarray, ' steps']
  log_low: Float[np.ndarray, ' steps']
  log_range: Float[np.ndarray, ' steps']


def table_times(schedule: Schedule) -> Float[np.ndarray, ' times']:
  """Returns T/T, ..., 1/T, 0.

  Raises:
    UserError: when the schedule has no table of steps.
  """
  if schedule.train_steps < 2:
    raise UserError('the variational bound is a sum over a table of steps; this schedule is continuous')
  return np.arange(schedule.train_steps, -1, -1) / schedule.train_steps


def steps_of(schedule: Schedule, times: Float[np.ndarray, ' times']) -> Steps:
  """Returns the steps of a decreasing grid that ends at 0, on the host in float64."""
  low, high = gaussian.log_variances(schedule, times)
  g0 = gaussian.posterior_coefficients(times[1:], times[:-1], schedule)[0]
  columns = (times[:-1], g0**2 * np.exp(-low), low, high - low)
  return Steps(*(column[::-1].copy() for column in columns))


def rows(steps: Steps, index: Shaped[Array, ' batch'], like: Array) -> Steps:
  """Returns the row of each example, float32, with axes that broadcast it over `like`."""
  index = index.astype(jnp.int32)
  return Steps(*(per_example(jnp.asarray(column, jnp.float32)[index], like) for column in steps))


def divergence(row: Steps, error: Array, fraction: Array | float) -> Array:
  """Returns KL(q(y_s | y_t, x0) || N(mean at x0_hat, Sigma)) of each pixel, for s > 0.

  Args:
    row: the step of each example, of `rows`.
    error: x0 - x0_hat.
    fraction: f of each pixel, or one for all.
  """
  log_ratio = -fraction * row.log_range  # of beta~ and Sigma
  return 0.5 * (jnp.expm1(log_ratio) - log_ratio + row.error * error**2 * jnp.exp(log_ratio))


def last_step(row: Steps, x0: Array, x0_hat: Array, fraction: Array | float, *, of_bytes: bool) -> Array:
  """Returns -log p(x0 | y) of each pixel, for the step onto t = 0: of N(x0_hat, Sigma).

  Of bytes it is the mass of each pixel's bin (eq. 13), where x0 must hold byte values scaled to [-1, 1], and
  the two outer bins reach to infinity; of other data the density, so that it can be below 0.
  """
  log_variance = row.log_low + fraction * row.log_range
  if of_bytes:
    return -log_discretized_gaussian(x0, x0_hat, jnp.exp(0.5 * log_variance))
  return 0.5 * (np.log(2 * np.pi) + log_variance + (x0 - x0_hat) ** 2 * jnp.exp(-log_variance))


def learned_term(
  steps: Steps,
  x0: Float[Array, 'batch *shape'],
  x0_hat: Float[Array, 'batch *shape'],
  fraction: Float[Array, 'batch *shape'],
  index: Shaped[Array, ' batch'],
  *,
  of_bytes: bool,
) -> Float[Array, ' batch']:
  """Returns the term of one step per example, of a learned variance: `last_step` of row 0, else `divergence`.

  It is what training takes (arXiv:2102.09672, section 3.1), in float32 whatever the arguments have.
  """
  x0, x0_hat, fraction = (x.astype(jnp.float32) for x in (x0, x0_hat, fraction))
  row, last = rows(steps, index, x0), per_example(index == 0, x0)
  # Each of the two forms is given what it can take, whichever is chosen: its gradient must be finite.
  error = jnp.where(last, 0.0, x0 - x0_hat)
  onto_data = last_step(row, x0, jnp.where(last, x0_hat, x0), fraction, of_bytes=of_bytes)
  each = jnp.where(last, onto_data, divergence(row, error, fraction))
  return jnp.sum(each, axis=tuple(range(1, each.ndim)))


def prior_term(x0: Image, schedule: Schedule, t: float = 1.0) -> Float[Array, ' batch']:
  """Returns KL(q(y_t | x0) || N(0, I)), at the first time of the grid."""
  times = jnp.full(x0.shape[0], t)
  alpha, sigma = per_example(schedule.alpha(times), x0), per_example(schedule.sigma(times), x0)
  values = (alpha * x0) ** 2 + sigma**2 - 1 - 2 * jnp.log(sigma)
  return 0.5 * jnp.sum(values, axis=(1, 2, 3))


def _predicted(
  denoise: Denoise | DenoiseBoth, y: Image, t: Time, variance: str
) -> tuple[Image, Image | float]:
  """Returns x0_hat and the fraction f of the log variance."""
  return denoise(y, t) if variance == 'learned' else (denoise(y, t), VARIANCES[variance])


def step_term(
  denoise: Denoise | DenoiseBoth,
  schedule: Schedule,
  steps: Steps,
  x0: Image,
  eps: Image,
  index: Float[Array, ' batch'],
  variance: str,
) -> Float[Array, ' batch']:
  """Returns KL(q(y_s | y_t, x0) || p(y_s | y_t)) for rows >= 1 of the grid's steps, with y_t from eps.

  p has the mean of the posterior at x0_hat, and as variance that of the posterior ('small'), beta ('large',
  right where data have unit variance, and the tighter bound near data), or what is 'learned'.
  """
  row = rows(steps, index, x0)
  t = row.t.reshape(-1)
  x0_hat, fraction = _predicted(denoise, gaussian.q_sample(x0, eps, t, schedule), t, variance)
  return jnp.sum(divergence(row, x0 - x0_hat, fraction), axis=(1, 2, 3))


def decoder_term(
  denoise: Denoise | DenoiseBoth, schedule: Schedule, steps: Steps, x0: Image, eps: Image, variance: str
) -> Float[Array, ' batch']:
  """Returns -log p(x0 | y) of the step onto t = 0, integrated over each pixel's bin (eq. 13).

  Its variance is beta of that step, unless it is learned. x0 must hold byte values scaled to [-1, 1].
  """
  row = rows(steps, jnp.zeros(x0.shape[0]), x0)
  t = row.t.reshape(-1)
  x0_hat, fraction = _predicted(denoise, gaussian.q_sample(x0, eps, t, schedule), t, variance)
  fraction = fraction if variance == 'learned' else VARIANCES['large']
  return jnp.sum(last_step(row, x0, x0_hat, fraction, of_bytes=True), axis=(1, 2, 3))


def log_discretized_gaussian(x: Array, mean: Array, scale: Array) -> Array:
  """Returns log of the mass that N(mean, scale^2) gives to the bin of each byte value x in [-1, 1].

  Computed from the log tail on the side where it is accurate, so that values far from the mean do not
  underflow.
  """
  upper, lower = (x - mean + HALF_BIN) / scale, (x - mean - HALF_BIN) / scale
  # by symmetry both ends are moved to the negative side, where log Phi does not cancel
  flip = lower > 0
  low, high = jnp.where(flip, -upper, lower), jnp.where(flip, -lower, upper)
  log_high, log_low = jax.scipy.stats.norm.logcdf(high), jax.scipy.stats.norm.logcdf(low)
  middle = log_high + jnp.log(-jnp.expm1(jnp.minimum(log_low - log_high, -1e-7)))
  first, last = x < -1 + HALF_BIN, x > 1 - HALF_BIN
  ends = jnp.where(first, jax.scipy.stats.norm.logcdf(upper), jax.scipy.stats.norm.logcdf(-lower))
  return jnp.where(first | last, ends, middle)


def bound_terms(
  denoise: Denoise | DenoiseBoth,
  schedule: Schedule,
  x0: Image,
  keys: Keys,
  num_times: int,
  variance: str,
  times: Float[np.ndarray, ' times'] | None = None,
) -> dict[str, Float[Array, ' batch']]:
  """Returns the three terms of the bound per example, in nats: 'prior', 'steps' and 'decoder'.

  The sum over all steps but the last is estimated without bias from `num_times` stratified ones per example;
  with as many as there are every step is visited once. `variance` is that of the steps; see `step_term`: for
  'learned' `denoise` returns (x0_hat, fraction). `times` is a decreasing grid that ends at 0; None = the
  table.

  Raises:
    UserError: when the schedule has no table of steps, or num_times is not in 1 .. the number of steps - 1.
  """
  times = table_times(schedule) if times is None else times
  steps, num_steps = steps_of(schedule, times), len(times) - 2
  if not 1 <= num_times <= num_steps:
    raise UserError(f'evaluate.num_bound_times must be in 1..{num_steps}, got {num_times}')
  keys = jax.vmap(lambda key: jax.random.split(key))(keys)
  keys_steps, keys_decoder = keys[:, 0], keys[:, 1]

  def noise(column):
    return jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:]))(column)

  def one(total, k):
    both = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, k)))(keys_steps)
    place = jax.vmap(jax.random.uniform)(both[:, 0])
    first, last = k * num_steps // num_times, (k + 1) * num_steps // num_times
    index = jnp.minimum(1 + first + jnp.floor(place * (last - first)), last)
    term = step_term(denoise, schedule, steps, x0, noise(both[:, 1]), index, variance)
    return total + (last - first) * term, None

  summed, _ = jax.lax.scan(one, jnp.zeros(x0.shape[0]), jnp.arange(num_times))
  return {
    'prior': prior_term(x0, schedule, float(times[0])),
    'steps': summed,
    'decoder': decoder_term(denoise, schedule, steps, x0, noise(keys_decoder), variance),
  }
