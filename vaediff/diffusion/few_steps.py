"""The diffusion of the denoising GANs: one to a few large steps of the variance-preserving SDE.

With beta(u) linear from beta_min to beta_max the marginal is (Song et al. 2021, arXiv:2011.13456, eq. 33)

    alpha_bar(u) = exp(-u^2 (beta_max - beta_min) / 2 - u beta_min),

taken at u_i = 0.001 + 0.999 i / T, i = 0 ... T; step i has beta_i = 1 - alpha_bar(u_i) / alpha_bar(u_{i-1}),
and beta_0 = 1e-8 stands before the first (Xiao et al. 2022, arXiv:2112.07804). In the indices here x_t has
t = 0 ... T, x_0 is the data but for that first beta, and

    x_{t+1} = sqrt(1 - beta_{t+1}) x_t + sqrt(beta_{t+1}) n,
    q(x_t | x_{t+1}, x0') = N(c1_t x0' + c2_t x_{t+1}, var_t),  t = 0 ... T - 1; at t = 0 it is x0' itself.

The generator is called with (x_{t+1}, t): the time is that of its target.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vaediff.errors import UserError
from vaediff.types import Image, Keys, Time

FIRST_BETA = 1e-8
FIRST_TIME = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Steps:
  """Coefficients by step, float64 on the host.

  Attributes:
    num_steps: T.
    scale: [T + 1], sqrt(1 - beta_t).
    noise: [T + 1], sqrt(beta_t).
    cumulative_scale: [T + 1], of x0 in x_t.
    cumulative_noise: [T + 1], standard deviation of the noise in x_t.
    of_x0: [T], c1.
    of_x_next: [T], c2.
    posterior_std: [T], sqrt(var).
  """

  num_steps: int
  scale: np.ndarray
  noise: np.ndarray
  cumulative_scale: np.ndarray
  cumulative_noise: np.ndarray
  of_x0: np.ndarray
  of_x_next: np.ndarray
  posterior_std: np.ndarray


def make_steps(num_steps: int, beta_min: float = 0.1, beta_max: float = 20.0) -> Steps:
  """Returns the coefficients of `num_steps` steps.

  Raises:
    UserError: unless num_steps >= 1 and 0 < beta_min <= beta_max.
  """
  if num_steps < 1:
    raise UserError(f'diffusion.num_steps must be >= 1, got {num_steps}')
  if not 0 < beta_min <= beta_max:
    raise UserError(f'diffusion.beta_min and beta_max must be 0 < min <= max, got {beta_min} and {beta_max}')
  u = FIRST_TIME + (1 - FIRST_TIME) * np.arange(num_steps + 1) / num_steps
  alpha_bar = np.exp(-0.5 * u**2 * (beta_max - beta_min) - u * beta_min)
  beta = np.concatenate([[FIRST_BETA], 1 - alpha_bar[1:] / alpha_bar[:-1]])
  cumulative = np.cumprod(np.sqrt(1 - beta))
  beta_t = beta[1:]
  product = np.cumprod(1 - beta_t)
  before = np.concatenate([[1.0], product[:-1]])
  return Steps(
    num_steps=num_steps,
    scale=np.sqrt(1 - beta),
    noise=np.sqrt(beta),
    cumulative_scale=cumulative,
    cumulative_noise=np.sqrt(1 - cumulative**2),
    of_x0=beta_t * np.sqrt(before) / (1 - product),
    of_x_next=(1 - before) * np.sqrt(1 - beta_t) / (1 - product),
    posterior_std=np.sqrt(beta_t * (1 - before) / (1 - product)),
  )


def at(values: np.ndarray, t: Float[Array, ' batch']) -> Float[Array, 'batch 1 1 1']:
  """Returns float32 coefficients of whole-numbered times, ready to multiply images."""
  return jnp.asarray(values, jnp.float32)[t.astype(jnp.int32)][:, None, None, None]


def sample_time(key: jax.Array, count: int, steps: Steps) -> Time:
  """Returns t uniform in 0 ... T - 1, one per example."""
  return jax.random.randint(key, (count,), 0, steps.num_steps).astype(jnp.float32)


def q_sample_pair(x0: Image, t: Time, key: jax.Array, steps: Steps) -> tuple[Image, Image]:
  """Returns (x_t, x_{t+1}), drawn jointly: x_{t+1} is one step from that x_t."""
  key_t, key_next = jax.random.split(key)
  x_t = at(steps.cumulative_scale, t) * x0
  x_t += at(steps.cumulative_noise, t) * jax.random.normal(key_t, x0.shape)
  x_next = at(steps.scale[1:], t) * x_t + at(steps.noise[1:], t) * jax.random.normal(key_next, x0.shape)
  return x_t, x_next


def posterior_sample(x0_hat: Image, x_next: Image, t: Time, noise: Image, steps: Steps) -> Image:
  """Returns x_t ~ q(x_t | x_{t+1}, x0_hat) for unit `noise`; x0_hat itself at t = 0."""
  mean = at(steps.of_x0, t) * x0_hat + at(steps.of_x_next, t) * x_next
  return mean + at(steps.posterior_std, t) * noise


def sample(
  generate: Callable[[Image, Time, Float[Array, 'batch nz']], Image],
  steps: Steps,
  noise: Image,
  keys: Keys,
  latent_dim: int,
) -> Image:
  """Returns x0 after T steps from x_T = `noise`; every step has a z and a noise of its own.

  Args:
    generate: (x_{t+1}, t, z) -> x0_hat.
    steps: the diffusion.
    noise: x_T, unit variance.
    keys: one per image; image i depends on its own alone.
    latent_dim: size of z.
  """

  def step(x_next, t):
    at_step = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, t)))(keys)
    z = jax.vmap(lambda key: jax.random.normal(key, (latent_dim,)))(at_step[:, 0])
    fresh = jax.vmap(lambda key: jax.random.normal(key, x_next.shape[1:]))(at_step[:, 1])
    time = jnp.full(x_next.shape[0], t, jnp.float32)
    return posterior_sample(generate(x_next, time, z), x_next, time, fresh, steps), None

  x0, _ = jax.lax.scan(step, noise, jnp.arange(steps.num_steps)[::-1])
  return x0
