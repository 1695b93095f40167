"""Anti-aliased resampling by two with the binomial filter [1, 3, 3, 1].

Karras et al. 2020 (1912.04958), appendix B, in the form that NCSN++ (Song et al. 2021, 2011.13456) uses. The
filter is the outer product of [1, 3, 3, 1] / 8 with itself; outside the image there are zeros. It is applied
along one axis after the other, and only where its result is kept or its input is not one of the zeros between
the pixels of an upsampled image. That leaves a few shifted sums, which compilers fuse; the equal depthwise
convolutions take many times as long on CPUs.

Must not import anything of vaediff.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

HEIGHT, WIDTH = 1, 2


def fir_downsample(
  x: Float[Array, 'batch height width channels'],
) -> Float[Array, 'batch half_height half_width channels']:
  """Returns x filtered and halved along height and width; constants keep their value, but for the edges.

  Raises:
    ValueError: height or width is odd.
  """
  if x.shape[HEIGHT] % 2 or x.shape[WIDTH] % 2:
    raise ValueError(f'Halving needs an even height and width, got {x.shape[HEIGHT]} x {x.shape[WIDTH]}.')
  for axis in (HEIGHT, WIDTH):
    x = _filter(x, axis, padding=1, stride=2)
  return x


def fir_upsample(
  x: Float[Array, 'batch height width channels'],
) -> Float[Array, 'batch double_height double_width channels']:
  """Returns x doubled along height and width: zeros between the pixels, filtered, times four."""
  for axis in (HEIGHT, WIDTH):
    size = x.shape[axis]
    padded = _pad(x, axis, 1)
    before = jax.lax.slice_in_dim(padded, 0, size, axis=axis)
    after = jax.lax.slice_in_dim(padded, 2, size + 2, axis=axis)
    near = 0.75 * x
    pairs = jnp.stack([near + 0.25 * before, near + 0.25 * after], axis=axis + 1)
    x = pairs.reshape(*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])
  return x


def blur(
  x: Float[Array, 'batch height width channels'],
) -> Float[Array, 'batch height_plus_1 width_plus_1 channels']:
  """Returns x filtered, one pixel higher and wider: a stride-2 'VALID' 3x3 convolution then halves x."""
  for axis in (HEIGHT, WIDTH):
    x = _filter(x, axis, padding=2, stride=1)
  return x


def _filter(x: Array, axis: int, *, padding: int, stride: int) -> Array:
  """Returns every `stride`-th result of the filter along `axis`, with `padding` zeros at both ends."""
  padded = _pad(x, axis, padding)
  end = padded.shape[axis] - 3
  taps = [jax.lax.slice_in_dim(padded, i, end + i, stride, axis) for i in range(4)]
  return 0.125 * (taps[0] + taps[3]) + 0.375 * (taps[1] + taps[2])


def _pad(x: Array, axis: int, padding: int) -> Array:
  """Returns x with zeros at both ends of `axis`."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (padding, padding)
  return jnp.pad(x, widths)
