"""DDIM inversion: the noise x_T that an image is made of, x0 -> x_T -> x0.

The probability-flow ODE runs from t_low to 1 with the Euler steps of DDIM in the other direction: x0_hat is
evaluated at the lower noise of each interval, where y is known, and not at the higher, as on the way back
(Song et al. 2020, arXiv:2010.02502, section 4.3). So the two differ, by the order of the step. Noise of a
sampler (eta > 0) cannot be inverted: there is none here.

t_low is the first point of a table and the time of level 0.002 else: at 0 the ODE in x0_hat has no slope. The
image is taken for the state there, from which it differs by less than one step of a byte.

Imports jax, numpy and its own room only.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vaediff.diffusion.flows import ode_coefficients
from vaediff.diffusion.gaussian import Denoise
from vaediff.diffusion.restoration import time_of_level
from vaediff.diffusion.samplers import SAMPLERS, time_grid
from vaediff.diffusion.schedules import Schedule
from vaediff.types import Keys

State = Float[Array, 'batch *shape']
LOWEST_LEVEL = 0.002
"""sigma / alpha of t_low in continuous time, that of the Karras grid."""


def lowest_time(schedule: Schedule) -> float:
  """Returns t_low, at which images are taken for states."""
  return 1 / schedule.train_steps if schedule.train_steps else time_of_level(schedule, LOWEST_LEVEL)


def invert(
  denoise: Denoise, schedule: Schedule, x0: State, *, num_steps: int, grid: str = 'uniform'
) -> State:
  """Returns x_T, the state at t = 1 that the ODE takes x0 to.

  Args:
    denoise: (y, t) -> x0_hat.
    schedule: gives alpha_t and sigma_t.
    x0: images, or maps of them.
    num_steps: evaluations of `denoise`, at least 1.
    grid: of times, as that of a sampler.

  Raises:
    UserError: for a bad grid.
  """
  times = time_grid(schedule, grid, num_steps, 1.0, lowest_time(schedule))[::-1]
  keep, current = ode_coefficients(schedule, times)
  rows = tuple(jnp.asarray(column, jnp.float32) for column in (times[:-1], keep, current))

  def step(y: State, row: tuple[Array, Array, Array]) -> tuple[State, None]:
    time, keep, current = row
    x0_hat = denoise(y, jnp.broadcast_to(time, y.shape[:1])).astype(jnp.float32)
    return keep * y + current * x0_hat, None

  return jax.lax.scan(step, x0.astype(jnp.float32), rows)[0]


def round_trip(
  denoise: Denoise, schedule: Schedule, x0: State, keys: Keys, *, num_steps: int, grid: str = 'uniform'
) -> tuple[State, State]:
  """Returns (x_T, x0 again): inverted, and back by DDIM over the same grid; `keys` are not used for noise."""
  x_T = invert(denoise, schedule, x0, num_steps=num_steps, grid=grid)
  low = lowest_time(schedule)
  back = SAMPLERS['ddim'](denoise, schedule, x_T, keys, num_steps=num_steps, grid=grid, t_end=low)
  return x_T, back
