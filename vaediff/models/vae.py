"""The residual VAE of DiffuseVAE (Pandey et al. 2022, 2201.00308), built from block strings.

An encoder or decoder is a comma-separated list of steps:

  RxN   N residual blocks at resolution R; `R` alone is one block
  RdK   one residual block at resolution R, then average pooling by K
  RuK   nearest-neighbour upsampling by K, without a block
  AtB   1x1 convolution without bias, at resolution B, from the channels of A to those of B

and channels are given per resolution, `R:C,R:C,...`. Images are in [-1, 1] outside the module and
in [0, 1] inside, where the decoder ends in a sigmoid. There is no normalisation anywhere.

Must not import diffusion, experiments, run, config or data.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vaediff.errors import UserError
from vaediff.models import layers
from vaediff.models.vae_blocks import Layer, VaePlan, plan_vae
from vaediff.types import Image, Latent

STEMS = ('nearest', 'dense')


class Bottleneck(nn.Module):
  """Residual block of Child 2021 (2011.10650, fig. 3): GELU before each of four convolutions.

  Attributes:
    kernel_size: of the two middle convolutions; 1 or 3.
    dtype: compute type.
  """

  kernel_size: int
  dtype: Any

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch height width channels']
  ) -> Float[Array, 'batch height width channels']:
    """Returns x plus the bottleneck of x, which is half as wide."""
    channels = x.shape[-1]
    middle = layers.conv3x3 if self.kernel_size == 3 else layers.dense
    h = x
    for make, features, name in (
      (layers.dense, channels // 2, 'conv_1'),
      (middle, channels // 2, 'conv_2'),
      (middle, channels // 2, 'conv_3'),
      (layers.dense, channels, 'conv_4'),
    ):
      # The published weights were trained with the exact GELU, not its tanh approximation.
      h = make(features, name=name, dtype=self.dtype)(nn.gelu(h, approximate=False))
    return x + h


class Stem(nn.Module):
  """A linear map from a 1x1 map to a `size` x `size` map with as many channels.

  Attributes:
    size: side of the output in pixels.
    dtype: compute type.
  """

  size: int
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, 'batch 1 1 channels']) -> Float[Array, 'batch height width channels']:
    """Returns a map with spatial structure, which nearest upsampling of one pixel cannot have."""
    batch, _, _, channels = x.shape
    h = layers.dense(self.size**2 * channels, name='dense', dtype=self.dtype)(x)
    return h.reshape(batch, self.size, self.size, channels)


class Head(nn.Module):
  """A linear map from a square map to a 1x1 map with as many channels, in place of the mean."""

  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, 'batch height width channels']) -> Float[Array, 'batch 1 1 channels']:
    """Returns one pixel that has seen every position, which an average of the map has not."""
    batch, height, width, channels = x.shape
    h = x.reshape(batch, 1, 1, height * width * channels)
    return layers.dense(channels, name='dense', dtype=self.dtype)(h)


def _run(
  plan: tuple[Layer, ...], x: Float[Array, 'batch height width channels'], dtype: Any
) -> Float[Array, 'batch height_out width_out channels_out']:
  """Returns x after each layer of the plan, creating the layers in the calling module."""
  for layer in plan:
    match layer.kind:
      case 'residual':
        x = Bottleneck(kernel_size=layer.value, dtype=dtype, name=layer.name)(x)
      case 'project':
        x = layers.dense(layer.value, name=layer.name, dtype=dtype, use_bias=False)(x)
      case 'pool':
        x = layers.average_pool(x, layer.value)
      case 'upsample':
        x = layers.upsample_nearest(x, layer.value)
      case 'head':
        x = Head(dtype=dtype, name=layer.name)(x)
      case 'stem':
        x = Stem(size=layer.value, dtype=dtype, name=layer.name)(x)
  return x


class Encoder(nn.Module):
  """q(z|x): convolution, residual blocks, two linear heads."""

  plan: tuple[Layer, ...]
  channels: int
  latent_dim: int
  dtype: Any

  @nn.compact
  def __call__(self, x: Image) -> tuple[Latent, Latent]:
    """Returns mean and log variance of q(z|x), float32, for images in [0, 1]."""
    h = layers.conv3x3(self.channels, name='conv_in', dtype=self.dtype, use_bias=False)(x)
    h = _run(self.plan, h, self.dtype)[:, 0, 0, :].astype(jnp.float32)
    mean, logvar = (
      layers.dense(self.latent_dim, name=name, dtype=jnp.float32, use_bias=False)(h)
      for name in ('mean', 'logvar')
    )
    return mean, logvar


class Decoder(nn.Module):
  """The mean of p(x|z): residual blocks on a growing map, convolution, sigmoid."""

  plan: tuple[Layer, ...]
  image_channels: int
  dtype: Any

  @nn.compact
  def __call__(self, z: Latent) -> Image:
    """Returns images in [0, 1], float32."""
    h = _run(self.plan, z[:, None, None, :].astype(self.dtype), self.dtype).astype(jnp.float32)
    return nn.sigmoid(layers.conv3x3(self.image_channels, name='conv_out', dtype=jnp.float32)(h))


class Vae(nn.Module):
  """The VAE of DiffuseVAE's first stage, with a diagonal Gaussian q(z|x).

  Attributes:
    encoder_blocks: steps from the image to resolution 1 (module docstring).
    decoder_blocks: steps from resolution 1 to the image.
    encoder_channels: `R:C,...`; the first convolution gives the image's resolution its channels.
    decoder_channels: `R:C,...`; resolution 1 must have `latent_dim` channels.
    latent_dim: size of z.
    image_channels: 1 for grey, 3 for colour.
    dtype: 'float32' or 'bfloat16', the type of the arithmetic; inputs and outputs are float32.
    stem: 'nearest' reaches resolution 1 by averaging and leaves it by repetition, as published, so
      that all spatial structure comes from the zero padding of the convolutions; 'dense' learns a
      linear map for each of the two steps.

  Raises:
    UserError: a string is malformed, or its steps do not fit together.
  """

  encoder_blocks: str
  decoder_blocks: str
  encoder_channels: str
  decoder_channels: str
  latent_dim: int
  image_channels: int = 3
  dtype: str = 'float32'
  stem: str = 'nearest'

  def __post_init__(self):
    layers.check_dtype(self.dtype)
    if self.stem not in STEMS:
      raise UserError(f"model.stem is '{self.stem}'; choose one of {', '.join(STEMS)}.")
    self._plan()
    super().__post_init__()

  @nn.nowrap
  def _plan(self) -> VaePlan:
    return plan_vae(
      encoder_blocks=self.encoder_blocks,
      decoder_blocks=self.decoder_blocks,
      encoder_channels=self.encoder_channels,
      decoder_channels=self.decoder_channels,
      latent_dim=self.latent_dim,
      dense_stem=self.stem == 'dense',
    )

  def setup(self):
    """Creates the two halves; their attribute names are the first part of every parameter path."""
    dtype = jnp.dtype(self.dtype)
    plan = self._plan()
    self.encoder = Encoder(
      plan=plan.encoder, channels=plan.first_channels, latent_dim=self.latent_dim, dtype=dtype
    )
    self.decoder = Decoder(plan=plan.decoder, image_channels=self.image_channels, dtype=dtype)

  def encode(self, x: Image) -> tuple[Latent, Latent]:
    """Returns the mean and log variance of q(z|x), float32, for images in [-1, 1].

    Raises:
      UserError: the images do not have the size or the channels that the module was built for.
    """
    size = self._plan().image_size
    expected = (size, size, self.image_channels)
    if x.shape[1:] != expected:
      raise UserError(
        f'The images have shape {x.shape[1:]}, but the VAE of model.encoder_blocks and '
        f'model.image_channels reads {expected}; change data.image_size or the first block.'
      )
    return self.encoder(x * 0.5 + 0.5)

  def decode(self, z: Latent) -> Image:
    """Returns the mean of p(x|z), float32, in [-1, 1]."""
    return self.decoder(z) * 2.0 - 1.0

  def __call__(self, x: Image, deterministic: bool = True) -> Image:
    """Returns the reconstruction of x from the mean of q(z|x); there is no dropout to switch."""
    del deterministic
    mean, _ = self.encode(x)
    return self.decode(mean)
