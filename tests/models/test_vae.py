import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from some_slow import some_slow

from configs import presets
from vaediff.errors import UserError
from vaediff.models.functional import Model
from vaediff.models.vae import Bottleneck, Vae
from vaediff.models.vae_blocks import Step, parse_blocks, parse_channels

TINY = {
  'encoder_blocks': '8x1,8d2,8t4,4d4,4t1,1',
  'decoder_blocks': '1x1,1u4,1t4,4x1,4u2,4t8,8x2',
  'encoder_channels': '8:6,4:8,1:12',
  'decoder_channels': '8:4,4:8,1:10',
  'latent_dim': 10,
}


def tiny(**changes) -> Model:
  module = Vae(**{**TINY, **changes})
  size = int(module.encoder_blocks.split('x')[0])
  shape = (1, size, size, module.image_channels)
  return Model(module=module, inputs=(jax.ShapeDtypeStruct(shape, jnp.float32),))


def count(params) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def shapes(model: Model):
  return jax.eval_shape(model.init, jax.random.key(0))


def random_params(model: Model, rng):
  # Not the module's own initialisation: biases and zero kernels must not hide anything.
  return jax.tree.map(lambda leaf: jnp.float32(0.3 * rng.normal(size=leaf.shape)), shapes(model))


def random_images(rng):
  return jnp.float32(rng.uniform(-1, 1, size=(2, 8, 8, 3)))


def apply(model: Model, params, x, method=None):
  return jax.jit(lambda params, x: model.apply(params, x, method=method))(params, x)


@pytest.fixture
def rng():
  return np.random.default_rng(0)


@pytest.mark.parametrize(
  ('name', 'size', 'encoder', 'decoder', 'total'),
  some_slow([
    ('cifar10', 32, 5831, 3413, 9243),
    ('celeba64', 64, 8029, 5983, 14012),
    ('celebamaskhq128', 128, 14404, 6694, 21098),
    ('ffhq128', 128, 14404, 6694, 21098),
    ('celebahq256', 256, 19463, 13169, 32633),
  ], 'cifar10'),
)  # fmt: skip
def test_parameters_in_thousands_are_the_published_networks(name, size, encoder, decoder, total):
  image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  model = Model(module=Vae(**presets.VAE[name]), inputs=(image,))
  params = shapes(model)
  assert round(count(params['encoder']) / 1000) == encoder
  assert round(count(params['decoder']) / 1000) == decoder
  assert round(count(params) / 1000) == total


def test_parameters_are_plain_dicts_with_stable_names():
  params = shapes(tiny())
  assert type(params) is dict and type(params['encoder']) is dict
  assert set(params['encoder']) == {
      'conv_in', 'residual8_0', 'residual8_1', 'project4_0', 'residual4_0', 'project1_0',
      'residual1_0', 'mean', 'logvar',
  }  # fmt: skip
  assert set(params['decoder']) == {
      'residual1_0', 'project4_0', 'residual4_0', 'project8_0', 'residual8_0', 'residual8_1',
      'conv_out',
  }  # fmt: skip
  block = params['encoder']['residual8_0']
  assert block['conv_1']['kernel'].shape == (6, 3)
  assert block['conv_2']['kernel'].shape == (3, 3, 3, 3)
  assert params['encoder']['residual1_0']['conv_2']['kernel'].shape == (6, 6)
  assert set(params['encoder']['conv_in']) == set(params['encoder']['mean']) == {'kernel'}


def _gelu(x):
  return 0.5 * x * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))


def _conv(layer, x):
  kernel = layer['kernel']
  if kernel.ndim == 2:
    y = x @ kernel
  else:
    height, width = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = sum(padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3))
  return y + layer.get('bias', 0.0)


def _block(block, x):
  h = x
  for i in range(1, 5):
    h = _conv(block[f'conv_{i}'], _gelu(h))
  return x + h


def _double(params):
  return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def test_encode_and_decode_are_the_published_layers(rng):
  model = tiny()
  params = random_params(model, rng)
  x, z = random_images(rng), jnp.float32(rng.normal(size=(2, 10)))

  p = _double(params)['encoder']
  h = _conv(p['conv_in'], np.asarray(x, np.float64) / 2 + 0.5)
  h = _block(p['residual8_1'], _block(p['residual8_0'], h))
  h = h.reshape(2, 4, 2, 4, 2, 6).mean(axis=(2, 4))
  h = _block(p['residual4_0'], _conv(p['project4_0'], h)).mean(axis=(1, 2), keepdims=True)
  h = _block(p['residual1_0'], _conv(p['project1_0'], h))[:, 0, 0]
  mean, logvar = apply(model, params, x, method='encode')
  np.testing.assert_allclose(mean, h @ p['mean']['kernel'], atol=1e-5)
  np.testing.assert_allclose(logvar, h @ p['logvar']['kernel'], atol=1e-5)

  p = _double(params)['decoder']
  h = _block(p['residual1_0'], np.asarray(z, np.float64)[:, None, None])
  h = _block(p['residual4_0'], _conv(p['project4_0'], h.repeat(4, axis=1).repeat(4, axis=2)))
  h = _conv(p['project8_0'], h.repeat(2, axis=1).repeat(2, axis=2))
  h = _conv(p['conv_out'], _block(p['residual8_1'], _block(p['residual8_0'], h)))
  expected = 2.0 / (1.0 + np.exp(-h)) - 1.0
  np.testing.assert_allclose(apply(model, params, z, method='decode'), expected, atol=1e-5)


def test_call_decodes_the_mean(rng):
  model = tiny()
  params, x = random_params(model, rng), random_images(rng)
  mean, _ = apply(model, params, x, method='encode')
  decoded = apply(model, params, mean, method='decode')
  np.testing.assert_allclose(apply(model, params, x), decoded, atol=1e-6)


@pytest.mark.slow
def test_bfloat16_is_close_and_returns_float32(rng):
  exact, rough = tiny(), tiny(dtype='bfloat16')
  params, x = random_params(exact, rng), random_images(rng)
  assert shapes(exact) == shapes(rough)
  for method in ('encode', None):
    for a, b in zip(
      jax.tree.leaves(apply(exact, params, x, method=method)),
      jax.tree.leaves(apply(rough, params, x, method=method)),
      strict=True,
    ):
      assert a.dtype == b.dtype == jnp.float32
      assert 0.0 < float(np.abs(a - b).max()) < 0.03 * max(1.0, float(np.abs(a).max()))


def test_dense_stem_adds_two_linear_maps_and_spatial_structure(rng):
  # A decoder without padding before its last convolution, so that only the stem can vary in space.
  strings = {'decoder_blocks': '1u4,1t4', 'decoder_channels': '4:8,1:10'}
  strings |= {'encoder_blocks': '4x1,4d4,4t1', 'encoder_channels': '4:8,1:10'}
  nearest, dense = tiny(**strings), tiny(**strings, stem='dense')
  to_four, to_one = 10 * (16 * 10) + 16 * 10, (16 * 8) * 8 + 8
  assert count(shapes(dense)) - count(shapes(nearest)) == to_four + to_one

  z = jnp.float32(rng.normal(size=(1, 10)))

  def spread(model):
    image = np.asarray(apply(model, random_params(model, rng), z, method='decode'))
    return np.ptp(image[0, 1:3, 1:3], axis=(0, 1)).min()

  assert spread(nearest) < 1e-6
  assert spread(dense) > 1e-3


def test_initial_weights_are_uniform_on_one_over_root_fan_in(key):
  block = Bottleneck(kernel_size=3, dtype=jnp.float32)
  params = jax.jit(block.init)(key, jnp.zeros((1, 2, 2, 64)))['params']
  for name, fan_in in (('conv_1', 64), ('conv_2', 9 * 32)):
    kernel = np.asarray(params[name]['kernel'])
    bound = fan_in**-0.5
    assert 0.95 * bound < np.abs(kernel).max() <= bound
    np.testing.assert_allclose(kernel.std(), bound / 3**0.5, rtol=0.05)
    assert not np.any(params[name]['bias'])


def test_block_strings_are_parsed():
  assert parse_blocks('32x7,32d2, 32t16,1u4,8', field='f') == (
    Step('x', 32, 7, '32x7'),
    Step('d', 32, 2, '32d2'),
    Step('t', 32, 16, '32t16'),
    Step('u', 1, 4, '1u4'),
    Step('x', 8, 1, '8'),
  )
  assert parse_channels('32:64, 1:512', field='f') == {32: 64, 1: 512}


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'encoder_blocks': '8x1,8q2'}, "model.encoder_blocks: '8q2' is not a step; allowed: RxN"),
    ({'decoder_blocks': '1x1,,1u4'}, "model.decoder_blocks: '' is not a step"),
    ({'decoder_blocks': '1u1'}, "model.decoder_blocks: '1u1' is not a step"),
    ({'encoder_channels': '8:6,4'}, "model.encoder_channels: '4' is not an entry"),
    ({'encoder_channels': '8:6,8:4'}, "model.encoder_channels: '8:4' gives .* second time"),
    ({'encoder_channels': '8:6,1:12'}, "no entry for resolution 4, which '8t4' of model.enc"),
    ({'encoder_channels': '4:8,1:12'}, "no entry for resolution 8, which '8x1' of model.enc"),
    ({'encoder_blocks': '8x1,8d2,8t4'}, 'model.encoder_blocks ends at resolution 4; .* at 1'),
    ({'decoder_blocks': '1x1,1u4,1t4'}, 'model.decoder_blocks ends at resolution 4; .* at 8'),
    ({'decoder_blocks': '4x1,4u2'}, "'4x1' is at resolution 4, but the map has resolution 1"),
    ({'decoder_blocks': '1u4,4x1'}, "'4x1' takes 8 channels, but the map has 10"),
    ({'encoder_blocks': '8x1,8d3'}, "'8d3' pools by 3, which does not divide 8"),
    ({'latent_dim': 11}, 'decoder_channels gives resolution 1 10 .* model.latent_dim is 11'),
    ({'decoder_channels': '8:4,4:8'}, 'gives resolution 1 no channels'),
    ({'stem': 'conv'}, "model.stem is 'conv'; choose one of nearest, dense"),
    ({'dtype': 'int8'}, "model.dtype is 'int8'"),
  ],
)
def test_mistakes_are_user_errors(changes, message):
  with pytest.raises(UserError, match=message):
    Vae(**{**TINY, **changes})


def test_images_of_another_size_are_a_user_error(rng):
  model = tiny()
  params = random_params(model, rng)
  with pytest.raises(UserError, match=r'shape \(16, 16, 3\), but the VAE .* reads \(8, 8, 3\)'):
    model.apply(params, jnp.zeros((1, 16, 16, 3)), method='encode')
