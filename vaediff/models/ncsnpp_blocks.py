"""The parts of the NCSN++ generator: adaptive group norm, embeddings, residual and attention blocks.

NCSN++ is Song et al. 2021 (2011.13456), appendix H. Xiao et al. 2022 (2112.07804) gave it, through adaptive
group norms, the latent variable z that makes the denoising distribution multimodal. Every sum of two branches
is divided by sqrt(2), so that variances stay put, and layers that end a branch start at (almost) zero.

Must not import diffusion, experiments, run, config or data.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vaediff.models import layers, resampling
from vaediff.types import Latent, Time

GROUP_NORM_EPSILON = 1e-6
PIXEL_NORM_EPSILON = 1e-8
ATTENTION_INIT_SCALE = 0.1
INV_SQRT2 = 1 / math.sqrt(2)

FeatureMap = Float[Array, 'batch height width channels']
Style = Float[Array, 'batch style']
Embedding = Float[Array, 'batch embedding']


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockOptions:
  """What all blocks of one network share.

  Attributes:
    dropout: rate inside residual blocks, in [0, 1).
    deterministic: dropout is off.
    remat: recompute each block's activations in the backward pass instead of storing them.
    dtype: compute type.
  """

  dropout: float
  deterministic: bool
  remat: bool
  dtype: Any


def fan_average(scale: float) -> jax.nn.initializers.Initializer:
  """Returns uniform kernels of variance scale / fan_avg (Glorot and Bengio 2010, eq. 16, for scale 1).

  A scale of 0 stands for 1e-10: as good as zero in the output, but gradients pass.
  """
  return nn.initializers.variance_scaling(max(scale, 1e-10), 'fan_avg', 'uniform')


def conv3x3(
  features: int,
  *,
  name: str,
  dtype: Any,
  scale: float = 1.0,
  strides: int = 1,
  padding: str = 'SAME',
  groups: int = 1,
) -> nn.Conv:
  """Returns a 3x3 convolution with kernels drawn by `fan_average(scale)` and a bias of zero."""
  return nn.Conv(
    features,
    kernel_size=(3, 3),
    strides=(strides, strides),
    padding=padding,
    feature_group_count=groups,
    kernel_init=fan_average(scale),
    dtype=dtype,
    name=name,
  )


def dense(features: int, *, name: str, dtype: Any, scale: float = 1.0, use_bias: bool = True) -> nn.Dense:
  """Returns a linear map of the last axis; on an NHWC array it is the 1x1 convolution."""
  return nn.Dense(features, use_bias=use_bias, kernel_init=fan_average(scale), dtype=dtype, name=name)


class TimeEmbedding(nn.Module):
  """Sines and cosines of the time index, then linear, SiLU, linear.

  Attributes:
    frequencies: numbers of sines and cosines together; even, at least 4.
    features: width of the hidden layer and of the output.
    dtype: compute type of the linear maps.
  """

  frequencies: int
  features: int
  dtype: Any

  @nn.compact
  def __call__(self, t: Time) -> Embedding:
    """Returns the embedding of the index t, a float of any size."""
    waves = layers.sinusoidal_embedding(t, self.frequencies, sin_first=True, last_frequency_included=True)
    h = dense(self.features, name='dense_0', dtype=self.dtype)(waves)
    return dense(self.features, name='dense_1', dtype=self.dtype)(nn.silu(h))


class LatentMapping(nn.Module):
  """The network that makes a style of z (Karras et al. 2019, 1812.04948, section 2), float32.

  Attributes:
    features: width of every layer and of the style.
    num_layers: layers after the first.
  """

  features: int
  num_layers: int

  @nn.compact
  def __call__(self, z: Latent) -> Style:
    """Returns the style: z over its root mean square, then layers of a linear map and SiLU."""
    z = z.astype(jnp.float32)
    h = z * jax.lax.rsqrt(jnp.mean(jnp.square(z), axis=-1, keepdims=True) + PIXEL_NORM_EPSILON)
    for i in range(1 + self.num_layers):
      h = nn.silu(dense(self.features, name=f'dense_{i}', dtype=jnp.float32)(h))
    return h


class AdaptiveGroupNorm(nn.Module):
  """Group norm whose scale gamma and shift beta are linear in the style (AdaGN).

  The bias of that map starts at gamma = 1, beta = 0: a style of zero gives the plain norm. Statistics and the
  affine map are float32 whatever the input's type, which the output has too. There are min(C / 4, 32) groups,
  or the next smaller number that divides C.
  """

  @nn.compact
  def __call__(self, x: FeatureMap, style: Style) -> FeatureMap:
    """Returns gamma(style) * normalised x + beta(style)."""
    channels = x.shape[-1]
    affine = nn.Dense(
      2 * channels, kernel_init=fan_average(1.0), bias_init=_ones_then_zeros, dtype=jnp.float32, name='style'
    )(style)
    gamma, beta = jnp.split(affine, 2, axis=-1)
    return layers.group_norm(x, gamma, beta, GROUP_NORM_EPSILON)


def _ones_then_zeros(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
  """Returns gamma = 1 for the first half, beta = 0 for the second; the key is not used."""
  return jnp.concatenate([jnp.ones(shape[0] // 2, dtype), jnp.zeros(shape[0] // 2, dtype)])


class ResidualBlock(nn.Module):
  """The BigGAN residual block of NCSN++ with adaptive norms, optionally halving or doubling the sides.

  Attributes:
    features: channels of the output.
    resample: 'none', 'down' or 'up': both branches are resampled by two, before the first convolution.
    options: shared by all blocks.
  """

  features: int
  resample: Literal['none', 'down', 'up']
  options: BlockOptions

  @nn.compact
  def __call__(
    self, x: FeatureMap, emb: Embedding, style: Style
  ) -> Float[Array, 'batch height_out width_out features']:
    """Returns (x + branch(x)) / sqrt(2)."""
    dtype = self.options.dtype
    resample = {
      'none': lambda h: h,
      'down': resampling.fir_downsample,
      'up': resampling.fir_upsample,
    }[self.resample]
    h = nn.silu(AdaptiveGroupNorm(name='norm_1')(x, style))
    h, skip = resample(h), resample(x)
    h = conv3x3(self.features, name='conv_1', dtype=dtype)(h)
    h = embed_and_convolve(h, emb, style, self.options)
    if self.resample != 'none' or x.shape[-1] != self.features:
      skip = dense(self.features, name='skip', dtype=dtype)(skip)
    return (skip + h) * INV_SQRT2


def embed_and_convolve(h: FeatureMap, emb: Embedding, style: Style, options: BlockOptions) -> FeatureMap:
  """Returns the second half of a residual branch; its layers belong to the module that calls this."""
  features = h.shape[-1]
  h = h + dense(features, name='emb', dtype=options.dtype)(nn.silu(emb))[:, None, None, :]
  h = nn.silu(AdaptiveGroupNorm(name='norm_2')(h, style))
  h = nn.Dropout(options.dropout, deterministic=options.deterministic, name='dropout')(h)
  return conv3x3(features, name='conv_2', dtype=options.dtype, scale=0.0)(h)


class AttentionBlock(nn.Module):
  """Self-attention of one head between all positions of a map.

  Attributes:
    options: shared by all blocks.
  """

  options: BlockOptions

  @nn.compact
  def __call__(self, x: FeatureMap) -> FeatureMap:
    """Returns (x + what its positions gather from each other) / sqrt(2)."""
    batch, height, width, channels = x.shape
    dtype = self.options.dtype
    h = layers.GroupNorm(epsilon=GROUP_NORM_EPSILON, name='norm')(x)
    query, key, value = (
      dense(channels, name=name, dtype=dtype, scale=ATTENTION_INIT_SCALE)(h).reshape(
        batch, height * width, 1, channels
      )
      for name in ('query', 'key', 'value')
    )
    h = layers.attention(query, key, value, scale=channels**-0.5)
    h = dense(channels, name='out', dtype=dtype, scale=0.0)(h.reshape(batch, height, width, channels))
    return (x + h) * INV_SQRT2


class PyramidDown(nn.Module):
  """One step of the input pyramid: blur, then a stride-2 convolution.

  Attributes:
    features: channels of the output.
    dtype: compute type.
  """

  features: int
  dtype: Any

  @nn.compact
  def __call__(self, x: FeatureMap) -> Float[Array, 'batch height_down width_down features']:
    """Returns the next, half as large, level of the pyramid."""
    conv = conv3x3(self.features, name='conv', dtype=self.dtype, strides=2, padding='VALID')
    return conv(resampling.blur(x))


def rematerialised(block: type[nn.Module], options: BlockOptions) -> type[nn.Module]:
  """Returns the block's class, rematerialised if asked for; parameters are the same either way."""
  return nn.remat(block) if options.remat else block
