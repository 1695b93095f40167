"""Networks of whole numbers: the same modules, against the same arithmetic in NumPy and against floats."""

import itertools
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from some_slow import some_slow

from vaediff.errors import UserError
from vaediff.machine import cost, runtime
from vaediff.models import integers, observed
from vaediff.models import quantized as quantized_networks
from vaediff.models.functional import Model
from vaediff.models.quantized import CONVOLUTIONS, FLOATS, PRODUCTS, WIDE, Quantized
from vaediff.models.unet import UNet


class Joined(nn.Module):
  """A convolution of a map with another behind it, as on a U-Net's way up."""

  stride: int = 1

  @nn.compact
  def __call__(self, x, t, deterministic=True):
    del deterministic
    h = Body(name='before')(x)
    return Block(self.stride, name='block')(jnp.concatenate([h, x], axis=-1))


class Body(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.relu(x)


class Block(nn.Module):
  stride: int

  @nn.compact
  def __call__(self, x):
    return nn.Conv(4, (3, 3), strides=(self.stride,) * 2, name='conv_1')(x)


def struct(*shape):
  return jax.ShapeDtypeStruct((1, *shape), jnp.float32)


def joined(stride=1):
  return Model(module=Joined(stride), inputs=(struct(6, 6, 3), struct()))


def unet(**changes):
  fields = {
    'variant': 'openai', 'image_size': 8, 'image_channels': 1, 'channels': 8, 'channel_multipliers': (1, 2),
    'num_res_blocks': 1, 'attention_resolutions': (4,), 'num_heads': 2, 'dropout': 0.0,
    'scale_shift_norm': False, 'remat': True, 'dtype': 'float32',
  }  # fmt: skip
  module = UNet(**{**fields, **changes})
  return Model(module=module, inputs=(struct(8, 8, 1), struct()))


def filled(model, seed=1):
  leaves, tree = jax.tree.flatten(jax.eval_shape(model.init, jax.random.key(0)))
  random = np.random.default_rng(seed)
  return tree.unflatten([jnp.asarray(0.3 * random.normal(size=leaf.shape), jnp.float32) for leaf in leaves])


def quantized(model, bits=8, inputs=True, buckets=1, arithmetic=PRODUCTS):
  return Quantized.of(
    model, layers=observed.quantizable(observed.layers_of(model)), bits=bits, quantized_inputs=inputs,
    buckets=buckets, arithmetic=lambda: arithmetic,
  )  # fmt: skip


def test_layers_are_found_with_the_seam_of_what_is_joined():
  layers = {layer.path: layer for layer in observed.layers_of(unet())}
  assert layers['conv_in'].shape == (3, 3, 1, 8) and layers['time_mlp/dense_0'].rank == 2
  assert layers['up_1/res_0/conv_1'].split == 16 and layers['up_1/res_0/conv_1'].shape == (3, 3, 32, 16)
  assert layers['up_0/res_1/skip'].split == 8 and layers['up_0/res_1/skip'].shape == (16, 8)
  assert not any(layer.split for path, layer in layers.items() if not path.startswith('up_'))


def test_first_and_last_layers_and_those_of_the_time_stay_and_others_by_their_name():
  layers = observed.layers_of(unet())
  kept = {layer.path for layer in layers} - {layer.path for layer in observed.quantizable(layers)}
  assert kept == {'conv_in', 'conv_out', 'time_mlp/dense_0', 'time_mlp/dense_1'}
  fewer = observed.quantizable(layers, ('middle/*',))
  assert fewer and not any(layer.path.startswith('middle') for layer in fewer)
  with pytest.raises(UserError, match=r"the layer 'centre/\*', which the network does not have; layers: "):
    observed.quantizable(layers, ('centre/*',))


@pytest.mark.parametrize(
  ('arithmetic', 'stride'),
  some_slow(list(itertools.product([PRODUCTS, CONVOLUTIONS], [1, 2])), (PRODUCTS, 1), (CONVOLUTIONS, 2)),
)
def test_two_halves_with_zero_points_are_what_numpy_gives(stride, arithmetic):
  model = joined(stride)
  whole = quantized(model, buckets=2, arithmetic=arithmetic)
  (layer,) = whole.layers
  assert layer.split == 3 and layer.slices == (slice(0, 3), slice(3, 6))
  random = np.random.default_rng(0)
  params = filled(model)
  x, t = random.normal(size=(3, 6, 6, 3)).astype(np.float32), np.array([0.2, 0.9, 0.5], np.float32)
  ranges = np.array([[[0.0, 2.0], [-2.0, 1.5]], [[0.0, 1.0], [-1.0, 3.0]]], np.float32)
  tree = whole.quantize(params, ranges={'block/conv_1': ranges}, times=[0.5])
  found = whole.apply(tree, jnp.asarray(x), jnp.asarray(t))

  # every number of this is a whole one but for the scales at the end
  kernel = np.asarray(params['block']['conv_1']['kernel'])
  joint = np.concatenate([np.maximum(x, 0), x], axis=-1)
  total = np.zeros(found.shape)
  window = lambda q, i, j: q[:, i * stride : i * stride + 3, j * stride : j * stride + 3]
  pads = jax.lax.padtype_to_pads((6, 6), (3, 3), (stride, stride), 'SAME')
  for part, channels in enumerate(layer.slices):
    own = kernel[..., channels, :]
    w_scale = np.abs(own).max(axis=(0, 1, 2)) / np.float32(127)
    w = np.rint(own / w_scale).astype(np.int64)
    for row, bucket in enumerate([0, 1, 0]):
      scale, zero = (np.asarray(v) for v in integers.affine(*ranges[bucket, part]))
      q = np.clip(np.rint(joint[row : row + 1, ..., channels] / scale) + zero, -128, 127).astype(np.int64)
      q = np.pad(q, ((0, 0), *pads, (0, 0)), constant_values=zero)  # the border is the zero point
      for i in range(found.shape[1]):
        for j in range(found.shape[2]):
          sums = np.tensordot(window(q, i, j) - zero, w, ((1, 2, 3), (0, 1, 2)))[0]
          total[row, i, j] += sums * (scale.astype(np.float64) * w_scale)
  np.testing.assert_allclose(
    found, total + np.asarray(params['block']['conv_1']['bias']), rtol=2e-5, atol=2e-5
  )


@pytest.mark.parametrize('bits', integers.BITS)
def test_floats_made_of_the_kernels_are_the_network_with_rounded_kernels(bits):
  model = joined()
  params, x, t = filled(model), jnp.ones((2, 6, 6, 3)), jnp.array([0.3, 0.7])
  whole = quantized(model, bits, inputs=False)
  tree = whole.quantize(params)
  found = whole.apply(tree, x, t)
  np.testing.assert_allclose(found, model.apply(whole.dequantized(tree), x, t), rtol=1e-4, atol=1e-4)
  assert abs(found - model.apply(params, x, t)).max() > 1e-3
  ready = whole.ready(tree)
  assert jax.tree.structure(ready) == jax.tree.structure(params)
  np.testing.assert_allclose(whole.apply(ready, x, t), found, rtol=1e-4, atol=1e-4)


def test_where_there_are_no_fast_products_the_same_stored_network_is_made_floats_of():
  model = joined()
  params, x, t = filled(model), jnp.ones((2, 6, 6, 3)), jnp.array([0.3, 0.7])
  whole = quantized(model, buckets=2, arithmetic=FLOATS)
  ranges = {layer.path: np.tile(np.float32([-1, 1]), (2, layer.parts, 1)) for layer in whole.layers}
  tree = whole.quantize(params, ranges=ranges, times=[0.5])
  assert tree['tables']['input_scale'].shape == (len(whole.layers), 2, 2)
  wanted = model.apply(whole.dequantized(tree), x, t)
  np.testing.assert_allclose(whole.apply(tree, x, t), wanted, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(whole.apply(whole.ready(tree), x, t), wanted, rtol=1e-4, atol=1e-4)
  fast = quantized(model, buckets=2)  # products of whole numbers read them as they are stored
  assert fast.ready(tree) is tree


def test_a_wide_layer_is_computed_as_products_and_a_narrow_one_in_floats(monkeypatch):
  model = joined()
  params, t = filled(model), jnp.array([0.3, 0.7])
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 3)), jnp.float32)
  whole, products = (quantized(model, arithmetic=arithmetic) for arithmetic in (WIDE, PRODUCTS))
  tree = whole.quantize(params, ranges={'block/conv_1': np.tile(np.float32([-1, 1]), (1, 2, 1))})
  as_products, in_floats = products.apply(tree, x, t), model.apply(whole.dequantized(tree), x, t)
  assert abs(as_products - in_floats).max() > 1e-2
  assert whole.whole_layers() == () and 'tables' not in whole.ready(tree)
  np.testing.assert_allclose(whole.apply(tree, x, t), in_floats, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(whole.apply(whole.ready(tree), x, t), in_floats, rtol=1e-4, atol=1e-4)
  monkeypatch.setattr(quantized_networks, 'WIDE_WINDOW', 3)
  assert whole.whole_layers() == whole.layers and 'kernel_q' in whole.ready(tree)['block']['conv_1']
  np.testing.assert_allclose(whole.apply(tree, x, t), as_products, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(whole.apply(whole.ready(tree), x, t), as_products, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_cpus_compute_narrow_layers_in_floats_and_wide_ones_as_products(monkeypatch):
  model = unet()
  params, t = filled(model), jnp.array([0.3, 0.7])
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 1)), jnp.float32)
  whole = quantized(model, buckets=2, arithmetic=WIDE)
  ranges = {layer.path: np.tile(np.float32([-1, 1]), (2, layer.parts, 1)) for layer in whole.layers}
  tree = whole.quantize(params, ranges=ranges, times=[0.5])
  assert whole.whole_layers() == () and 'tables' not in whole.ready(tree)  # so narrow, none pays

  monkeypatch.setattr(quantized_networks, 'WIDE_WINDOW', 16)
  monkeypatch.setattr(quantized_networks, 'WIDE_ROW', 16)
  wide = {layer.path for layer in whole.whole_layers()}
  assert 0 < len(wide) < len(whole.layers)
  assert any(layer.path in wide and layer.shape[:2] == (3, 3) for layer in whole.layers)
  assert any(layer.path in wide and layer.split for layer in whole.layers)
  ready = whole.ready(tree)
  for layer in whole.layers:
    found = observed.subtree(ready, layer.path)
    assert ('kernel' in found) == (layer.path not in wide) != ('kernel_q' in found)
  mixed = jax.jit(whole.apply)(ready, x, t)
  np.testing.assert_allclose(mixed, jax.jit(whole.apply)(tree, x, t), rtol=1e-4, atol=1e-4)
  for arithmetic in (FLOATS, PRODUCTS):  # and it is neither of the two
    other = jax.jit(quantized(model, buckets=2, arithmetic=arithmetic).apply)(tree, x, t)
    assert np.abs(mixed - other).max() > 1e-4


def test_a_sampler_makes_floats_of_the_kernels_once_before_its_steps():
  """The compiler moves them out of the loop: no bytes are read inside."""
  model = joined()
  whole = quantized(model, inputs=False)

  def steps(tree, x):
    step = lambda x, _: (x - whole.apply(tree, x, jnp.ones(2))[..., :3], None)
    return jax.lax.scan(step, x, None, length=5)[0]

  tree = jax.eval_shape(whole.init, jax.random.key(0))
  text = jax.jit(steps).lower(tree, jax.ShapeDtypeStruct((2, 6, 6, 3), jnp.float32)).compile().as_text()
  (loop,) = set(re.findall(r'body=%?([\w.\-]+)', text))
  body = text[text.index(f'%{loop} (') :]
  assert 'convolution(' in text and 's8[' in text and 's8[' not in body[: body.index('\n}')]


@pytest.mark.slow
def test_eight_bits_come_near_to_floats_within_the_ranges_that_were_seen():
  model = unet()
  params, x = filled(model), jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
  t = jnp.array([0.1, 0.4, 0.6, 0.9])
  whole = quantized(model)
  seen = observed.ranges_of(model, params, x, t, layers=whole.layers)
  ranges = {
    path: jnp.stack([value[..., 0].min(axis=0), value[..., 1].max(axis=0)], axis=-1)[None]
    for path, value in seen.items()
  }
  tree = whole.quantize(params, ranges=ranges)
  exact, found = jax.jit(model.apply)(params, x, t), jax.jit(whole.apply)(tree, x, t)
  assert 0 < jnp.linalg.norm(found - exact) < 0.1 * jnp.linalg.norm(exact)


def test_the_correction_of_the_output_is_that_of_the_nearest_time():
  model = joined()
  whole = quantized(model, inputs=False)
  params, x, t = filled(model), jnp.ones((2, 6, 6, 3)), jnp.array([0.2, 0.9])
  plain = whole.apply(whole.quantize(params), x, t)
  one = np.ones((1, 4))
  correction = {
    'times': np.array([0.25, 1.0]), 'std': np.zeros(2),
    'gain': np.concatenate([0.5 * one, 0 * one]), 'bias': np.concatenate([0.1 * one, 0.2 * one]),
  }  # fmt: skip
  tree = whole.quantize(params, correction=correction)
  found = whole.apply(tree, x, t)
  np.testing.assert_allclose(whole.apply(whole.ready(tree), x, t), found, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(found[0], (plain[0] - 0.1) / 1.5, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(found[1], plain[1] - 0.2, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_wide_network_is_a_quarter_in_bytes_and_an_eighth_with_four_bits():
  # that of CIFAR-10
  model = unet(channels=128, channel_multipliers=(1, 2, 2, 2), num_res_blocks=2, remat=False)
  floats = cost.num_bytes(jax.eval_shape(model.init, jax.random.key(0)))
  for bits, most in ((8, 0.27), (4, 0.15)):
    stored = jax.eval_shape(quantized(model, bits, buckets=8).init, jax.random.key(0))
    assert cost.num_bytes(stored) < most * floats


@pytest.mark.slow
def test_a_block_runs_alone_as_it_does_in_the_network():
  model = unet()
  params, x, t = filled(model), jnp.ones((1, 8, 8, 1)), jnp.array([0.3])
  blocks = observed.blocks_of(model)
  paths = [block.path for block in blocks]
  assert paths[2:6] == ['conv_in', 'down_0/res_0', 'down_0/down', 'down_1/res_0'] and paths[-1] == 'conv_out'
  seen = observed.block_io(model, params, x, t, blocks=blocks)
  for block in blocks[3:6]:
    inputs, output = seen[block.path]
    np.testing.assert_allclose(
      block.apply(observed.subtree(params, block.path), *inputs), output, rtol=1e-5, atol=1e-5
    )


COMPILED = """
import jax
import jax.numpy as jnp
from test_quantized import WIDE, quantized, unet
from vaediff.machine import integers
model = unet(channels=64, remat=False, attention_resolutions=())
whole = quantized(model, arithmetic=WIDE)
given = [jnp.zeros((2, *one.shape[1:]), one.dtype) for one in model.inputs]
params = whole.ready(whole.init(jax.random.key(0)))
text = jax.jit(whole.apply).lower(params, *given).compile().as_text()
print(*integers.in_library(text), len(whole.whole_layers()), len(whole.layers))
"""


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='the library is that of CPUs')
def test_a_compiled_network_has_its_wide_layers_in_the_library_and_none_in_loops():
  """With the flag of `main`, and the compiler's optimizations."""
  environment = {
    **os.environ,
    'XLA_FLAGS': runtime.EIGEN_CONVOLUTIONS,
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '0',
    'PYTHONPATH': os.pathsep.join([str(pathlib.Path(__file__).parent), *sys.path]),
  }
  said = subprocess.run(
    [sys.executable, '-c', COMPILED], env=environment, capture_output=True, text=True, check=True
  ).stdout
  inside, outside, wide, layers = map(int, said.split())
  assert outside == 0 and 0 < wide < layers
  assert inside >= wide  # a product for each part of what a layer reads
