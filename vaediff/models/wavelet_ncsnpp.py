"""The wavelet generator of WaveDiff (Phung, Dao and Tran 2023, 2211.16152).

An NCSN++ whose maps are halved and doubled by the Haar transform instead of a filter. Halving keeps the low
band LL for the way on and hands the three high bands to the way up, which puts them back where it doubles.
The middle of the network treats the low band apart, and the pyramid of the input is made of all four bands.
The orthonormal low band of a constant is twice the constant: layers read half of it.

Must not import diffusion, experiments, run, config or data.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vaediff.errors import UserError
from vaediff.models import wavelets
from vaediff.models.ncsnpp import NcsnPlusPlus
from vaediff.models.ncsnpp_blocks import (
  INV_SQRT2,
  AdaptiveGroupNorm,
  AttentionBlock,
  BlockOptions,
  Embedding,
  FeatureMap,
  ResidualBlock,
  Style,
  conv3x3,
  dense,
  embed_and_convolve,
  rematerialised,
)

LowMap = Float[Array, 'batch half_height half_width features']
HighMap = Float[Array, 'batch height width high_channels']


class WaveletNcsnPlusPlus(NcsnPlusPlus):
  """An `NcsnPlusPlus` with frequency-aware ways between its resolutions.

  Attributes:
    use_frequency_bottleneck: the middle's residual blocks work on the low band.
    use_frequency_skips: the Haar transform halves and doubles the maps, with the high bands as skips;
      otherwise the filter of `NcsnPlusPlus` does.
    use_residual: the pyramid of the input's bands is added on the way down; otherwise there is no pyramid.
  """

  use_frequency_bottleneck: bool = True
  use_frequency_skips: bool = True
  use_residual: bool = True

  def _middle(self, h: Array, emb: Array, style: Array, options: BlockOptions) -> Array:
    """Returns the map that starts the way up; the second block runs on the map, then on its low band."""
    if not self.use_frequency_bottleneck:
      return super()._middle(h, emb, style, options)
    block = rematerialised(ResidualBlock, options)
    first, second = (
      block(features=h.shape[-1], resample='none', options=options, name=f'middle_res_{i}') for i in range(2)
    )

    def on_low_band(block, h):
      low, *highs = wavelets.split_bands(h)
      return wavelets.merge_bands(2.0 * block(0.5 * low, emb, style), *highs)

    h = on_low_band(first, h)
    h = rematerialised(AttentionBlock, options)(options=options, name='middle_attn')(h)
    return on_low_band(second, second(h, emb, style))

  def _halve(
    self, h: Array, emb: Array, style: Array, options: BlockOptions, name: str
  ) -> tuple[Array, tuple[Array, ...]]:
    """Returns the map at half the resolution, and the three high bands."""
    if not self.use_frequency_skips:
      return super()._halve(h, emb, style, options, name)
    return rematerialised(FrequencyDownBlock, options)(features=h.shape[-1], options=options, name=name)(
      h, emb, style
    )

  def _double(
    self, h: Array, highs: tuple[Array, ...], emb: Array, style: Array, options: BlockOptions, name: str
  ) -> Array:
    """Returns the map at twice the resolution, with the high bands of the way down."""
    if not self.use_frequency_skips:
      return super()._double(h, highs, emb, style, options, name)
    return rematerialised(FrequencyUpBlock, options)(features=h.shape[-1], options=options, name=name)(
      h, highs, emb, style
    )

  def _add_pyramid(self, pyramid: Array, h: Array, options: BlockOptions, name: str) -> Array:
    """Returns the map plus the pyramid, which is halved to fit, over sqrt(2)."""
    if not self.use_residual:
      return h
    bands = 0.5 * wavelets.haar(pyramid)
    return (conv3x3(h.shape[-1], name=name, dtype=options.dtype)(bands) + h) * INV_SQRT2

  def _check_inputs(self, x_t: Array, z: Array) -> None:
    """Raises as the parent does, and UserError where the lowest map has no low band."""
    super()._check_inputs(x_t, z)
    factor = self.patch_size * 2 ** len(self.channel_multipliers)
    if self.use_frequency_bottleneck and (x_t.shape[1] % factor or x_t.shape[2] % factor):
      raise UserError(
        f'x_t is {x_t.shape[1]} x {x_t.shape[2]}, but model.patch_size {self.patch_size}, '
        f'{len(self.channel_multipliers)} levels (model.channel_multipliers) and the frequency bottleneck '
        f'need multiples of {factor}; change one of them or set model.use_frequency_bottleneck to False.'
      )


class FrequencyDownBlock(nn.Module):
  """A residual block that halves the sides by the Haar transform of both branches.

  Attributes:
    features: channels of the output and of each high band.
    options: shared by all blocks.
  """

  features: int
  options: BlockOptions

  @nn.compact
  def __call__(
    self, x: FeatureMap, emb: Embedding, style: Style
  ) -> tuple[LowMap, tuple[LowMap, LowMap, LowMap]]:
    """Returns the halved map, and the branch's bands (LH, HL, HH)."""
    dtype = self.options.dtype
    h = nn.silu(AdaptiveGroupNorm(name='norm_1')(x, style))
    h = conv3x3(self.features, name='conv_1', dtype=dtype)(h)
    skip = dense(self.features, name='skip', dtype=dtype)(x)
    low, *highs = wavelets.split_bands(h)
    skip_low, *_ = wavelets.split_bands(skip)
    h = embed_and_convolve(0.5 * low, emb, style, self.options)
    return (0.5 * skip_low + h) * INV_SQRT2, tuple(highs)


class FrequencyUpBlock(nn.Module):
  """A residual block that doubles the sides by the inverse Haar transform of both branches.

  Attributes:
    features: channels of the output.
    options: shared by all blocks.
  """

  features: int
  options: BlockOptions

  @nn.compact
  def __call__(
    self, x: FeatureMap, highs: tuple[HighMap, HighMap, HighMap], emb: Embedding, style: Style
  ) -> Float[Array, 'batch height_up width_up features']:
    """Returns the doubled map; both branches get the same high bands, each convolved on its own."""
    dtype = self.options.dtype
    h = nn.silu(AdaptiveGroupNorm(name='norm_1')(x, style))
    h = conv3x3(self.features, name='conv_1', dtype=dtype)(h)
    skip = dense(self.features, name='skip', dtype=dtype)(x)
    bands = 0.5 * jnp.concatenate(highs, axis=-1)
    bands = 2.0 * conv3x3(3 * self.features, name='conv_highs', dtype=dtype, groups=3)(bands)
    bands = jnp.split(bands, 3, axis=-1)
    h = embed_and_convolve(wavelets.merge_bands(2.0 * h, *bands), emb, style, self.options)
    return (wavelets.merge_bands(2.0 * skip, *bands) + h) * INV_SQRT2
