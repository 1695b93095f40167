"""Distribution matching: the direction that makes samples likelier under one denoiser than under another.

DMD2 (Yin et al. 2024, arXiv:2405.14867) and DMD (arXiv:2311.18828, eqs. 7 and 8). The gradient of the KL
divergence between what a student draws and the data, both noised to t', is the difference of two scores, that
is of two denoisers at the same y_t': one of the data, one of the student's own images.

Imports jax and `vaediff.types` only.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

State = Float[Array, 'batch *shape']


def direction(x0_hat: State, of_data: State, of_student: State) -> State:
  """Returns (of_student - of_data) / mean |x0_hat - of_data|, the mean over all but the first axis.

  The mean takes the scale of the noise level away. Where x0_hat is what the data's denoiser says already, and
  nothing is left to be scaled, the direction is zero.

  Args:
    x0_hat: the student's images.
    of_data: E[x0 | y_t'] under the data.
    of_student: E[x0 | y_t'] under the student's images.
  """
  axes = tuple(range(1, x0_hat.ndim))
  scale = jnp.mean(jnp.abs(x0_hat - of_data), axis=axes, keepdims=True)
  tiny = jnp.finfo(x0_hat.dtype).tiny
  return jnp.where(scale > tiny, (of_student - of_data) / jnp.maximum(scale, tiny), 0.0)


def loss(x0_hat: State, direction: State) -> Float[Array, ' batch']:
  """Returns half the mean of |x0_hat - stop(x0_hat - direction)|^2: its gradient is the direction's."""
  target = jax.lax.stop_gradient(x0_hat - direction)
  return 0.5 * jnp.mean(jnp.square(x0_hat - target), axis=tuple(range(1, x0_hat.ndim)))
