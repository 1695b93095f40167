"""An autoencoder whose codes lie on several grids, coarse to fine: VQ-VAE-2 (Razavi et al. 2019, 1906.00446).

Levels are numbered from the top, the coarsest, which is level 0; the bottom is four times smaller than the
image along each side, and each level above it twice smaller again. With e_l the encoder's map of level l, d
the size of a code and VQ the nearest codes (`models.codebook`; whoever calls moves the vectors):

  z_0 = conv1(e_0)                        q_0 = VQ(z_0)        c_0 = q_0
  z_l = conv1([Dec_2(c_{l-1}), e_l])      q_l = VQ(z_l)        c_l = [convT4(c_{l-1}), q_l]
  image = Dec_4(c_bottom)

where c_l has (l + 1) d channels, so that a level holds what those above have left out. With two levels it is
the network of rosinality's vq-vae-2-pytorch, layer by layer.

Must not import diffusion, experiments, run, config or data.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vaediff.errors import UserError
from vaediff.models import codebook, layers
from vaediff.types import Image

MAX_LEVELS = 4
NAMES = (('bottom',), ('top', 'bottom'), ('top', 'middle', 'bottom'), ('top', 'upper', 'lower', 'bottom'))
"""Of the levels, coarse first, by how many there are, less one."""
STRIDE = 4
"""Sides of the image over those of the bottom's grid."""

Map = Float[Array, 'batch _ _ _']
"""Height, width and channels are those of a level, and differ between those of one call."""

# An output pixel of a 4x4 convolution transposed with stride 2 reads a quarter of the kernel.
uniform_fan_in_transposed = nn.initializers.variance_scaling(4 / 3, 'fan_in', 'uniform')


class Residuals(nn.Module):
  """`num_blocks` times x + conv1(ReLU(conv3(ReLU(x)))), and a ReLU.

  Attributes:
    num_blocks: how many.
    features: between the two convolutions.
    dtype: of the arithmetic.
  """

  num_blocks: int
  features: int
  dtype: Any

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch height width channels']
  ) -> Float[Array, 'batch height width channels']:
    """Returns a map that is not negative."""
    for block in range(self.num_blocks):
      h = layers.conv3x3(self.features, name=f'conv_{block}', dtype=self.dtype)(nn.relu(x))
      x = x + layers.dense(x.shape[-1], name=f'out_{block}', dtype=self.dtype)(nn.relu(h))
    return nn.relu(x)


class Down(nn.Module):
  """Halves the sides of a map, or quarters them.

  Attributes:
    stride: 2 or 4.
    channels: of the result.
    num_res_blocks: see `Residuals`.
    res_channels: the same.
    dtype: of the arithmetic.
  """

  stride: int
  channels: int
  num_res_blocks: int
  res_channels: int
  dtype: Any

  @nn.compact
  def __call__(self, x: Map) -> Map:
    """Returns the smaller map."""
    widths = (self.channels // 2,) if self.stride == 2 else (self.channels // 2, self.channels)
    for number, width in enumerate(widths):
      conv = nn.Conv(
        width, (4, 4), (2, 2), kernel_init=layers.uniform_fan_in, dtype=self.dtype, name=f'down_{number}'
      )
      x = nn.relu(conv(x))
    x = layers.conv3x3(self.channels, name='conv', dtype=self.dtype)(x)
    return Residuals(self.num_res_blocks, self.res_channels, self.dtype, name='residuals')(x)


class Up(nn.Module):
  """Doubles the sides of a map, or makes them four times as long.

  Attributes:
    stride: 2 or 4.
    features: channels of the result.
    channels: of the maps before it.
    num_res_blocks: see `Residuals`.
    res_channels: the same.
    dtype: of the arithmetic.
    out_dtype: of that of the last layer.
  """

  stride: int
  features: int
  channels: int
  num_res_blocks: int
  res_channels: int
  dtype: Any
  out_dtype: Any

  @nn.compact
  def __call__(self, x: Map) -> Map:
    """Returns the larger map."""
    x = layers.conv3x3(self.channels, name='conv', dtype=self.dtype)(x)
    x = Residuals(self.num_res_blocks, self.res_channels, self.dtype, name='residuals')(x)
    if self.stride == STRIDE:
      x = nn.relu(transposed(self.channels // 2, 'up', self.dtype)(x))
    return transposed(self.features, 'out', self.out_dtype)(x.astype(self.out_dtype))


def transposed(features: int, name: str | None, dtype: Any) -> nn.ConvTranspose:
  """Returns a 4x4 convolution, transposed, that doubles the sides of a map."""
  return nn.ConvTranspose(
    features, (4, 4), (2, 2), kernel_init=uniform_fan_in_transposed, dtype=dtype, name=name
  )


class Hierarchy(nn.Module):
  """An image in [-1, 1] to vectors on several grids, and back from the codes nearest to them.

  The codes of a level are the parameter `codes_<name>`, of `NAMES`; averages move them, and no gradient.

  Attributes:
    image_channels: 1 for grey, 3 for colour.
    num_levels: 1 to 4; the sides of the image are multiples of 4 x 2^(num_levels - 1).
    channels: of the maps; half as many at the highest resolution.
    num_res_blocks: residual blocks of each encoder and decoder.
    res_channels: inside of them.
    latent_channels: size of a code, at every level.
    codebook_size: codes of each level.
    dtype: 'float32' or 'bfloat16', the type of the arithmetic. Parameters, vectors, what decoders take and
      the last convolution are float32.

  Raises:
    UserError: a field is out of range.
  """

  image_channels: int
  num_levels: int = 2
  channels: int = 128
  num_res_blocks: int = 2
  res_channels: int = 32
  latent_channels: int = 64
  codebook_size: int = 512
  dtype: str = 'float32'

  def __post_init__(self):
    layers.check_dtype(self.dtype)
    if not 1 <= self.num_levels <= MAX_LEVELS:
      raise UserError(f'model.num_levels is {self.num_levels}; it must be in 1 ... {MAX_LEVELS}.')
    ones = ('image_channels', 'num_res_blocks', 'res_channels', 'latent_channels', 'codebook_size')
    for field, least in {'channels': 2, **dict.fromkeys(ones, 1)}.items():
      if getattr(self, field) < least:
        raise UserError(f'model.{field} is {getattr(self, field)}; it must be at least {least}.')
    super().__post_init__()

  @property
  def names(self) -> tuple[str, ...]:
    """Of the levels, coarse first."""
    return NAMES[self.num_levels - 1]

  def strides(self) -> tuple[int, ...]:
    """Returns the sides of the image over those of each level's grid, coarse first."""
    return tuple(STRIDE * 2**above for above in reversed(range(self.num_levels)))

  def setup(self):
    """Layers by level, the top first."""
    dtype, last = jnp.dtype(self.dtype), self.num_levels - 1
    sizes = {'num_res_blocks': self.num_res_blocks, 'res_channels': self.res_channels}
    sizes |= {'channels': self.channels, 'dtype': dtype}
    self.encoders = [Down(STRIDE if level == last else 2, **sizes) for level in range(self.num_levels)]
    self.to_codes = [
      nn.Dense(self.latent_channels, kernel_init=layers.uniform_fan_in, dtype=dtype)
      for _ in range(self.num_levels)
    ]
    self.hints = [
      Up(2, features=self.latent_channels, out_dtype=dtype, **sizes) for _ in range(self.num_levels - 1)
    ]
    self.ups = [
      transposed(self.latent_channels * (level + 1), None, dtype) for level in range(self.num_levels - 1)
    ]
    self.decoder = Up(STRIDE, features=self.image_channels, out_dtype=jnp.float32, **sizes)
    shape = (self.codebook_size, self.latent_channels)
    self.codes = [self.param(f'codes_{name}', codebook.uniform_codes, shape) for name in self.names]

  def encode(self, x: Image) -> tuple[Map, ...]:
    """Returns the map of each level, coarse first, of which `vectors` makes its vectors."""
    maps = []
    for encoder in reversed(self.encoders):
      x = encoder(x)
      maps.append(x)
    return tuple(reversed(maps))

  def vectors(self, level: int, encoded: Map, carried: Map | None) -> Map:
    """Returns z of a level, float32, of the encoder's map and of the codes above; None at the top."""
    if level:
      encoded = jnp.concatenate([self.hints[level - 1](carried), encoded], axis=-1)
    return self.to_codes[level](encoded).astype(jnp.float32)

  def carry(self, level: int, carried: Map | None, q: Map) -> Map:
    """Returns the codes of a level beside those above, enlarged; None is above the top."""
    if not level:
      return q
    above = self.ups[level - 1](carried).astype(jnp.float32)
    return jnp.concatenate([above, q], axis=-1)

  def decode(self, carried: Map) -> Image:
    """Returns the image, float32, not bounded, of what was carried to the bottom."""
    return self.decoder(carried)

  def __call__(self, x: Image, *, deterministic: bool = True) -> Image:
    """Returns the reconstruction; there is no dropout to switch."""
    del deterministic
    carried = None
    for level, encoded in enumerate(self.encode(x)):
      q, _ = codebook.quantize(self.vectors(level, encoded, carried), self.codes[level])
      carried = self.carry(level, carried, q)
    return self.decode(carried)
