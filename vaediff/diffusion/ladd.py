"""Adversarial distillation on a denoiser's own features: its times, its hinge losses, R1, and its measures.

LADD (Sauer et al. 2024, arXiv:2403.12015) judges x0 by what a frozen denoiser makes of it at a random noise
level, y_t' = alpha_t' x0 + sigma_t' eps with log(sigma_t' / alpha_t') normal. Head k gives one logit per
position p of one map of features, and the losses of one example are means over positions and then over heads:

    L_D = mean_k mean_p [relu(1 - D_k(real)) + relu(1 + D_k(fake))],    L_G = -mean_k mean_p D_k(fake).

All is in the shifted state y: for Formulation 2 as for Formulation 1.

Imports jax, numpy, `vaediff.types`, `vaediff.errors` and its siblings only.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vaediff.diffusion import distillation, levels
from vaediff.diffusion.gaussian import Denoise
from vaediff.diffusion.schedules import Schedule
from vaediff.types import Time

State = Float[Array, 'batch *shape']
Logits = Sequence[Float[Array, 'batch _']]
"""Per head, one logit per position."""
Maps = Sequence[Float[Array, 'batch _ _ _']]

MIN_TIME = 1e-3
"""Least time in continuous time: the first step of the thousand that networks embed."""


def on_trained_times(t: Time, schedule: Schedule) -> Time:
  """Returns the nearest times that the schedule trains on: points 1/T ... 1 of a table, or [0.001, 1]."""
  if schedule.train_steps:
    return jnp.clip(jnp.round(t * schedule.train_steps), 1, schedule.train_steps) / schedule.train_steps
  return jnp.clip(t, MIN_TIME, 1.0)


def sample_renoising_time(key: jax.Array, count: int, mean: float, std: float, schedule: Schedule) -> Time:
  """Returns t' at which log(sigma / alpha) = mean + std n, n ~ N(0, 1), on the schedule's trained times.

  LADD says logit(t') in place of log(sigma / alpha) (arXiv:2403.12015, section 3), of a rectified flow,
  where they are the same: sigma_t / alpha_t = t / (1 - t). A mean above 0 prefers high noise, where the
  features are of structure; at low noise they are of texture.
  """
  level = levels.sample_level(key, count, mean, std, schedule)
  return on_trained_times(levels.time_of(level, schedule), schedule)


def over_heads(values: Logits) -> Float[Array, ' batch']:
  """Returns the mean over heads of the means over positions, per example."""
  return sum(jnp.mean(value, axis=1) for value in values) / len(values)


def discriminator_loss(real: Logits, fake: Logits) -> Float[Array, ' batch']:
  """Returns relu(1 - real) + relu(1 + fake), averaged over heads, per example."""
  return over_heads([jax.nn.relu(1 - r) + jax.nn.relu(1 + f) for r, f in zip(real, fake, strict=True)])


def generator_loss(fake: Logits) -> Float[Array, ' batch']:
  """Returns -fake, averaged over heads, per example."""
  return -over_heads(fake)


def r1_of_heads(judge: Callable[[Maps], Logits], maps: Maps) -> Float[Array, ' batch']:
  """Returns the mean over heads of |grad_h sum_p D_k(h)|^2, h the head's map, per example, float32.

  R1 on the heads' inputs (ADD, Sauer et al. 2023, arXiv:2311.17042, eq. 3): nothing is differentiated through
  the network whose features they are.
  """

  def total(maps: Maps) -> Float[Array, '']:
    return sum(jnp.sum(logits) for logits in judge(maps))

  slopes = jax.grad(total)([x.astype(jnp.float32) for x in maps])
  return sum(jnp.sum(jnp.square(slope), axis=(1, 2, 3)) for slope in slopes) / len(slopes)


def finish(denoise: Denoise, y: State, t: Time, num_calls: int, schedule: Schedule) -> State:
  """Returns x0 where DDIM comes to from y_t in `num_calls` equal steps; with one call, x0_hat itself.

  Args:
    denoise: (y, t) -> x0_hat.
    y: the state at t.
    t: per example, in (0, 1].
    num_calls: at least 1; the times t (1 - k / num_calls) are moved onto those the schedule trains on.
    schedule: gives alpha and sigma.
  """

  def step(y: State, k: jax.Array) -> tuple[State, None]:
    now, after = (on_trained_times(t * (1 - j / num_calls), schedule) for j in (k, k + 1))
    x0_hat = denoise(y, now)
    return jnp.where(k == num_calls - 1, x0_hat, distillation.ddim(y, x0_hat, now, after, schedule)), None

  x0, _ = jax.lax.scan(step, y, jnp.arange(num_calls))
  return x0


def squared_distance(a: State, b: State) -> Float[Array, ' batch']:
  """Returns the mean of (a - b)^2 over all but the first axis."""
  return jnp.mean(jnp.square(a - b), axis=tuple(range(1, a.ndim)))
