"""Ranges of numbers -> quantizers: how wide the steps of weights and activations are.

    q = clip(round(x / scale) + zero, low, high),    x_q = scale (q - zero)

Weights are symmetric, zero = 0, and have a scale for every output channel, and one for each half of a skip
concatenation. Their largest magnitude is the first and last step ('max'), or less than that, where the loss
by clipping is smaller than that by coarse steps ('mse': Q-Diffusion's search, Li et al. 2023, 2302.04304,
over shrunk ranges, of |x - x_q|^2.4). Activations are asymmetric; what is handed over of them is a range that
holds 0.

numpy and jax only.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

POWER = 2.4
"""Of the error that the search minimises."""
SHRINK = tuple(1 - 0.01 * i for i in range(80))
"""Of the widest range: 80 points, the widest first, so that of two as good the wider one is taken."""
WEIGHTS = ('max', 'mse')
"""Rules of the scales of weights."""
ACTIVATIONS = ('minmax', 'percentile', 'mse')
"""Rules of the ranges of activations."""
LEAST = 1e-12
"""A scale: kernels of zeros, as last layers of blocks begin, have one too."""


def largest(bits: int) -> int:
  """Returns the largest whole number of a symmetric quantizer: 127, or 7 of four bits."""
  return 2 ** (bits - 1) - 1


def nearest(kernel: Float[Array, '*shape'], scale: Float[Array, '...'], bits: int) -> Int[Array, '*shape']:
  """Returns round(kernel / scale), half to even, clipped, int8; `scale` has as many axes as the kernel."""
  top = largest(bits)
  return jnp.clip(jnp.round(kernel / scale), -top, top).astype(jnp.int8)


def kernel_scale(
  kernel: Float[Array, '... inputs outputs'],
  bits: int,
  rule: str,
  slices: tuple[slice, ...] = (slice(None),),
) -> Float[Array, 'parts outputs']:
  """Returns the scale of each part of the input channels and output channel, by a rule of `WEIGHTS`.

  Args:
    kernel: of a convolution or a linear map.
    bits: 8 or 4.
    rule: 'max' or 'mse'.
    slices: of the input channels, one for each part.
  """
  parts = [kernel[..., part, :].reshape(-1, kernel.shape[-1]) for part in slices]
  of_part = _largest_scale if rule == 'max' else _searched_scale
  return jnp.stack([of_part(part, bits) for part in parts])


def spread(
  scale: Float[Array, 'parts outputs'], shape: tuple[int, ...], slices: tuple[slice, ...] = (slice(None),)
) -> Float[Array, '... inputs outputs']:
  """Returns the scale of each input and output channel, that of its part, with axes of 1 before them.

  Args:
    scale: of each part.
    shape: of the kernel.
    slices: of its input channels, one for each part, in order.
  """
  sizes = [len(range(shape[-2])[part]) for part in slices]
  each = jnp.repeat(scale, np.asarray(sizes), axis=0, total_repeat_length=shape[-2])
  return each.reshape(*(1,) * (len(shape) - 2), *shape[-2:])


def _largest_scale(flat: Float[Array, 'elements outputs'], bits: int) -> Float[Array, ' outputs']:
  return jnp.maximum(jnp.max(jnp.abs(flat), axis=0), LEAST) / largest(bits)


@functools.partial(jax.jit, static_argnames='bits')
def _searched_scale(flat: Float[Array, 'elements outputs'], bits: int) -> Float[Array, ' outputs']:
  """Returns, of the shrunk widest scales, that with the least error of each output channel."""
  widest = _largest_scale(flat, bits)[None]
  # in units of the widest range, so that no power of a small number is lost
  unit = flat / (widest * largest(bits))

  def error(shrink: Array) -> Array:
    step = jnp.full((1, 1), shrink / largest(bits))
    back = step * nearest(unit, step, bits)
    return jnp.sum(jnp.abs(unit - back) ** POWER, axis=0)

  shrinks = jnp.asarray(SHRINK, jnp.float32)
  return widest[0] * shrinks[jnp.argmin(jax.lax.map(error, shrinks), axis=0)]


def activation_range(
  values: Float[np.ndarray, ' values'],
  low: float,
  high: float,
  rule: str,
  percentile: float = 100.0,
  bits: int = 8,
) -> tuple[float, float]:
  """Returns the range of activations that is quantized, by a rule of `ACTIVATIONS`; 0 is in it.

  Args:
    values: a sample of them.
    low: the least of all, of which `values` are a sample.
    high: the largest of all.
    rule: 'minmax': all of them; 'percentile': all but a share of 1 - percentile / 100 at each end; 'mse': the
      widest range shrunk as that of weights.
    percentile: in (50, 100].
    bits: of the numbers.
  """
  low, high = min(float(low), 0.0), max(float(high), 0.0)
  if rule == 'minmax' or low == high or not len(values):
    return low, high
  if rule == 'percentile':
    ends = np.percentile(values, [100 - percentile, percentile])
    return max(low, min(float(ends[0]), 0.0)), min(high, max(float(ends[1]), 0.0))
  shrinks = np.asarray(SHRINK)
  errors = [affine_error(values, low * shrink, high * shrink, bits) for shrink in shrinks]
  best = shrinks[int(np.argmin(errors))]
  return low * best, high * best


def affine_error(values: Float[np.ndarray, ' values'], low: float, high: float, bits: int) -> float:
  """Returns the mean of |x - x_q|^2.4 of an asymmetric quantizer of a range with 0 in it; host, float64."""
  steps = 2**bits - 1
  scale = (high - low) / steps
  zero = np.rint(-low / scale)
  q = np.clip(np.rint(np.asarray(values, np.float64) / scale) + zero, 0, steps)
  return float(np.mean(np.abs(values - scale * (q - zero)) ** POWER))
