"""Relaxed discrete codes: Gumbel-softmax, its KL to uniform codes, its schedules, and the logit-Laplace.

The discrete VAE of DALL-E (Ramesh et al. 2021, 2102.12092, section 2.1 and appendix A). At each position the
encoder gives K logits l. Training mixes all codes (Jang et al. 2017, 1611.01144; Maddison et al. 2017,
1611.00712),

  y = softmax((l + g) / tau), g = -log(-log u), u ~ U(0, 1),   z = y E

with a temperature tau that falls, and afterwards the code is argmax l: without noise and without tau. The
prior is uniform, so that with q = softmax(l), whatever tau is,

  KL(q || uniform) = sum_k q_k log q_k + log K   per position, in [0, log K]

The logit-Laplace is a density on (0, 1), of pixels that a margin m keeps away from both ends:
x' = (1 - 2 m) x + m for x in [0, 1]. Of a density the negative logarithm may be below zero: it is no code
length, and no bits per dimension.

Everything is pure functions of arrays, and float32. Must not import flax.linen, diffusion, experiments, run,
config or data.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Key

from vaediff.types import Image, Scalar

Logits = Float[Array, '*positions codes']
"""One for each of K codes, along the last axis."""

# Gumbel-softmax ---------------------------------------------------------------------------------------


def gumbel(key: Key[Array, ''], shape: tuple[int, ...]) -> Array:
  """Returns g = -log(-log u), float32, u in the open interval (0, 1): always finite."""
  return jax.random.gumbel(key, shape, jnp.float32)


def relax(logits: Logits, noise: Logits, tau: float | Scalar) -> Logits:
  """Returns y = softmax((l + g) / tau), float32: weights of the codes, nearly all on one where tau is small.

  The largest is subtracted before the division, so that a tau of 1e-6 overflows nothing.
  """
  noisy = logits.astype(jnp.float32) + noise
  noisy -= jax.lax.stop_gradient(jnp.max(noisy, axis=-1, keepdims=True))
  return jax.nn.softmax(noisy / tau, axis=-1)


def straight_through(y: Logits) -> Logits:
  """Returns 1 for the largest weight and 0 for the others, with the gradient of y."""
  hard = jax.nn.one_hot(jnp.argmax(y, axis=-1), y.shape[-1], dtype=y.dtype)
  # the bracket first: it is zero exactly
  return hard + (y - jax.lax.stop_gradient(y))


def mix(y: Logits, codes: Float[Array, 'codes dim']) -> Float[Array, '*positions dim']:
  """Returns z = y E, the codes in the proportions of the weights."""
  return jnp.matmul(y, codes.astype(jnp.float32))


def most_likely(logits: Logits) -> Integer[Array, '*positions']:
  """Returns the ids: argmax l, the first of equals, int32."""
  return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def kl_to_uniform(logits: Logits) -> Float[Array, '*positions']:
  """Returns KL(softmax(l) || uniform) per position, nats in [0, log K]; of the untempered logits.

  Rounding may take equal logits a little below zero.
  """
  log_q = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  return jnp.sum(jnp.exp(log_q) * log_q, axis=-1) + math.log(logits.shape[-1])


# Schedules --------------------------------------------------------------------------------------------


def temperature(step: int | Integer[Array, ''], start: float, end: float, num_steps: int) -> Scalar:
  """Returns tau after `step` updates: half a cosine from `start` to `end` in `num_steps`, then `end`."""
  done = _done(step, num_steps)
  return end + (start - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))


def warmed_up(step: int | Integer[Array, ''], weight: float, num_steps: int) -> Scalar:
  """Returns a weight that grows in proportion from 0 to `weight` in `num_steps` updates, and stays there."""
  return weight * _done(step, num_steps)


def _done(step: int | Integer[Array, ''], num_steps: int) -> Scalar:
  """Returns how much of `num_steps` is over, in [0, 1]; all of none."""
  return jnp.minimum(jnp.asarray(step, jnp.float32) / num_steps, 1.0) if num_steps else jnp.float32(1.0)


# Logit-Laplace ----------------------------------------------------------------------------------------


def map_pixels(x: Image, margin: float) -> Image:
  """Returns x' = (1 - 2 m) (x + 1) / 2 + m, in [m, 1 - m], of pixels x in [-1, 1]."""
  return (0.5 - margin) * (x + 1.0) + margin


def image_of(mu: Image, margin: float) -> Image:
  """Returns the pixels whose x' is sigmoid(mu), in [-1, 1] and up to m / (0.5 - m) beyond: not clipped."""
  return (jax.nn.sigmoid(mu) - margin) / (0.5 - margin) - 1.0


def logit_laplace_nll(x: Image, mu: Image, log_b: Image, margin: float) -> Image:
  """Returns -log p(x') per pixel, in nats of the density of x' in (0, 1); it may be below zero.

  ln 2 + ln b + ln x' + ln(1 - x') + |logit x' - mu| / b, 2102.12092, eq. 3.

  Args:
    x: pixels in [-1, 1].
    mu: logit of the median of x'.
    log_b: ln b, the scale.
    margin: m in (0, 0.5); at 0 a black or white pixel has an infinite logit.
  """
  mapped = map_pixels(x, margin)
  low, high = jnp.log(mapped), jnp.log1p(-mapped)
  return math.log(2.0) + log_b + low + high + jnp.abs(low - high - mu) * jnp.exp(-log_b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def floored(log_b: Image, least: float) -> Image:
  """Returns max(ln b, least), with a gradient below `least` too where a descent along it would raise ln b.

  Without a floor the scale falls on every pixel that is known exactly, such as a white background, and the
  rest of the image counts for nothing beside it. A plain maximum would leave what is below it there for good.
  """
  return jnp.maximum(log_b, least)


def _floored_forward(log_b: Image, least: float) -> tuple[Image, Array]:
  return jnp.maximum(log_b, least), log_b > least


def _floored_backward(least: float, is_above: Array, gradient: Image) -> tuple[Image]:
  del least
  return (jnp.where(is_above | (gradient < 0), gradient, 0.0),)


floored.defvjp(_floored_forward, _floored_backward)
