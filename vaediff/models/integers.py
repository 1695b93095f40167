"""Arithmetic of whole numbers in the place of that of a convolution or a matrix product.

A kernel is w = s_w q_w, with one scale for each output channel (and, of a concatenation that is read in two
parts, one more for the second part), q_w in -127 ... 127 or in -7 ... 7. An input is x = s_x (q_x - z), with
q_x in -128 ... 127 and a zero point z that stands for 0 exactly (Jacob et al. 2018, arXiv:1712.05877, eq. 1):

    x w = s_x s_w (q_x q_w - z sum q_w)

whose sums are whole numbers of 32 bits. A border of zeros is one of z: it is put around x, then x is rounded.
The two parts of a concatenation have scales of their own, s_1 s_w1 (...) + s_2 s_w2 (...), which is exact
(Q-Diffusion: Li et al. 2023, arXiv:2302.04304, section 3.2). Kernels of 4 bits are stored two to a byte.

Must not import anything of vaediff but `types` and `errors`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Int8, UInt8

LOWEST, HIGHEST = -128, 127
"""Of a rounded input."""
LARGEST = {8: 127, 4: 7}
"""Of a rounded kernel, by bits: as far below zero as above."""
BITS = tuple(LARGEST)
SMALLEST_RANGE = 1e-6
"""An input that is always zero gets the scale of this range."""


def pack(kernel: Int8[Array, '*outputs inputs']) -> UInt8[Array, '*outputs pairs']:
  """Returns numbers in -8 ... 7, two to a byte: the inputs of the first half are the low four bits."""
  padded = jnp.pad(kernel, [(0, 0)] * (kernel.ndim - 1) + [(0, kernel.shape[-1] % 2)])
  low, high = jnp.split(jax.lax.bitcast_convert_type(padded, jnp.uint8), 2, axis=-1)
  return (low & jnp.uint8(15)) | (high << jnp.uint8(4))


def unpack(packed: UInt8[Array, '*outputs pairs'], inputs: int) -> Int8[Array, '*outputs inputs']:
  """Returns what `pack` was given; shifts alone, so that the bytes stay packed in memory."""
  low, high = (jax.lax.bitcast_convert_type(part, jnp.int8) for part in (packed << jnp.uint8(4), packed))
  return jnp.concatenate([low >> jnp.int8(4), high >> jnp.int8(4)], axis=-1)[..., :inputs]


def kernel_scale(
  kernel: Float[Array, '*window inputs outputs'], slices: tuple[slice, ...], bits: int
) -> Float[Array, 'parts outputs']:
  """Returns the scale of each part of the inputs and each output: its largest weight is the largest number.

  Of a channel without a weight it is 1.
  """
  axes = tuple(range(kernel.ndim - 1))
  most = jnp.stack([jnp.max(jnp.abs(kernel[..., part, :]), axis=axes) for part in slices])
  return jnp.where(most > 0, most / LARGEST[bits], 1.0).astype(jnp.float32)


def of_inputs(
  scale: Float[Array, 'parts outputs'], slices: tuple[slice, ...]
) -> Float[Array, 'inputs outputs']:
  """Returns the scale of each weight's input and output."""
  counts = [part.stop - part.start for part in slices]
  return jnp.concatenate(
    [jnp.broadcast_to(row, (count, *row.shape)) for row, count in zip(scale, counts, strict=True)]
  )


def quantize_kernel(
  kernel: Float[Array, '*window inputs outputs'], scale: Float[Array, 'inputs outputs'], bits: int
) -> Int8[Array, '*window inputs outputs']:
  """Returns the nearest whole numbers, within the bits."""
  most = LARGEST[bits]
  scale = scale.reshape((1,) * (kernel.ndim - 2) + scale.shape)
  return jnp.clip(jnp.round(kernel / scale), -most, most).astype(jnp.int8)


def affine(low: ArrayLike, high: ArrayLike) -> tuple[Float[Array, '...'], Int[Array, '...']]:
  """Returns scale (float32) and zero point (int32) of inputs in [low, high], widened to hold 0."""
  low, high = jnp.minimum(jnp.asarray(low, jnp.float32), 0), jnp.maximum(jnp.asarray(high, jnp.float32), 0)
  scale = jnp.maximum(high - low, SMALLEST_RANGE) / (HIGHEST - LOWEST)
  zero = jnp.clip(jnp.round(LOWEST - low / scale), LOWEST, HIGHEST)
  return scale, zero.astype(jnp.int32)


def quantize(x: Array, scale: Array, zero: Array) -> Int8[Array, '...']:
  """Returns the nearest whole numbers of an input; scale and zero point are broadcast against it."""
  rounded = jnp.round(x.astype(jnp.float32) / scale) + zero.astype(jnp.float32)
  return jnp.clip(rounded, LOWEST, HIGHEST).astype(jnp.int8)


def convolution(
  x: Int8[Array, 'batch height width inputs'],
  kernel: Int8[Array, 'outputs rows columns inputs'],
  strides: tuple[int, int],
) -> Int[Array, 'batch height_out width_out outputs']:
  """Returns the sums of products, without a border, by the backend's own convolution of whole numbers."""
  return jax.lax.conv_general_dilated(
    x, kernel, strides, 'VALID', dimension_numbers=('NHWC', 'OHWI', 'NHWC'), preferred_element_type=jnp.int32
  )


def bordered(
  x: Int8[Array, 'batch height width inputs'],
  zero: Int[Array, '...'],
  padding: tuple[tuple[int, int], ...],
) -> Int8[Array, 'batch height_padded width_padded inputs']:
  """Returns rounded inputs with a border of what stands for 0.

  It is put around bytes: around floats, before they are rounded, four times as much is written and read.

  Args:
    x: the inputs.
    zero: their zero points, to be broadcast against them.
    padding: of height and width, before and after.
  """
  zero = zero.astype(jnp.int8)
  for axis, sides in enumerate(padding, start=1):
    shapes = [(*x.shape[:axis], side, *x.shape[axis + 1 :]) for side in sides]
    before, after = ([jnp.broadcast_to(zero, shape)] if shape[axis] else [] for shape in shapes)
    x = jnp.concatenate([*before, x, *after], axis=axis) if before or after else x
  return x


def convolution_by_product(
  x: Int8[Array, 'batch height width inputs'],
  kernel: Int8[Array, 'outputs rows columns inputs'],
  strides: tuple[int, int],
) -> Int[Array, 'batch height_out width_out outputs']:
  """Returns the same as one product of the windows and the kernel.

  Windows of bytes take twice the memory of the input in floats. On CPUs this is faster than the library's
  convolution, and GPUs have products alone. They are gathered along the width first, then along the height:
  what the input is made of XLA's compiler for CPUs makes anew for each slice of it, three times so, not nine.
  """
  for axis in (2, 1):
    size, stride = kernel.shape[axis], strides[axis - 1]
    length = (x.shape[axis] - size) // stride * stride + 1
    shifted = [jax.lax.slice_in_dim(x, i, i + length, stride, axis) for i in range(size)]
    x = jnp.concatenate(shifted, axis=-1) if size > 1 else shifted[0]
  return product(x, kernel.reshape(kernel.shape[0], -1))


def product(
  x: Int8[Array, '*batch inputs'], kernel: Int8[Array, 'outputs inputs']
) -> Int[Array, '*batch outputs']:
  """Returns the sums of products over the last axes, int32."""
  rows = x.reshape(-1, x.shape[-1])  # one matrix: backends that know whole numbers know that
  sums = jax.lax.dot_general(rows, kernel, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
  return sums.reshape(*x.shape[:-1], kernel.shape[0])


def padding_of(
  padding: str | tuple[tuple[int, int], ...],
  sides: tuple[int, ...],
  window: tuple[int, ...],
  strides: tuple[int, ...],
) -> tuple[tuple[int, int], ...]:
  """Returns the border (before, after) along each side, as XLA gives it for a name."""
  if isinstance(padding, str):
    return tuple(jax.lax.padtype_to_pads(sides, window, strides, padding))
  return tuple(tuple(pair) for pair in padding)
