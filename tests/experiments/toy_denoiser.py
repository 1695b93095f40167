"""Gaussian images, whose exact denoiser is linear in y: a network of slopes, and its exact parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vaediff.models.functional import Model

KNOTS = 16


class Line(nn.Module):
  """v = a(t) y, with a(t) piecewise linear between 17 times: enough for Gaussian data."""

  @nn.compact
  def __call__(self, x_t, t, values={}, drop={}, *, deterministic=True):  # noqa: B006
    slopes = self.param('slopes', nn.initializers.zeros, (KNOTS + 1,))
    hats = jnp.maximum(0.0, 1 - jnp.abs(KNOTS * t[:, None] - jnp.arange(KNOTS + 1)[None, :]))
    return (hats @ slopes)[:, None, None, None] * x_t


def model(size: int) -> Model:
  image = jax.ShapeDtypeStruct((1, size, size, 1), jnp.float32)
  return Model(module=Line(), inputs=(image, jax.ShapeDtypeStruct((1,), jnp.float32), {}))


def diffusion(like, schedule, optimizer):
  """Returns a diffusion with a network of slopes that predicts v and is not clipped, and it as a teacher."""
  denoiser = dataclasses.replace(
    like.denoiser, model=model(8), schedule=schedule, prediction='v', clip='none'
  )
  toy = dataclasses.replace(like, denoiser=denoiser, optimizer=optimizer)
  return toy, dataclasses.replace(denoiser, network='teacher')


def exact(schedule, std: float):
  """Returns the parameters of E[x0 | y] for x0 ~ N(0, std^2), exact at the knots."""
  t = np.arange(KNOTS + 1) / KNOTS
  alpha, sigma = schedule.alpha(t), schedule.sigma(t)
  slopes = alpha * sigma * (1 - std**2) / (alpha**2 * std**2 + sigma**2)
  return {'slopes': jnp.asarray(slopes, jnp.float32)}


def batch(std: float, k: jax.Array, count: int = 16, size: int = 8):
  """Returns images of x0 ~ N(0, std^2), uint8."""
  x0 = std * jax.random.normal(jax.random.fold_in(jax.random.key(2), k), (count, size, size, 1))
  return {'image': jnp.clip(jnp.round(127.5 * (x0 + 1)), 0, 255).astype(jnp.uint8)}
