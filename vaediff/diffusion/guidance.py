"""Functions from a denoiser to a denoiser: classifier-free guidance and thresholding.

At a fixed y_t, x0, eps and v are affine in one another, so guiding x0 guides all three. All branches
of guidance must see the same y_t: in Formulation 2 the unconditional network reads x_t with a zero
shift, that is y_t itself, with the null condition.

Imports jax, numpy, `vaediff.types` and `vaediff.errors` only.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vaediff.diffusion.gaussian import Denoise, per_example
from vaediff.errors import UserError
from vaediff.types import Time


def guided(
  denoise: Denoise,
  weaker: Sequence[Denoise],
  weights: Sequence[int | float | Float[Array, ' batch']],
) -> Denoise:
  """Returns the guided denoiser, x0 = (1 + sum_k w_k) x0_hat - sum_k w_k x0_hat_k.

  With one weaker branch that reads no condition it is classifier-free guidance (Ho & Salimans 2022, eq. 6,
  arXiv:2207.12598): weight 0 is the conditional denoiser itself, -1 the unconditional one. A branch whose
  weight is the number 0 is never called.

  Args:
    denoise: (y_t, t) -> x0_hat given all conditions.
    weaker: (y_t, t) -> x0_hat of each weaker branch, which has no shift where it drops that condition.
    weights: w_k, Python numbers, or one per example.
  """
  pairs = [
    (branch, weight)
    for branch, weight in zip(weaker, weights, strict=True)
    if not (isinstance(weight, int | float) and weight == 0)
  ]
  if not pairs:
    return denoise

  def combined(y: Float[Array, 'batch *shape'], t: Time) -> Float[Array, 'batch *shape']:
    each = [per_example(w, y) if isinstance(w, jax.Array) else w for _, w in pairs]
    x0_hat = (1 + sum(each)) * denoise(y, t)
    for (branch, _), w in zip(pairs, each, strict=True):
      x0_hat = x0_hat - w * branch(y, t)
    return x0_hat

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
