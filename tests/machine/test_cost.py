"""Multiply-accumulates against counts by hand, and against XLA's own count."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from vaediff.machine import cost


def test_convolution_and_product_by_hand():
  x, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 5))

  def conv(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (2, 2), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))

  assert cost.macs(conv, x, kernel) == 2 * 4 * 4 * 5 * 27
  assert cost.macs(lambda a, b: a @ b, jnp.zeros((4, 6)), jnp.zeros((6, 7))) == 4 * 6 * 7


def test_a_transposed_convolution_counts_no_zeros_between_pixels():
  """4x4, stride 2, 8 to 8 channels, from 16x16: each of the 32x32 results has 2x2 pixels under the kernel."""
  x, layer = jnp.zeros((1, 16, 16, 8)), nn.ConvTranspose(8, (4, 4), (2, 2), use_bias=False)
  params = jax.eval_shape(layer.init, jax.random.key(0), x)
  assert cost.macs(layer.apply, params, x) == 32 * 32 * 8 * (2 * 2 * 8) == 262_144
  flops = jax.jit(layer.apply).lower(params, x).cost_analysis()['flops']
  assert flops == 2 * 62 * 62 * 8 * 8  # which leaves the padding out: one product less on each side


@pytest.mark.parametrize('kernel_size', [1, 3, 4])
@pytest.mark.parametrize('numbers', [('NHWC', 'HWIO', 'NHWC'), ('NCHW', 'OIHW', 'NCHW')])
def test_each_gradient_of_a_convolution_with_strides_counts_what_the_convolution_does(kernel_size, numbers):
  lengths = {'N': 2, 'C': 3, 'I': 3, 'O': 5}
  x = jnp.zeros([lengths.get(axis, 8) for axis in numbers[0]])
  kernel = jnp.zeros([lengths.get(axis, kernel_size) for axis in numbers[1]])

  def conv(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (2, 2), 'SAME', dimension_numbers=numbers)

  forward = cost.macs(conv, x, kernel)
  assert forward == 2 * 4 * 4 * 5 * (3 * kernel_size**2)
  for argument in (0, 1):
    gradient = jax.grad(lambda x, kernel: jnp.sum(conv(x, kernel)), argument)
    assert cost.macs(gradient, x, kernel) == 2 * forward, argument


def test_loops_are_also_counted_as_xla_counts_them():
  a = jnp.zeros((5, 5))

  def loop(a):
    inner = lambda c, _: (c @ a, None)
    outer = lambda c, _: (jax.lax.scan(inner, c @ a, None, length=3)[0], None)
    return jax.lax.scan(outer, a @ a, None, length=7)[0]

  assert cost.macs_and_once(loop, a) == (125 * (1 + 7 * (1 + 3)), 125 * 3)
  assert jax.jit(loop).lower(a).cost_analysis()['flops'] == pytest.approx(2 * 125 * 3, rel=0.1)


def test_scan_counts_every_turn_and_remat_is_seen():
  a = jnp.zeros((5, 5))

  def loop(a):
    return jax.lax.scan(lambda c, _: (jax.checkpoint(lambda c: c @ a)(c), None), a, None, length=7)[0]

  assert cost.macs(loop, a) == 7 * 125


@pytest.mark.parametrize('width', [8, 16])
def test_agrees_with_xla_where_products_dominate(width):
  def net(x, w):
    return jax.nn.relu(jax.nn.relu(x @ w) @ w)

  args = (
    jax.ShapeDtypeStruct((256, width), jnp.float32),
    jax.ShapeDtypeStruct((width, width), jnp.float32),
  )
  flops = jax.jit(net).lower(*args).cost_analysis()['flops']
  assert 2 * cost.macs(net, *args) == pytest.approx(flops, rel=0.15)


def test_bytes_and_parameters():
  tree = {
    'a': jax.ShapeDtypeStruct((3, 4), jnp.float32),
    'b': jax.ShapeDtypeStruct((), jnp.int32),
    'c': None,
  }
  assert cost.num_bytes(tree) == 52 and cost.num_parameters(tree) == 13
