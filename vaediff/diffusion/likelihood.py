"""The variational bound of DDPM, term by term (Ho et al. 2020, arXiv:2006.11239, eqs. 5, 6, 8, 13).

  -log p(x0) <= KL(q(y_T | x0) || N(0, I)) + sum_{i=2}^T KL(q(y_{i-1} | y_i, x0) || p(y_{i-1} | y_i))
                - E log p(x0 | y_1)

Everything is in the shifted state y, so it holds for both formulations. All terms are in nats per example.

Imports jax, numpy, `vaediff.types` and `vaediff.errors` only.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vaediff.diffusion import gaussian
from vaediff.diffusion.gaussian import Denoise, per_example
from vaediff.diffusion.schedules import Schedule
from vaediff.errors import UserError
from vaediff.types import Image, Keys

HALF_BIN = 1 / 255
"""Half the width of a pixel's bin: 256 values in [-1, 1]."""


def bits_per_dimension(nats: Float[Array, '...'] | np.ndarray | float, dimensions: int):
  """Returns nats / (dimensions * log 2): 8 for the uniform distribution over bytes."""
  return nats / (dimensions * np.log(2.0))


def prior_term(x0: Image, schedule: Schedule) -> Float[Array, ' batch']:
  """Returns KL(q(y_T | x0) || N(0, I))."""
  t = jnp.ones(x0.shape[0])
  alpha, sigma = per_example(schedule.alpha(t), x0), per_example(schedule.sigma(t), x0)
  values = (alpha * x0) ** 2 + sigma**2 - 1 - 2 * jnp.log(sigma)
  return 0.5 * jnp.sum(values, axis=(1, 2, 3))


def step_term(
  denoise: Denoise,
  schedule: Schedule,
  x0: Image,
  eps: Image,
  index: Float[Array, ' batch'],
  variance: str,
) -> Float[Array, ' batch']:
  """Returns KL(q(y_{i-1} | y_i, x0) || p(y_{i-1} | y_i)) for table indices i in 2..T, with y_i from eps.

  p has the mean of the posterior at x0_hat, and as variance that of the posterior ('small') or beta_i
  ('large', right where data have unit variance, and the tighter bound at small i).
  """
  s, t = (index - 1) / schedule.train_steps, index / schedule.train_steps
  x0_hat = denoise(gaussian.q_sample(x0, eps, t, schedule), t)
  g0, _, posterior = gaussian.posterior_coefficients(s, t, schedule)
  chosen = posterior if variance == 'small' else schedule.beta(s, t)
  ratio = posterior / chosen
  spread = 0.5 * x0[0].size * (ratio - 1 - jnp.log(ratio))
  return spread + g0**2 / (2 * chosen) * jnp.sum((x0 - x0_hat) ** 2, axis=(1, 2, 3))


def decoder_term(denoise: Denoise, schedule: Schedule, x0: Image, eps: Image) -> Float[Array, ' batch']:
  """Returns -log p(x0 | y_1) of a Gaussian at x0_hat(y_1), integrated over each pixel's bin (eq. 13).

  Its variance is beta_1; the two outer bins reach to infinity. x0 must hold byte values scaled to [-1, 1].
  """
  t = jnp.full(x0.shape[0], 1 / schedule.train_steps)
  x0_hat = denoise(gaussian.q_sample(x0, eps, t, schedule), t)
  scale = jnp.sqrt(schedule.beta(jnp.zeros_like(t), t))
  return -jnp.sum(log_discretized_gaussian(x0, x0_hat, per_example(scale, x0)), axis=(1, 2, 3))


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
  denoise: Denoise, schedule: Schedule, x0: Image, keys: Keys, num_times: int, variance: str
) -> dict[str, Float[Array, ' batch']]:
  """Returns the three terms of the bound per example, in nats: 'prior', 'steps' and 'decoder'.

  The sum over i = 2..T is estimated without bias from `num_times` stratified table indices per example;
  with num_times = T - 1 every index is visited once. `variance` is that of the steps; see `step_term`.

  Raises:
    UserError: when the schedule has no table of steps, or num_times is not in 1..T - 1.
  """
  num_steps = schedule.train_steps - 1
  if num_steps < 1:
    raise UserError('the variational bound is a sum over a table of steps; this schedule is continuous')
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
    index = 2 + first + jnp.floor(place * (last - first))
    term = step_term(denoise, schedule, x0, noise(both[:, 1]), jnp.minimum(index, 1 + last), variance)
    return total + (last - first) * term, None

  steps, _ = jax.lax.scan(one, jnp.zeros(x0.shape[0]), jnp.arange(num_times))
  return {
    'prior': prior_term(x0, schedule),
    'steps': steps,
    'decoder': decoder_term(denoise, schedule, x0, noise(keys_decoder)),
  }
