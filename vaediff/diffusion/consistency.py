"""Consistency tuning: a denoiser becomes a map from any state of a trajectory to its end.

Easy Consistency Tuning (Geng et al. 2024, arXiv:2406.14548). Two states of one image and one noise, at the
noise levels tau = sigma_t / alpha_t and r < tau, must be mapped to the same x0:

    log tau ~ N(mean, std^2),    r = tau max(0, 1 - q^-(k+1) (1 + 8 sigmoid(-tau))),
    loss = (1 / tau^2 + 1 / sigma_data^2) (sqrt(|f(y_tau) - sg f(y_r)|^2 + c^2) - c),

with f(y_0) = x0 itself. k counts doublings: a large q starts near r = tau at once. A network that predicts v
has f(y_0) = y_0 and needs no other parameterisation. All is in the shifted state y.

Imports jax and its siblings only.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vaediff.diffusion.levels import Level

SLOPE = 8.0
"""Of the term that brings r nearer to 0 at small tau."""
SIGMA_DATA = 0.5
"""Standard deviation of images in [-1, 1], as in Karras et al. 2022 (arXiv:2206.00364)."""


def earlier(tau: Level, q: float, doublings: Int[Array, '']) -> Level:
  """Returns r, in [0, tau): 0 where the state before is the image itself."""
  gap = q ** -(doublings.astype(jnp.float32) + 1) * (1 + SLOPE * jax.nn.sigmoid(-tau))
  return tau * jnp.maximum(0.0, 1 - gap)


def loss(
  x0_hat: Float[Array, 'batch *shape'], target: Float[Array, 'batch *shape'], tau: Level, c: float
) -> Float[Array, ' batch']:
  """Returns the weighted pseudo-Huber distance of each example; with c = 0 the Euclidean one.

  The sum is over pixels and channels. Where x0_hat is the target itself the gradient is 0.
  """
  squared = jnp.sum((x0_hat - target) ** 2, axis=tuple(range(1, x0_hat.ndim)))
  away = (squared > 0) | (c > 0)
  distance = jnp.where(away, jnp.sqrt(jnp.where(away, squared, 1.0) + c**2) - c, 0.0)
  return (1 / tau**2 + 1 / SIGMA_DATA**2) * distance
