"""Layers shared by the networks: convolutions, resampling, group norm, time embedding, attention.

Layout is NHWC. Parameters are float32; `dtype` is the type the arithmetic runs in. A 1x1
convolution is a dot product over the last axis, and group norm is written as per-channel sums
followed by one affine map, which runs faster on CPUs than a norm over reshaped groups.

Must not import anything of vaediff but `types` and `errors`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from vaediff.errors import UserError
from vaediff.types import Time

MAX_GROUPS = 32
DTYPES = ('float32', 'bfloat16')
LEAST = -1e9
"""Logit of what is not to be seen: its weight is exactly 0 where anything else is."""
WAVELENGTH = 10_000
"""Of the slowest sine of a position, over that of the fastest."""

# Uniform on +-1/sqrt(fan_in): He et al. 2015 (1502.01852) with a negative slope of sqrt(5), the
# initialisation under which the published VAE and U-Nets were trained.
uniform_fan_in = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def conv3x3(
  features: int,
  *,
  name: str,
  dtype: Any,
  strides: int = 1,
  padding: str | tuple[tuple[int, int], ...] = 'SAME',
  use_bias: bool = True,
  zero_init: bool = False,
) -> nn.Conv:
  """Returns a 3x3 convolution; its kernel starts at zero when `zero_init`, its bias always does."""
  return nn.Conv(
    features,
    kernel_size=(3, 3),
    strides=(strides, strides),
    padding=padding,
    use_bias=use_bias,
    kernel_init=nn.initializers.zeros if zero_init else uniform_fan_in,
    dtype=dtype,
    name=name,
  )


def dense(
  features: int, *, name: str, dtype: Any, use_bias: bool = True, zero_init: bool = False
) -> nn.Dense:
  """Returns a linear map of the last axis; on an NHWC array it is the 1x1 convolution."""
  return nn.Dense(
    features,
    use_bias=use_bias,
    kernel_init=nn.initializers.zeros if zero_init else uniform_fan_in,
    dtype=dtype,
    name=name,
  )


def upsample_nearest(
  x: Float[Array, 'batch height width channels'], factor: int
) -> Float[Array, 'batch height_up width_up channels']:
  """Returns every pixel repeated `factor` times along height and width."""
  batch, height, width, channels = x.shape
  shape = (batch, height, factor, width, factor, channels)
  tiled = jnp.broadcast_to(x[:, :, None, :, None, :], shape)
  return tiled.reshape(batch, height * factor, width * factor, channels)


def average_pool(
  x: Float[Array, 'batch height width channels'], factor: int
) -> Float[Array, 'batch height_down width_down channels']:
  """Returns the means of disjoint `factor` x `factor` windows; `factor` must divide both sides."""
  batch, height, width, channels = x.shape
  windows = x.reshape(batch, height // factor, factor, width // factor, factor, channels)
  return windows.mean(axis=(2, 4))


def num_groups(channels: int) -> int:
  """Returns the largest number of groups, at most 32 and of at least four channels, that divides `channels`.

  It is 32, as published, for every multiple of 32 from 128 on. A group of one channel would take away
  whatever is added to a whole channel, the embedding of t, so narrow networks get fewer groups.
  """
  most = max(1, min(MAX_GROUPS, channels // 4))
  return max(groups for groups in range(1, most + 1) if channels % groups == 0)


class GroupNorm(nn.Module):
  """Group normalisation (Wu and He 2018, 1803.08494, eqs. 1-3) with a learned scale and bias.

  Statistics and the affine map are float32 whatever the input's type, which the output has too.

  Attributes:
    epsilon: added to the variance.
  """

  epsilon: float

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch height width channels']
  ) -> Float[Array, 'batch height width channels']:
    """Returns x with zero mean and unit variance in each group of channels, scaled and shifted."""
    channels = x.shape[-1]
    gamma = self.param('scale', nn.initializers.ones, (channels,))
    beta = self.param('bias', nn.initializers.zeros, (channels,))
    return group_norm(x, gamma[None], beta[None], self.epsilon)


def group_norm(
  x: Float[Array, 'batch height width channels'],
  gamma: Float[Array, '#batch channels'],
  beta: Float[Array, '#batch channels'],
  epsilon: float,
) -> Float[Array, 'batch height width channels']:
  """Returns gamma (x - mean) / sqrt(variance + epsilon) + beta, mean and variance those of each group.

  One pass over x suffices for E[d^2] - E[d]^2 where d is x less a number near its mean. Of x itself the
  difference is lost to rounding where the mean is a hundred deviations, and is below zero at a thousand. The
  number is the mean over the group's channels of the pixel in the middle; whatever it is, the variance is the
  same, so that it has no gradient. It is made first: compilers would make it again at every pixel.
  """
  batch, height, width, channels = x.shape
  groups = num_groups(channels)
  in_group = channels // groups
  values = x.astype(jnp.float32)

  def group_mean(per_channel: Array, size: int) -> Array:
    mean = per_channel.reshape(batch, groups, -1).sum(axis=-1) / size
    return jnp.repeat(mean, in_group, axis=-1)

  near = jax.lax.stop_gradient(group_mean(values[:, height // 2, width // 2], in_group))
  near = jax.lax.optimization_barrier(near)
  difference = values - near[:, None, None, :]
  mean = group_mean(difference.sum(axis=(1, 2)), height * width * in_group)
  squares = group_mean(jnp.square(difference).sum(axis=(1, 2)), height * width * in_group)
  # Rounding can take the difference of two equal numbers below zero.
  variance = jnp.maximum(squares - jnp.square(mean), 0.0)
  scale = gamma * jax.lax.rsqrt(variance + epsilon)
  shift = beta - (near + mean) * scale
  return (values * scale[:, None, None, :] + shift[:, None, None, :]).astype(x.dtype)


def sinusoidal_embedding(
  position: Time, num_features: int, *, sin_first: bool, last_frequency_included: bool
) -> Float[Array, 'batch features']:
  """Returns sines and cosines of `position` at geometrically spaced frequencies, float32.

  Vaswani et al. 2017 (1706.03762), section 3.5, with the two halves side by side: frequencies
  10000^(-i / half), i = 0 ... half - 1.

  Args:
    position: any real number per example.
    num_features: even, at least 4.
    sin_first: [sin, cos] (Ho et al. 2020) instead of [cos, sin] (Nichol and Dhariwal 2021).
    last_frequency_included: divide i by half - 1, so that the lowest frequency is exactly 1/10000.
  """
  half = num_features // 2
  steps = half - 1 if last_frequency_included else half
  frequencies = jnp.exp(-math.log(10_000) * jnp.arange(half, dtype=jnp.float32) / steps)
  angles = position.astype(jnp.float32)[:, None] * frequencies[None, :]
  waves = (jnp.sin(angles), jnp.cos(angles))
  return jnp.concatenate(waves if sin_first else waves[::-1], axis=-1)


def positions(
  height: int, width: int, channels: int, grid: tuple[int, int] | None = None
) -> Float[Array, 'height width channels']:
  """Returns sines and cosines of each position of a map: half the channels of its row, half of its column.

  Of frequencies there are a quarter of the channels, from 1 down; channels that are left are zero. With the
  sides of another `grid` over the same image, positions are counted in its cells.
  """
  count = channels // 4
  frequencies = WAVELENGTH ** -(jnp.arange(count, dtype=jnp.float32) / max(count, 1))
  rows, columns = grid or (height, width)

  def waves(length: int, cells: int) -> Array:
    place = (jnp.arange(length, dtype=jnp.float32) + 0.5) * (cells / length) - 0.5
    angles = place[:, None] * frequencies[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)

  shape = (height, width, 2 * count)
  of_rows = jnp.broadcast_to(waves(height, rows)[:, None], shape)
  of_columns = jnp.broadcast_to(waves(width, columns)[None], shape)
  left = jnp.zeros((height, width, channels - 4 * count))
  return jnp.concatenate([of_rows, of_columns, left], axis=-1)


def coordinates(height: int, width: int) -> Float[Array, 'height width 2']:
  """Returns the row and the column of each position of a map, from -1 at the first to 1 at the last."""
  rows, columns = (jnp.linspace(-1.0, 1.0, side) for side in (height, width))
  return jnp.stack(jnp.meshgrid(rows, columns, indexing='ij'), axis=-1)


def attention(
  query: Float[Array, 'batch query heads channels'],
  key: Float[Array, 'batch position heads channels'],
  value: Float[Array, 'batch position heads channels'],
  *,
  scale: float,
  allowed: Bool[Array, 'batch position'] | None = None,
) -> Float[Array, 'batch query heads channels']:
  """Returns softmax(scale * query key^T) value for each head, with the softmax in float32.

  With `allowed` an example's positions are read only where it is True, which must be at one at least.

  Vaswani et al. 2017 (1706.03762), eq. 1. The square root of `scale` multiplies query and key
  before their product, which keeps the products small in bfloat16. Heads are moved beside the batch
  first: CPUs take up to four times as long for the same products with the heads inside. The softmax's
  division comes after the product with `value`, which has fewer numbers than the weights.
  """
  root = math.sqrt(scale)
  query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query * root, key * root, value))
  logits = jnp.einsum('bhqc,bhkc->bhqk', query, key, preferred_element_type=jnp.float32)
  if allowed is not None:
    logits = jnp.where(allowed[:, None, None], logits, LEAST)
  largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
  weights = jnp.exp(logits - largest)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  gathered = jnp.einsum(
    'bhqk,bhkc->bhqc', weights.astype(value.dtype), value, preferred_element_type=jnp.float32
  )
  return jnp.swapaxes(gathered / total, 1, 2).astype(value.dtype)


def check_dtype(dtype: str) -> None:
  """Raises UserError unless `dtype` names a supported compute type."""
  if dtype not in DTYPES:
    raise UserError(f"model.dtype is '{dtype}'; choose one of {', '.join(DTYPES)}.")
