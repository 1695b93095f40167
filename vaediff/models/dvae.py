"""Encoder and decoder of DALL-E's discrete VAE (Ramesh et al. 2021, 2102.12092, appendix A.1).

Convolutions and ReLU, without norm and attention: groups of bottleneck blocks whose sum is kept small by a
gain of 1 / (number of blocks)^2, with max-pooling between the encoder's groups and nearest upsampling between
the decoder's. At 256 pixels, base width 256, multipliers 1, 2, 4, 8, two blocks per group, 8,192 codes of 128
numbers and a logit-Laplace they are the published networks, of 53,786,240 and 43,829,766 parameters: those of
the encoder with the head of its logits, those of the decoder with the codes, which are its first 1x1
convolution. `autoencoder.Autoencoder` puts the two together.

Must not import diffusion, experiments, run, config or data.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Key

from vaediff.errors import UserError
from vaediff.models import layers
from vaediff.models.autoencoder_blocks import Features
from vaediff.types import Image, LatentMap

normal_fan_in = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')
"""N(0, 1 / (n_in k^2)); biases start at zero."""


def normal_codes(key: Key[Array, ''], shape: tuple[int, int]) -> Array:
  """Returns codes from N(0, 1 / K): the kernel of a 1x1 convolution that reads K weights."""
  return normal_fan_in(key, shape, jnp.float32)


ONLY = {'bottleneck': 'gumbel', 'attention_resolutions': (), 'dropout': 0.0, 'tanh_out': False}
"""What an autoencoder of these networks has: they know of nothing else."""


def check_fields(model: nn.Module) -> None:
  """Raises UserError for a field of an autoencoder that these networks would not read."""
  for field, value in ONLY.items():
    found = getattr(model, field)
    if found != value and (found or value):
      raise UserError(
        f"model.{field} is {found!r}, but model.network = 'openai' has {value!r} alone: set that, or take "
        "model.network = 'taming'."
      )


class Block(nn.Module):
  """Four convolutions after a ReLU each, a quarter as wide inside, added with a gain.

  Attributes:
    features: of the output; a 1x1 convolution carries an input of others.
    sizes: sides of the four kernels, 1 or 3.
    gain: of what is added.
    dtype: of the arithmetic.
  """

  features: int
  sizes: tuple[int, int, int, int]
  gain: float
  dtype: Any

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch height width channels']
  ) -> Float[Array, 'batch height width features']:
    """Returns the input, carried to `features`, plus `gain` times what the convolutions make of it."""
    h = x
    for i, size in enumerate(self.sizes):
      width = self.features if i == len(self.sizes) - 1 else max(1, self.features // 4)
      h = convolution(width, size, f'conv_{i}', self.dtype)(nn.relu(h))
    if x.shape[-1] != self.features:
      x = convolution(self.features, 1, 'skip', self.dtype)(x)
    return x + self.gain * h


class Encoder(nn.Module):
  """From the image to what the head of the logits reads.

  Attributes:
    channels: of the first convolution.
    widths: channels of each group, highest resolution first.
    num_blocks: of each group.
    remat: recompute the blocks' activations in the backward pass.
    dtype: of the arithmetic.
  """

  channels: int
  widths: tuple[int, ...]
  num_blocks: int
  remat: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: Image, *, deterministic: bool) -> LatentMap:
    """Returns rectified activations, float32; there is no dropout to switch."""
    del deterministic
    block = nn.remat(Block) if self.remat else Block
    gain = 1.0 / (len(self.widths) * self.num_blocks) ** 2
    h = convolution(self.channels, 7, 'conv_in', self.dtype)(x)
    for level, width in enumerate(self.widths):
      for i in range(self.num_blocks):
        h = block(width, (3, 3, 3, 1), gain, self.dtype, name=f'down_{level}_{i}')(h)
      if level < len(self.widths) - 1:
        h = nn.max_pool(h, (2, 2), strides=(2, 2))
    return nn.relu(h).astype(jnp.float32)


class DecoderBody(nn.Module):
  """From codes, or mixtures of them, to the activations before the last convolution.

  Attributes:
    widths: channels of each group, highest resolution first.
    num_blocks: of each group.
    remat: recompute the blocks' activations in the backward pass.
    dtype: of the arithmetic.
  """

  widths: tuple[int, ...]
  num_blocks: int
  remat: bool
  dtype: Any

  @nn.compact
  def __call__(self, z: LatentMap, *, deterministic: bool) -> Features:
    """Returns rectified activations, float32; there is no dropout to switch."""
    del deterministic
    block = nn.remat(Block) if self.remat else Block
    gain = 1.0 / (len(self.widths) * self.num_blocks) ** 2
    bias = self.param('codes_bias', nn.initializers.zeros, z.shape[-1:])  # of the convolution that has them
    h = (z + bias.reshape(1, 1, 1, -1)).astype(self.dtype)
    for level in reversed(range(len(self.widths))):
      for i in range(self.num_blocks):
        h = block(self.widths[level], (1, 3, 3, 3), gain, self.dtype, name=f'up_{level}_{i}')(h)
      if level > 0:
        h = layers.upsample_nearest(h, 2)
    return nn.relu(h).astype(jnp.float32)


class Decoder(nn.Module):
  """From codes to the image's channels, in two steps so that the last can be differentiated alone."""

  body: DecoderBody
  out_channels: int

  def setup(self):
    """Creates the last convolution, whose arithmetic is float32."""
    self.conv_out = nn.Conv(
      self.out_channels, kernel_size=(1, 1), kernel_init=normal_fan_in, dtype=jnp.float32
    )

  def features(self, z: LatentMap, *, deterministic: bool) -> Features:
    """Returns the activations before the last convolution."""
    return self.body(z, deterministic=deterministic)

  def last_conv(self, features: Features) -> Image:
    """Returns what the image is made of."""
    return self.conv_out(features)


def convolution(features: int, size: int, name: str, dtype: Any) -> nn.Module:
  """Returns a convolution of stride 1; one of size 1 is a product over the last axis."""
  if size == 1:
    return nn.Dense(features, kernel_init=normal_fan_in, dtype=dtype, name=name)
  return nn.Conv(features, kernel_size=(size, size), kernel_init=normal_fan_in, dtype=dtype, name=name)
