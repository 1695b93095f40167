"""Multiply-accumulates against counts by hand, and against XLA's own count."""

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
