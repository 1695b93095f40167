"""The two-dimensional orthonormal Haar transform, one level (in WaveDiff: Phung et al. 2023, 2211.16152).

Of every 2 x 2 block [a b; c d] of pixels it makes four numbers,

    LL = (a + b + c + d) / 2     LH = (a - b + c - d) / 2
    HL = (a + b - c - d) / 2     HH = (a - b - c + d) / 2,

low frequencies first along height, then along width. The matrix is symmetric and its own inverse. Pixels in
[-1, 1] give bands in [-2, 2]; whoever wants [-1, 1] back divides by two.

Must not import anything of vaediff.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

Band = Float[Array, 'batch half_height half_width channels']


def split_bands(x: Float[Array, 'batch height width channels']) -> tuple[Band, Band, Band, Band]:
  """Returns the bands (LL, LH, HL, HH) of x, each half as high and wide.

  Raises:
    ValueError: height or width is odd.
  """
  batch, height, width, channels = x.shape
  if height % 2 or width % 2:
    raise ValueError(f'The Haar transform needs an even height and width, got {height} x {width}.')
  blocks = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
  return _butterfly(
    blocks[:, :, 0, :, 0], blocks[:, :, 0, :, 1], blocks[:, :, 1, :, 0], blocks[:, :, 1, :, 1]
  )


def merge_bands(
  low_low: Band, low_high: Band, high_low: Band, high_high: Band
) -> Float[Array, 'batch height width channels']:
  """Returns the image that has these bands, twice as high and wide as each."""
  batch, height, width, channels = low_low.shape
  a, b, c, d = _butterfly(low_low, low_high, high_low, high_high)
  rows = jnp.stack([jnp.stack([a, b], axis=3), jnp.stack([c, d], axis=3)], axis=2)
  return rows.reshape(batch, 2 * height, 2 * width, channels)


def haar(
  x: Float[Array, 'batch height width channels'],
) -> Float[Array, 'batch half_height half_width bands']:
  """Returns the bands of x side by side along the channels, [LL, LH, HL, HH]; energy is preserved.

  Raises:
    ValueError: height or width is odd.
  """
  return jnp.concatenate(split_bands(x), axis=-1)


def inverse_haar(
  bands: Float[Array, 'batch half_height half_width bands'],
) -> Float[Array, 'batch height width channels']:
  """Returns the image whose transform is `bands`.

  Raises:
    ValueError: the channels cannot be split into four bands.
  """
  if bands.shape[-1] % 4:
    raise ValueError(f'Four bands need a multiple of 4 channels, got {bands.shape[-1]}.')
  return merge_bands(*jnp.split(bands, 4, axis=-1))


def _butterfly(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, Array, Array, Array]:
  """Returns the four numbers of the module's equations; applied twice it is the identity."""
  along_top, along_bottom = a + b, c + d
  across_top, across_bottom = a - b, c - d
  return (
    0.5 * (along_top + along_bottom),
    0.5 * (across_top + across_bottom),
    0.5 * (along_top - along_bottom),
    0.5 * (across_top - across_bottom),
  )
