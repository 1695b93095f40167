"""Whole numbers: packing, rounding and products, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.models import integers


def whole(shape, low=-128, high=128, seed=0):
  return np.random.default_rng(seed).integers(low, high, shape).astype(np.int8)


def convolved(x, kernel, strides):
  """Returns the sums in NumPy's 64 bits; the kernel is (outputs, rows, columns, inputs)."""
  _, rows, columns, _ = kernel.shape
  x, kernel = x.astype(np.int64), kernel.astype(np.int64)
  height = (x.shape[1] - rows) // strides[0] + 1
  width = (x.shape[2] - columns) // strides[1] + 1
  out = np.zeros((x.shape[0], height, width, kernel.shape[0]), np.int64)
  for i in range(height):
    for j in range(width):
      window = x[:, i * strides[0] : i * strides[0] + rows, j * strides[1] : j * strides[1] + columns]
      out[:, i, j] = np.tensordot(window, kernel, ((1, 2, 3), (1, 2, 3)))
  return out


@pytest.mark.parametrize('inputs', [1, 6, 7])
def test_two_numbers_of_four_bits_share_a_byte_and_come_back(inputs):
  kernel = whole((5, 3, 3, inputs), -8, 8)
  packed = integers.pack(jnp.asarray(kernel))
  assert packed.dtype == jnp.uint8 and packed.shape == (5, 3, 3, (inputs + 1) // 2)
  np.testing.assert_array_equal(integers.unpack(packed, inputs), kernel)


def test_packed_numbers_are_half_as_many_bytes_for_the_compiler_too():
  packed = integers.pack(jnp.asarray(whole((64, 128), -8, 8)))
  program = jax.jit(lambda packed: integers.unpack(packed, 128)).lower(packed).compile()
  assert program.memory_analysis().argument_size_in_bytes == 64 * 128 // 2


@pytest.mark.parametrize('strides', [(1, 1), (2, 2)])
def test_convolutions_are_exact_sums_of_whole_numbers(strides):
  x, kernel = whole((2, 6, 8, 5)), whole((4, 3, 3, 5), seed=1)
  wanted = convolved(x, kernel, strides)
  for function in (integers.convolution, integers.convolution_by_product):
    found = function(jnp.asarray(x), jnp.asarray(kernel), strides)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize('padding', [((1, 1), (1, 1)), ((0, 1), (0, 1)), ((2, 0), (0, 0)), ((0, 0), (0, 0))])
def test_a_border_is_the_zero_point_of_each_example(padding):
  x, zero = whole((2, 3, 4, 5)), np.array([-100, 7], np.int32).reshape(2, 1, 1, 1)
  found = integers.bordered(jnp.asarray(x), jnp.asarray(zero), padding)
  for row in range(2):
    wanted = np.pad(x[row], (*padding, (0, 0)), constant_values=int(zero[row, 0, 0, 0]))
    np.testing.assert_array_equal(found[row], wanted)


def test_inputs_are_rounded_for_three_columns_and_not_for_nine_windows():
  """XLA's compiler for CPUs rounds anew what each slice reads, until slices are joined."""

  def layer(x, scale, zero, kernel):
    rounded = integers.bordered(integers.quantize(x, scale, zero), zero, ((1, 1), (1, 1)))
    return integers.convolution_by_product(rounded, kernel, (1, 1))

  each = jax.ShapeDtypeStruct((4, 1, 1, 1), jnp.float32), jax.ShapeDtypeStruct((4, 1, 1, 1), jnp.int32)
  shapes = (
    jax.ShapeDtypeStruct((4, 16, 16, 32), jnp.float32),
    *each,
    jax.ShapeDtypeStruct((32, 3, 3, 32), jnp.int8),
  )
  text = jax.jit(layer).lower(*shapes).compile().as_text()
  assert 1 <= text.count('round-nearest-even(') <= 3


def test_products_are_exact_where_float32_would_not_be():
  x, kernel = np.full((2, 3, 2048), 127, np.int8), np.full((4, 2048), 127, np.int8)
  kernel[:, 0] = 126  # the sum is odd, and above 2^24
  found = integers.product(jnp.asarray(x), jnp.asarray(kernel))
  assert found.shape == (2, 3, 4) and int(found[0, 0, 0]) == 127 * (2047 * 127 + 126) > 2**24


def test_every_output_has_its_scale_and_each_part_of_its_inputs():
  kernel = np.array([[1.0, 0.0], [-127.0, 0.0], [2.54, 3.81]], np.float32)
  slices = (slice(0, 2), slice(2, 3))
  scale = integers.kernel_scale(jnp.asarray(kernel), slices, 8)
  np.testing.assert_allclose(scale, [[1.0, 1.0], [0.02, 0.03]], rtol=1e-6)
  rounded = integers.quantize_kernel(jnp.asarray(kernel), integers.of_inputs(scale, slices), 8)
  np.testing.assert_array_equal(rounded, [[1, 0], [-127, 0], [127, 127]])


@pytest.mark.parametrize('bits', integers.BITS)
def test_rounded_weights_are_half_a_step_away_at_most_and_as_far_below_zero_as_above(bits):
  kernel = np.random.default_rng(0).normal(size=(3, 3, 8, 4)).astype(np.float32)
  slices = (slice(0, 8),)
  scale = integers.of_inputs(integers.kernel_scale(jnp.asarray(kernel), slices, bits), slices)
  rounded = np.asarray(integers.quantize_kernel(jnp.asarray(kernel), scale, bits))
  assert abs(rounded).max() == integers.LARGEST[bits]
  assert np.all(abs(rounded * np.asarray(scale)[None, None] - kernel) <= np.asarray(scale) / 2 * 1.0001)


@pytest.mark.parametrize(('low', 'high'), [(-0.278, 6.0), (0.5, 2.0), (-3.0, -1.0), (0.0, 0.0)])
def test_zero_is_exact_and_a_range_fills_the_bytes(low, high):
  scale, zero = integers.affine(low, high)
  ends = integers.quantize(jnp.array([min(low, 0.0), max(high, 0.0)]), scale, zero)
  assert integers.quantize(jnp.zeros(()), scale, zero) == zero
  if high > low:
    assert -128 <= ends[0] <= -127 and 126 <= ends[1] <= 127


def test_scales_are_those_of_qwix_but_for_the_half_step_that_it_adds_at_the_ends():
  qwix = pytest.importorskip('qwix')
  kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 8, 4)), jnp.float32)
  theirs = qwix.quantize(kernel, jnp.int8, channelwise_axes=[3])
  ours = integers.kernel_scale(kernel, (slice(0, 8),), 8)
  np.testing.assert_allclose(ours[0] * 127, theirs.scale.reshape(-1) * 127.5, rtol=1e-6)  # the largest weight
  rounded = integers.quantize_kernel(kernel, integers.of_inputs(ours, (slice(0, 8),)), 8)
  assert abs(rounded.astype(int) - theirs.qvalue.astype(int)).max() <= 1
