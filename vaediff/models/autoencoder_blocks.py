"""Encoder and decoder of `autoencoder.Autoencoder`: residual blocks, levels, the attending middle.

Must not import diffusion, experiments, run, config or data.
"""

import dataclasses

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vaediff.models import layers
from vaediff.models.unet_blocks import VARIANTS, BlockOptions, attention_block
from vaediff.types import Image, LatentMap

# Group norm with epsilon 1e-6, one attention head, and zeros after, not before, the rows and columns of a
# stride-2 convolution: the choices of the 'ddim' U-Net, from which these autoencoders descend.
VARIANT = VARIANTS['ddim']

Features = Float[Array, 'batch height width features']
"""The activations that the decoder's last convolution turns into an image."""


class ResidualBlock(nn.Module):
  """Two normalised convolutions, without an embedding between them.

  Attributes:
    features: channels of the output; a 1x1 convolution carries the input when it has others.
    options: shared by all blocks.
  """

  features: int
  options: BlockOptions

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch height width channels']
  ) -> Float[Array, 'batch height width features']:
    """Returns x plus what the block adds to it."""
    options, dtype, epsilon = self.options, self.options.dtype, self.options.variant.norm_epsilon
    h = nn.silu(layers.GroupNorm(epsilon=epsilon, name='norm_1')(x))
    h = layers.conv3x3(self.features, name='conv_1', dtype=dtype)(h)
    h = nn.silu(layers.GroupNorm(epsilon=epsilon, name='norm_2')(h))
    h = nn.Dropout(options.dropout, deterministic=options.deterministic, name='dropout')(h)
    h = layers.conv3x3(self.features, name='conv_2', dtype=dtype)(h)
    if x.shape[-1] != self.features:
      x = layers.dense(self.features, name='skip', dtype=dtype)(x)
    return x + h


class Level(nn.Module):
  """The blocks of one resolution.

  Attributes:
    features: channels of every block.
    num_blocks: residual blocks.
    attend: an attention block follows each of them.
    resample: 'down' ends in a stride-2 convolution, 'up' in nearest upsampling by 2 and a convolution.
    options: shared by all blocks.
  """

  features: int
  num_blocks: int
  attend: bool
  resample: str
  options: BlockOptions

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch height width channels']
  ) -> Float[Array, 'batch height_out width_out features']:
    """Returns the map for the next level."""
    for i in range(self.num_blocks):
      x = _residual_block(self.features, self.options, f'res_{i}')(x)
      if self.attend:
        x = attention_block(self.options, f'attn_{i}')(x)
    if self.resample == 'down':
      padding = self.options.variant.down_padding
      down = layers.conv3x3(self.features, name='down', dtype=self.options.dtype, strides=2, padding=padding)
      x = down(x)
    elif self.resample == 'up':
      x = layers.conv3x3(self.features, name='up', dtype=self.options.dtype)(layers.upsample_nearest(x, 2))
    return x


class Middle(nn.Module):
  """Residual block, attention, residual block at the lowest resolution.

  Attributes:
    options: shared by all blocks.
  """

  options: BlockOptions

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch height width channels']
  ) -> Float[Array, 'batch height width channels']:
    """Returns a map in which every position has seen every other."""
    x = _residual_block(x.shape[-1], self.options, 'res_0')(x)
    x = attention_block(self.options, 'attn')(x)
    return _residual_block(x.shape[-1], self.options, 'res_1')(x)


class Encoder(nn.Module):
  """From the image to the parameters of the latent.

  Attributes:
    channels: of the first convolution.
    widths: channels of each level, highest resolution first.
    num_res_blocks: residual blocks per level.
    attention_resolutions: sides of the maps that get attention, besides the last.
    out_channels: of the output.
    inner_channels: of the last convolution but one, the 3x3.
    options: of all blocks; `deterministic` is replaced at each call.
  """

  channels: int
  widths: tuple[int, ...]
  num_res_blocks: int
  attention_resolutions: tuple[int, ...]
  out_channels: int
  inner_channels: int
  options: BlockOptions

  @nn.compact
  def __call__(self, x: Image, *, deterministic: bool) -> LatentMap:
    """Returns the output of the 1x1 `quant_conv`, float32, unbounded."""
    options = dataclasses.replace(self.options, deterministic=deterministic)
    h = layers.conv3x3(self.channels, name='conv_in', dtype=options.dtype)(x)
    for level, width in enumerate(self.widths):
      h = Level(
        features=width,
        num_blocks=self.num_res_blocks,
        attend=h.shape[1] in self.attention_resolutions,
        resample='down' if level < len(self.widths) - 1 else 'none',
        options=options,
        name=f'down_{level}',
      )(h)
    h = Middle(options=options, name='middle')(h)
    h = nn.silu(layers.GroupNorm(epsilon=options.variant.norm_epsilon, name='norm_out')(h))
    h = layers.conv3x3(self.inner_channels, name='conv_out', dtype=options.dtype)(h)
    return layers.dense(self.out_channels, name='quant_conv', dtype=jnp.float32)(h.astype(jnp.float32))


class DecoderBody(nn.Module):
  """From the latent to the activations before the last convolution.

  Attributes:
    inner_channels: of what the first 3x3 convolution reads, made of z by a 1x1.
    widths: channels of each level, highest resolution first.
    num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
    attention_resolutions: sides of the maps that get attention, besides the first.
    options: of all blocks; `deterministic` is replaced at each call.
  """

  inner_channels: int
  widths: tuple[int, ...]
  num_res_blocks: int
  attention_resolutions: tuple[int, ...]
  options: BlockOptions

  @nn.compact
  def __call__(self, z: LatentMap, *, deterministic: bool) -> Features:
    """Returns normalised and rectified activations, float32."""
    options = dataclasses.replace(self.options, deterministic=deterministic)
    h = layers.dense(self.inner_channels, name='post_quant_conv', dtype=options.dtype)(z)
    h = layers.conv3x3(self.widths[-1], name='conv_in', dtype=options.dtype)(h)
    h = Middle(options=options, name='middle')(h)
    for level in reversed(range(len(self.widths))):
      h = Level(
        features=self.widths[level],
        num_blocks=self.num_res_blocks + 1,
        attend=h.shape[1] in self.attention_resolutions,
        resample='up' if level > 0 else 'none',
        options=options,
        name=f'up_{level}',
      )(h)
    h = nn.silu(layers.GroupNorm(epsilon=options.variant.norm_epsilon, name='norm_out')(h))
    return h.astype(jnp.float32)


class Decoder(nn.Module):
  """From the latent to the image, in two steps so that the last can be differentiated alone."""

  body: DecoderBody
  image_channels: int
  tanh_out: bool

  def setup(self):
    """Creates the last convolution, whose arithmetic is float32."""
    self.conv_out = nn.Conv(
      self.image_channels, kernel_size=(3, 3), kernel_init=layers.uniform_fan_in, dtype=jnp.float32
    )

  def features(self, z: LatentMap, *, deterministic: bool) -> Features:
    """Returns the activations before the last convolution."""
    return self.body(z, deterministic=deterministic)

  def last_conv(self, features: Features) -> Image:
    """Returns the image that the last convolution makes of `features`."""
    image = self.conv_out(features)
    return jnp.tanh(image) if self.tanh_out else image


def _residual_block(features: int, options: BlockOptions, name: str) -> nn.Module:
  """Returns a residual block, rematerialised if asked for; parameters are the same either way."""
  block = nn.remat(ResidualBlock) if options.remat else ResidualBlock
  return block(features=features, options=options, name=name)
