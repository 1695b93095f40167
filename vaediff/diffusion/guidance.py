"""Functions from a denoiser to a denoiser: guidance by weaker branches or a classifier, and thresholding.

At a fixed y_t, x0, eps and v are affine in one another, so guiding x0 guides all three. All branches
of guidance must see the same y_t: in Formulation 2 the unconditional network reads x_t with a zero
shift, that is y_t itself, with the null condition. So must a classifier: gradients with respect to x_t and
y_t agree, but one that was trained on y_t and is given x_t looks at another place.

Guidance can be limited to an interval of the noise level sigma_t / alpha_t (Kynkaanniemi et al. 2024,
arXiv:2404.07724): outside of it the weights are 0, and what is not needed is not computed.

Imports jax, numpy, `vaediff.types` and `vaediff.errors` only.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from vaediff.diffusion.gaussian import Denoise, per_example
from vaediff.diffusion.schedules import Schedule, TimeLike
from vaediff.errors import UserError
from vaediff.types import Time

Interval = tuple[int | float, int | float] | tuple[()]
"""(low, high): low < sigma_t / alpha_t <= high; () = always."""
SAME_LEVEL = 1e-4
LogProb = Callable[[Float[Array, 'batch *shape'], Time], Float[Array, ' batch']]
"""(y_t, t) -> log p(c | y_t) of each example."""


def inside(interval: Interval, schedule: Schedule, t: TimeLike) -> Bool[Array, '...'] | np.ndarray:
  """Returns where sigma_t / alpha_t is in the interval; of NumPy times on the host, in float64.

  A level within a relative `SAME_LEVEL` of an end counts as the end, so that float32 and float64 agree.
  """
  if not interval:
    return (jnp if isinstance(t, jax.Array) else np).ones(np.shape(t), bool)
  low, high = (math.log(level) + SAME_LEVEL if level > 0 else -math.inf for level in interval)
  level = -0.5 * schedule.logsnr(t)
  return (low < level) & (level <= high)


def levels(schedule: Schedule) -> tuple[float, float]:
  """Returns the least and the largest sigma_t / alpha_t at which a network is trained."""
  first = 1 / schedule.train_steps if schedule.train_steps else 0.0
  low, high = (math.exp(-0.5 * float(schedule.logsnr(t))) for t in (first, 1.0))
  return low, high


def check_interval(interval: Interval, schedule: Schedule) -> None:
  """Raises UserError unless an interval is () or (low, high), and meets the levels of the schedule."""
  if not interval:
    return
  least, most = levels(schedule)
  low, high = interval
  if not (0 <= low < high and low < most and high > least):
    raise UserError(
      'sample.guidance_interval must be () or (low, high) of sigma / alpha with 0 <= low < high, and the '
      f'schedule has levels from {least:.4g} to {most:.4g}; got {tuple(interval)}'
    )


def guided(
  denoise: Denoise,
  weaker: Sequence[Denoise],
  weights: Sequence[int | float | Float[Array, ' batch']],
  schedule: Schedule | None = None,
  interval: Interval = (),
) -> Denoise:
  """Returns the guided denoiser, x0 = (1 + sum_k w_k) x0_hat - sum_k w_k x0_hat_k.

  With one weaker branch that reads no condition it is classifier-free guidance (Ho & Salimans 2022, eq. 6,
  arXiv:2207.12598): weight 0 is the conditional denoiser itself, -1 the unconditional one. With a network
  that is worse at the same task it is autoguidance (Karras et al. 2024, arXiv:2406.02507). A branch whose
  weight is the number 0 is never called, and none where no example is inside the interval.

  Args:
    denoise: (y_t, t) -> x0_hat given all conditions.
    weaker: (y_t, t) -> x0_hat of each weaker branch, which has no shift where it drops that condition.
    weights: w_k, Python numbers, or one per example.
    schedule: gives the levels; only an interval needs it.
    interval: of sigma_t / alpha_t, outside of which all weights are 0.
  """
  pairs = [
    (branch, weight)
    for branch, weight in zip(weaker, weights, strict=True)
    if not (isinstance(weight, int | float) and weight == 0)
  ]
  if not pairs:
    return denoise

  def combined(y: Float[Array, 'batch *shape'], t: Time) -> Float[Array, 'batch *shape']:
    strong = denoise(y, t)
    if not interval:
      return away(strong, [w for _, w in pairs], y, t)
    within = inside(interval, schedule, t)
    limited = [jnp.where(within, w, 0.0) for _, w in pairs]
    return jax.lax.cond(jnp.any(within), lambda: away(strong, limited, y, t), lambda: strong)

  def away(strong: Array, weights: list[int | float | Array], y: Array, t: Time) -> Array:
    each = [per_example(w, y) if isinstance(w, jax.Array) else w for w in weights]
    x0_hat = (1 + sum(each)) * strong
    for (branch, _), w in zip(pairs, each, strict=True):
      x0_hat = x0_hat - w * branch(y, t)
    return x0_hat

  return combined


def with_classifier(
  denoise: Denoise, log_prob: LogProb, scale: int | float, schedule: Schedule, interval: Interval = ()
) -> Denoise:
  """Returns the denoiser guided by a classifier, x0 = x0_hat + s (sigma_t^2 / alpha_t) grad_y log p(c | y_t).

  Dhariwal & Nichol 2021 (arXiv:2105.05233), algorithm 2, eps - s sigma_t grad, written in x0: the gradient is
  at y_t and in float32, and no clipping comes before it. The factor is large at high noise, where the
  gradient is small: clip afterwards. Where no example is inside the interval no gradient is taken.

  Args:
    denoise: (y_t, t) -> x0_hat.
    log_prob: (y_t, t) -> log p(c | y_t), where example i depends on row i alone.
    scale: s; 1 is Bayes' rule.
    schedule: gives alpha_t and sigma_t.
    interval: of sigma_t / alpha_t, outside of which s is 0.
  """
  if scale == 0:
    return denoise

  def step(y: Float[Array, 'batch *shape'], t: Time) -> Float[Array, 'batch *shape']:
    gradient = jax.grad(lambda y: jnp.sum(log_prob(y, t)))(y.astype(jnp.float32))
    factor = scale * jnp.square(schedule.sigma(t)) / schedule.alpha(t)
    return per_example(jnp.where(inside(interval, schedule, t), factor, 0.0), y) * gradient

  def combined(y: Float[Array, 'batch *shape'], t: Time) -> Float[Array, 'batch *shape']:
    x0_hat = denoise(y, t).astype(jnp.float32)
    if not interval:
      return x0_hat + step(y, t)
    anywhere = jnp.any(inside(interval, schedule, t))
    return jax.lax.cond(anywhere, lambda: x0_hat + step(y, t), lambda: x0_hat)

  return combined


def clip(denoise: Denoise, low: float = -1.0, high: float = 1.0) -> Denoise:
  """Returns the denoiser with x0_hat clipped to [low, high], the range of the data."""

  def clipped(y: Float[Array, 'batch *shape'], t: Time) -> Float[Array, 'batch *shape']:
    return jnp.clip(denoise(y, t), low, high)

  return clipped


def threshold(denoise: Denoise, percentile: float = 99.5) -> Denoise:
  """Returns the denoiser with dynamic thresholding: x0_hat clipped to [-m, m] and divided by m.

  m is the `percentile` of |x0_hat| over the pixels and channels of one example, and at least 1, so
  the result is in [-1, 1]. Imagen, section 2.3 (arXiv:2205.11487).

  Raises:
    UserError: if `percentile` is outside (0, 100].
  """
  if not 0 < percentile <= 100:
    raise UserError(f'sample.threshold_percentile must be in (0, 100], got {percentile}')

  def thresholded(y: Float[Array, 'batch *shape'], t: Time) -> Float[Array, 'batch *shape']:
    x0_hat = denoise(y, t)
    magnitudes = jnp.abs(x0_hat).reshape(x0_hat.shape[0], -1)
    bound = jnp.maximum(jnp.quantile(magnitudes, percentile / 100, axis=1), 1.0)
    bound = per_example(bound, x0_hat)
    return jnp.clip(x0_hat, -bound, bound) / bound

  return thresholded
