"""Noise levels tau = sigma_t / alpha_t: how much noise there is, whatever the schedule calls its time.

A distribution of times means nothing without a schedule: at t = 0.73 a rectified flow, alpha_t = 1 - t and
sigma_t = t, has log tau = 1, the linear schedule of DDPM 2.7. So levels are drawn, and times found for them.

Imports jax, numpy, `vaediff.types` and its siblings only.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vaediff.diffusion.schedules import Schedule
from vaediff.types import Time

POINTS = 4096
"""Times at which log tau is tabled to be inverted."""

Level = Float[Array, ' batch']


def levels(schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
  """Returns (t, log tau), rising, over the times that a network of this schedule was trained on."""
  count = schedule.train_steps or POINTS
  t = np.arange(1, count + 1) / count
  return t, -0.5 * schedule.logsnr(t)


def time_of(tau: Level, schedule: Schedule) -> Time:
  """Returns the time whose noise level is tau, at least the first and at most the last trained one."""
  t, log_tau = levels(schedule)
  return jnp.interp(
    jnp.log(jnp.maximum(tau, 1e-20)), jnp.asarray(log_tau, jnp.float32), jnp.asarray(t, jnp.float32)
  )


def at_resolution(mean: float, positions: int, reference: int) -> float:
  """Returns the mean of log tau that hides as much of `positions` as `mean` does of `reference` positions.

  Of n positions that say the same, noise of deviation tau leaves an average of deviation tau / sqrt(n): the
  same is hidden at log tau + log(positions / reference) / 2 (the shift of arXiv:2403.03206, section 5.3.2).
  """
  return mean + 0.5 * math.log(positions / reference)


def sample_level(key: jax.Array, count: int, mean: float, std: float, schedule: Schedule) -> Level:
  """Returns one noise level per example, log-normal, within those of the schedule's times."""
  _, log_tau = levels(schedule)
  drawn = mean + std * jax.random.normal(key, (count,))
  return jnp.exp(jnp.clip(drawn, log_tau[0], log_tau[-1]))
