"""The NCSN++ generator of denoising diffusion GANs (Xiao et al. 2022, 2112.07804; network: 2011.13456).

The network reads the noisy state x_t, the index t of the step and a latent variable z, drawn anew for every
call, and returns one sample of x0 given x_t. It does not care whether x_t holds pixels, wavelet coefficients
or an autoencoder's latents.

Resolutions halve from level to level. A level has `num_res_blocks` residual blocks on the way down and one
more on the way up; at the chosen resolutions attention follows each of the former and the last of the latter.
Between the two ways are a residual, an attention and a residual block. On the way down a pyramid of the
input, halved by blurred convolutions, is added to the map after every halving, and goes on from the sum.

Must not import diffusion, experiments, run, config or data.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Num

from vaediff.errors import UserError
from vaediff.models import layers
from vaediff.models.ncsnpp_blocks import (
  GROUP_NORM_EPSILON,
  INV_SQRT2,
  AttentionBlock,
  BlockOptions,
  LatentMapping,
  PyramidDown,
  ResidualBlock,
  TimeEmbedding,
  conv3x3,
  rematerialised,
)
from vaediff.types import Latent


class NcsnPlusPlus(nn.Module):
  """An NCSN++ with adaptive group norms, conditional on z and optionally on an image.

  Attributes:
    channels: base width; even, at least 4.
    channel_multipliers: width of each level over `channels`, highest resolution first.
    num_res_blocks: residual blocks per level on the way down.
    attention_resolutions: heights, in pixels, of the maps that get attention; the highest map is the input
      (after patches are folded). The middle of the network, at the lowest resolution, always has it.
    latent_dim: size of z.
    num_mapping_layers: layers of the mapping network after its first.
    dropout: rate in [0, 1), on when `deterministic` is False.
    patch_size: patches of this side become pixels before the first layer, and pixels patches after the last.
    bounded: the output goes through tanh.
    remat: recompute the blocks' activations in the backward pass instead of storing them.
    dtype: 'float32' or 'bfloat16', the type of the arithmetic. Parameters, the mapping network, group norms,
      softmax, the last convolution and the output are float32.
    out_channels: channels of the output.
    mapping_dim: width of the mapping network, whose output every adaptive norm reads.

  Raises:
    UserError: a field has a value that is not allowed.
  """

  channels: int
  channel_multipliers: tuple[int, ...]
  num_res_blocks: int
  attention_resolutions: tuple[int, ...]
  latent_dim: int
  num_mapping_layers: int
  dropout: float
  patch_size: int
  bounded: bool
  remat: bool
  dtype: str
  out_channels: int
  mapping_dim: int = 256

  def __post_init__(self):
    layers.check_dtype(self.dtype)
    _check_fields(self)
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    x_t: Float[Array, 'batch height width channels'],
    t: Num[Array, ' batch'],
    z: Latent,
    condition: Float[Array, 'batch height width condition'] | None = None,
    *,
    deterministic: bool = True,
  ) -> Float[Array, 'batch height width out']:
    """Returns x0_hat, float32; within [-1, 1] if `bounded`.

    Args:
      x_t: noisy state.
      t: index of the step, 0 ... T - 1 or any other number; embedded as it is.
      z: latent variable, standard normal; only its direction matters.
      condition: concatenated to x_t along the channels.
      deterministic: dropout is off; otherwise the 'dropout' key is needed.

    Raises:
      UserError: the image cannot be halved from level to level, or a resolution with attention never occurs.
      ValueError: z has another size than `latent_dim`.
    """
    self._check_inputs(x_t, z)
    dtype = jnp.dtype(self.dtype)
    options = BlockOptions(dropout=self.dropout, deterministic=deterministic, remat=self.remat, dtype=dtype)
    emb = TimeEmbedding(
      frequencies=self.channels, features=4 * self.channels, dtype=dtype, name='time_embedding'
    )(t.astype(jnp.float32))
    style = LatentMapping(features=self.mapping_dim, num_layers=self.num_mapping_layers, name='mapping')(z)
    x = x_t if condition is None else jnp.concatenate([x_t, condition.astype(x_t.dtype)], axis=-1)
    h, skips, highs = self._way_down(fold_patches(x.astype(dtype), self.patch_size), emb, style, options)
    h = self._middle(h, emb, style, options)
    h = self._way_up(h, skips, highs, emb, style, options)
    h = nn.silu(layers.GroupNorm(epsilon=GROUP_NORM_EPSILON, name='norm_out')(h))
    head = conv3x3(self.out_channels * self.patch_size**2, name='conv_out', dtype=jnp.float32, scale=0.0)
    h = unfold_patches(head(h.astype(jnp.float32)), self.patch_size)
    return jnp.tanh(h) if self.bounded else h

  def _way_down(
    self, x: Array, emb: Array, style: Array, options: BlockOptions
  ) -> tuple[Array, list[Array], list[tuple[Array, ...]]]:
    """Returns the lowest map, the maps that the way up reads back, and the details each halving took away."""
    h = conv3x3(self.channels, name='conv_in', dtype=options.dtype)(x)
    skips, highs, pyramid = [h], [], x
    last = len(self.channel_multipliers) - 1
    for level, multiplier in enumerate(self.channel_multipliers):
      for i in range(self.num_res_blocks):
        h = self._residual(h, multiplier, emb, style, options, f'down_{level}_res_{i}')
        if h.shape[1] in self.attention_resolutions:
          h = rematerialised(AttentionBlock, options)(options=options, name=f'down_{level}_attn_{i}')(h)
        skips.append(h)
      if level < last:
        h, high = self._halve(h, emb, style, options, f'down_{level}_halve')
        h = pyramid = self._add_pyramid(pyramid, h, options, f'down_{level}_pyramid')
        skips.append(h)
        highs.append(high)
    return h, skips, highs

  def _way_up(
    self,
    h: Array,
    skips: list[Array],
    highs: list[tuple[Array, ...]],
    emb: Array,
    style: Array,
    options: BlockOptions,
  ) -> Array:
    """Returns the map after all levels up again; every block reads the last of the `skips` left."""
    skips, highs = list(skips), list(highs)
    for level, multiplier in reversed(list(enumerate(self.channel_multipliers))):
      for i in range(self.num_res_blocks + 1):
        h = jnp.concatenate([h, skips.pop()], axis=-1)
        h = self._residual(h, multiplier, emb, style, options, f'up_{level}_res_{i}')
      if h.shape[1] in self.attention_resolutions:
        h = rematerialised(AttentionBlock, options)(options=options, name=f'up_{level}_attn')(h)
      if level > 0:
        h = self._double(h, highs.pop(), emb, style, options, f'up_{level}_double')
    return h

  def _residual(
    self, h: Array, multiplier: int, emb: Array, style: Array, options: BlockOptions, name: str
  ) -> Array:
    """Returns the map after a residual block that keeps the resolution."""
    block = rematerialised(ResidualBlock, options)
    return block(features=multiplier * self.channels, resample='none', options=options, name=name)(
      h, emb, style
    )

  # What follows is what a network with other ways between resolutions replaces.

  def _middle(self, h: Array, emb: Array, style: Array, options: BlockOptions) -> Array:
    """Returns the map that starts the way up."""
    last = self.channel_multipliers[-1]
    h = self._residual(h, last, emb, style, options, 'middle_res_0')
    h = rematerialised(AttentionBlock, options)(options=options, name='middle_attn')(h)
    return self._residual(h, last, emb, style, options, 'middle_res_1')

  def _halve(
    self, h: Array, emb: Array, style: Array, options: BlockOptions, name: str
  ) -> tuple[Array, tuple[Array, ...]]:
    """Returns the map at half the resolution, and the details that the way up is to get back: none here."""
    block = rematerialised(ResidualBlock, options)
    return block(features=h.shape[-1], resample='down', options=options, name=name)(h, emb, style), ()

  def _double(
    self, h: Array, highs: tuple[Array, ...], emb: Array, style: Array, options: BlockOptions, name: str
  ) -> Array:
    """Returns the map at twice the resolution."""
    block = rematerialised(ResidualBlock, options)
    return block(features=h.shape[-1], resample='up', options=options, name=name)(h, emb, style)

  def _add_pyramid(self, pyramid: Array, h: Array, options: BlockOptions, name: str) -> Array:
    """Returns the map plus the pyramid, which is halved to fit, over sqrt(2)."""
    down = PyramidDown(features=h.shape[-1], dtype=options.dtype, name=name)
    return (down(pyramid) + h) * INV_SQRT2

  def _check_inputs(self, x_t: Array, z: Array) -> None:
    """Raises UserError or ValueError where the inputs are not those that the module was built for."""
    height, width = x_t.shape[1:3]
    factor = self.patch_size * 2 ** (len(self.channel_multipliers) - 1)
    if height % factor or width % factor:
      raise UserError(
        f'x_t is {height} x {width}, but model.patch_size {self.patch_size} and '
        f'{len(self.channel_multipliers)} levels (model.channel_multipliers) need multiples of {factor}.'
      )
    sides = [height // self.patch_size >> level for level in range(len(self.channel_multipliers))]
    for resolution in self.attention_resolutions:
      if resolution not in sides:
        raise UserError(
          f'model.attention_resolutions names {resolution}, which never occurs; the maps have '
          f'sides {", ".join(map(str, sides))}. These are resolutions, not downsampling rates.'
        )
    if z.shape[1:] != (self.latent_dim,):
      raise ValueError(f'z has shape {z.shape}, expected (batch, {self.latent_dim}).')


def fold_patches(
  x: Float[Array, 'batch height width channels'], size: int
) -> Float[Array, 'batch rows columns patch']:
  """Returns each `size` x `size` patch of x as one pixel, which has its pixels' channels row by row."""
  if size == 1:
    return x
  batch, height, width, channels = x.shape
  patches = x.reshape(batch, height // size, size, width // size, size, channels)
  return patches.swapaxes(2, 3).reshape(batch, height // size, width // size, size * size * channels)


def unfold_patches(
  x: Float[Array, 'batch rows columns patch'], size: int
) -> Float[Array, 'batch height width channels']:
  """Returns the image of which `fold_patches` makes x."""
  if size == 1:
    return x
  batch, rows, columns, patch = x.shape
  pixels = x.reshape(batch, rows, columns, size, size, patch // size**2).swapaxes(2, 3)
  return pixels.reshape(batch, rows * size, columns * size, patch // size**2)


def _check_fields(network: NcsnPlusPlus) -> None:
  """Raises UserError unless every field has a value that a network can be built from."""
  if network.channels < 4 or network.channels % 2:
    raise UserError(f'model.channels is {network.channels}; it must be even and at least 4.')
  if not network.channel_multipliers or min(network.channel_multipliers) < 1:
    raise UserError(
      f'model.channel_multipliers is {tuple(network.channel_multipliers)}; give one multiplier, at least 1, '
      'per level.'
    )
  for field, least in (
    ('num_res_blocks', 1),
    ('latent_dim', 1),
    ('num_mapping_layers', 0),
    ('mapping_dim', 1),
    ('patch_size', 1),
    ('out_channels', 1),
  ):
    value = getattr(network, field)
    if value < least:
      raise UserError(f'model.{field} is {value}; it must be at least {least}.')
  if not 0.0 <= network.dropout < 1.0:
    raise UserError(f'model.dropout is {network.dropout}; it must be in [0, 1).')
