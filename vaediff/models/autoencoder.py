"""Convolutional autoencoders with two-dimensional latents, as in latent diffusion (Rombach et al. 2022).

`Autoencoder` is the network of 2112.10752, section 3.1, which is that of Esser et al. 2021 (2012.09841):
residual blocks with group normalisation on maps that halve from level to level, and attention at the
smallest. Images are in [-1, 1]. What lies between its two halves is the `bottleneck`:

  'kl'    q(z|x) = N(mean, exp(logvar)), one mean and one variance per latent element
  'none'  z = tanh(...), deterministic and inside (-1, 1), for generators whose output is bounded
  'vq'    z continuous; the caller moves it to the nearest code (`codebook`), which is a matter of the decoder
          when a diffusion model is to learn the continuous z

`LightDecoder` is a small decoder without norm and attention that learns to imitate a large one.

Must not import diffusion, experiments, run, config or data.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vaediff.errors import UserError
from vaediff.models import codebook, layers
from vaediff.models.autoencoder_blocks import VARIANT, Decoder, DecoderBody, Encoder, Features
from vaediff.models.unet_blocks import BlockOptions
from vaediff.types import Image, LatentMap, Params

BOTTLENECKS = ('kl', 'none', 'vq')
# Bounds of the log variance: outside them its exponential is of no use in float32.
LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0
LAST_KERNEL = ('decoder', 'conv_out', 'kernel')
"""Path in the parameters of the only kernel that `Autoencoder.last_conv` multiplies by."""


class Autoencoder(nn.Module):
  """An image in [-1, 1] to a map of latents, f times smaller along each side, and back.

  With L multipliers f is 2^(L - 1). The parameters have two branches, `encoder` and `decoder`, and a third,
  `codes`, for 'vq'.

  Attributes:
    image_channels: 1 for grey, 3 for colour.
    latent_channels: size of each latent vector, and of each code.
    channel_multipliers: width of each level over `channels`, highest resolution first.
    channels: base width, at least 1.
    num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
    attention_resolutions: sides, in pixels, of the maps that get attention (not downsampling rates); the
      middle, on the map of the latents, always has it.
    dropout: rate in [0, 1), on when `deterministic` is False.
    bottleneck: 'kl', 'none' or 'vq' (module docstring).
    codebook_size: number of codes, the parameter `codes` [codebook_size, latent_channels]; positive exactly
      for 'vq'. They are moved by the gradient of `codebook.codebook_loss`, or replaced after
      `codebook.ema_update`.
    normalized_codes: 'vq' alone: vectors and codes are compared, and decoded, at length 1. The encoder's
      output has it; codes are brought to it by whoever reads them (`codebook.unit`).
    inner_channels: of the maps between the 3x3 convolutions and the 1x1 ones at the latents; 0 =
      latent_channels. With 'kl' the encoder has twice as many.
    tanh_out: the decoder ends in a tanh, which bounds images to (-1, 1).
    remat: recompute the blocks' activations in the backward pass instead of storing them.
    dtype: 'float32' or 'bfloat16', the type of the arithmetic. Parameters, group norm statistics, softmax,
      latents, the last convolution and the output are float32.

  Raises:
    UserError: a field is out of range, or contradicts another.
  """

  image_channels: int
  latent_channels: int
  channel_multipliers: tuple[int, ...]
  channels: int = 128
  num_res_blocks: int = 2
  attention_resolutions: tuple[int, ...] = ()
  dropout: float = 0.0
  bottleneck: str = 'kl'
  codebook_size: int = 0
  normalized_codes: bool = False
  inner_channels: int = 0
  tanh_out: bool = False
  remat: bool = False
  dtype: str = 'float32'

  def __post_init__(self):
    layers.check_dtype(self.dtype)
    _check_fields(self)
    super().__post_init__()

  @property
  def factor(self) -> int:
    """f: the side of the image over the side of the latents."""
    return 2 ** (len(self.channel_multipliers) - 1)

  def setup(self):
    """Creates the two halves; their attribute names are the first part of every parameter path."""
    options = BlockOptions(
      variant=VARIANT,
      num_heads=1,
      dropout=self.dropout,
      deterministic=True,
      scale_shift_norm=False,
      remat=self.remat,
      dtype=jnp.dtype(self.dtype),
    )
    shared = {
      'widths': tuple(multiplier * self.channels for multiplier in self.channel_multipliers),
      'num_res_blocks': self.num_res_blocks,
      'attention_resolutions': self.attention_resolutions,
      'options': options,
    }
    inner, outputs = self.inner_channels or self.latent_channels, 2 if self.bottleneck == 'kl' else 1
    self.encoder = Encoder(
      channels=self.channels,
      inner_channels=outputs * inner,
      out_channels=outputs * self.latent_channels,
      **shared,
    )
    self.decoder = Decoder(
      body=DecoderBody(inner_channels=inner, parent=None, **shared),
      image_channels=self.image_channels,
      tanh_out=self.tanh_out,
    )
    if self.bottleneck == 'vq':
      shape = (self.codebook_size, self.latent_channels)
      self.codes = self.param('codes', codebook.uniform_codes, shape)

  def encode(self, x: Image, *, deterministic: bool = True) -> tuple[LatentMap, LatentMap | None]:
    """Returns the mean and the log variance of the latents of images in [-1, 1], float32.

    The log variance is in [-30, 20] for 'kl', and None for the others, whose latents are the mean: in (-1, 1)
    for 'none', and for 'vq' not yet one of the codes: unbounded, or of length 1 where codes are normalised.

    Raises:
      UserError: the sides or the channels of the images do not fit the module.
    """
    self._check_image(x)
    h = self.encoder(x, deterministic=deterministic)
    match self.bottleneck:
      case 'kl':
        mean, logvar = jnp.split(h, 2, axis=-1)
        return mean, jnp.clip(logvar, LOGVAR_MIN, LOGVAR_MAX)
      case 'none':
        return jnp.tanh(h), None
      case _:
        return codebook.unit(h) if self.normalized_codes else h, None

  def decode(self, z: LatentMap, *, deterministic: bool = True) -> Image:
    """Returns the image of latents, float32; for 'vq' the latents are to be codes already."""
    return self.last_conv(self.decode_features(z, deterministic=deterministic))

  def decode_features(self, z: LatentMap, *, deterministic: bool = True) -> Features:
    """Returns the activations before the last convolution, float32, as many as `last_conv` reads.

    Raises:
      UserError: the latents do not fit the module.
    """
    if z.shape[-1] != self.latent_channels:
      raise UserError(
        f'The latents have {z.shape[-1]} channels, but model.latent_channels is {self.latent_channels}.'
      )
    return self.decoder.features(z, deterministic=deterministic)

  def last_conv(self, features: Features) -> Image:
    """Returns the image of the decoder's last activations; reads no parameters but those of `conv_out`.

    The adaptive weight of Esser et al. 2021 (2012.09841, eq. 7) compares gradients with respect to
    `LAST_KERNEL`. Apply this method to `{'decoder': {'conv_out': ...}}` to differentiate nothing else.
    """
    return self.decoder.last_conv(features)

  def __call__(self, x: Image, *, deterministic: bool = True) -> Image:
    """Returns the reconstruction of x from the mean, which for 'vq' is not moved to a code here."""
    mean, _ = self.encode(x, deterministic=deterministic)
    return self.decode(mean, deterministic=deterministic)

  @nn.nowrap
  def _check_image(self, x: Array) -> None:
    """Raises UserError unless the images can be halved and every attention resolution occurs."""
    _, height, width, channels = x.shape
    if channels != self.image_channels:
      raise UserError(
        f'The images have {channels} channels, but model.image_channels is {self.image_channels}.'
      )
    if height % self.factor or width % self.factor:
      raise UserError(
        f'The images are {height} x {width}, but {len(self.channel_multipliers)} levels '
        f'(model.channel_multipliers) need multiples of {self.factor}.'
      )
    sides = [height >> level for level in range(len(self.channel_multipliers))]
    for resolution in self.attention_resolutions:
      if resolution not in sides:
        raise UserError(
          f'model.attention_resolutions names {resolution}, which never occurs; the maps have sides '
          f'{", ".join(map(str, sides))}. These are resolutions, not downsampling rates.'
        )


def last_kernel(params: Params) -> Array:
  """Returns the kernel of the decoder's last convolution."""
  for name in LAST_KERNEL:
    params = params[name]
  return params


def with_last_kernel(params: Params, kernel: Array) -> Params:
  """Returns the parameters with another last kernel."""

  def replaced(tree: Params, path: tuple[str, ...]) -> Params:
    inner = kernel if len(path) == 1 else replaced(tree[path[0]], path[1:])
    return {**tree, path[0]: inner}

  return replaced(params, LAST_KERNEL)


class LightBlock(nn.Module):
  """Three convolutions with ReLU between them, added to the input, and a ReLU."""

  dtype: Any

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch height width channels']
  ) -> Float[Array, 'batch height width channels']:
    """Returns a non-negative map."""
    h = x
    for i in range(3):
      h = layers.conv3x3(x.shape[-1], name=f'conv_{i}', dtype=self.dtype)(nn.relu(h) if i else h)
    return nn.relu(x + h)


class LightDecoder(nn.Module):
  """A decoder of 1.1 (f = 4) or 1.6 (f = 8) million parameters, to be distilled from a large one.

  Convolutions, ReLU and nearest upsampling, after the tiny autoencoders of latent diffusion: nothing that
  reads the whole map, so that its cost per pixel is constant. The full resolution, where a block costs four
  times what it costs below, has one block.

  Attributes:
    latent_channels: channels of z.
    image_channels: channels of the image.
    num_upsamplings: the image is 2^num_upsamplings times larger than the latents along each side.
    channels: of every map in between.
    num_blocks: blocks at every resolution but the highest.
    dtype: 'float32' or 'bfloat16', the type of the arithmetic; the last convolution is float32.

  Raises:
    UserError: a field is out of range.
  """

  latent_channels: int
  image_channels: int
  num_upsamplings: int
  channels: int = 64
  num_blocks: int = 4
  dtype: str = 'float32'

  def __post_init__(self):
    layers.check_dtype(self.dtype)
    for field in ('latent_channels', 'image_channels', 'channels', 'num_blocks', 'num_upsamplings'):
      _check_at_least(field, getattr(self, field), 0 if field == 'num_upsamplings' else 1)
    super().__post_init__()

  @nn.compact
  def __call__(self, z: LatentMap, *, deterministic: bool = True) -> Image:
    """Returns the image, float32, unbounded; there is no dropout to switch.

    Raises:
      UserError: the latents have other channels than the module was built for.
    """
    del deterministic
    if z.shape[-1] != self.latent_channels:
      raise UserError(
        f'The latents have {z.shape[-1]} channels, but model.latent_channels is {self.latent_channels}.'
      )
    dtype = jnp.dtype(self.dtype)
    h = nn.relu(layers.conv3x3(self.channels, name='conv_in', dtype=dtype)(z))
    for level in reversed(range(self.num_upsamplings + 1)):
      for i in range(self.num_blocks if level else 1):
        h = LightBlock(dtype=dtype, name=f'block_{level}_{i}')(h)
      if level:
        h = layers.upsample_nearest(h, 2)
        h = layers.conv3x3(self.channels, name=f'up_{level}', dtype=dtype, use_bias=False)(h)
    return layers.conv3x3(self.image_channels, name='conv_out', dtype=jnp.float32)(h.astype(jnp.float32))


def _check_at_least(field: str, value: int, least: int) -> None:
  if value < least:
    raise UserError(f'model.{field} is {value}; it must be at least {least}.')


def _check_fields(model: Autoencoder) -> None:
  """Raises UserError unless the fields are in range and fit each other."""
  if model.bottleneck not in BOTTLENECKS:
    raise UserError(f"model.bottleneck is '{model.bottleneck}'; choose one of {', '.join(BOTTLENECKS)}.")
  for field in ('image_channels', 'latent_channels', 'channels', 'num_res_blocks'):
    _check_at_least(field, getattr(model, field), 1)
  _check_at_least('inner_channels', model.inner_channels, 0)
  if not model.channel_multipliers or min(model.channel_multipliers) < 1:
    raise UserError(
      f'model.channel_multipliers is {tuple(model.channel_multipliers)}; give one multiplier per level, '
      'each at least 1.'
    )
  if not 0.0 <= model.dropout < 1.0:
    raise UserError(f'model.dropout is {model.dropout}; it must be in [0, 1).')
  if (model.bottleneck == 'vq') != (model.codebook_size > 0):
    needed = "at least 1 for model.bottleneck 'vq'" if model.bottleneck == 'vq' else "0 without 'vq'"
    raise UserError(f'model.codebook_size is {model.codebook_size}; it must be {needed}.')
  if model.normalized_codes and model.bottleneck != 'vq':
    raise UserError(
      f"model.normalized_codes is True, which is for model.bottleneck 'vq', not {model.bottleneck!r}: there "
      'are no codes.'
    )
  if model.normalized_codes and model.latent_channels < 2:
    raise UserError(
      f'model.normalized_codes is True, but model.latent_channels is {model.latent_channels}; numbers of '
      'length 1 are two codes: take at least 2 channels.'
    )
