"""The discrete VAE: published counts, the two networks, codes and logits, mistakes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from some_slow import some_slow

from vaediff.errors import UserError
from vaediff.machine import cost
from vaediff.models.autoencoder import Autoencoder
from vaediff.models.functional import Model

DALLE = {
  'network': 'openai',
  'channels': 256,
  'channel_multipliers': (1, 2, 4, 8),
  'codebook_size': 8192,
  'latent_channels': 128,
  'pixel_map': 0.1,
}
TAMING_F8 = {
  'channel_multipliers': (1, 1, 2, 4),
  'attention_resolutions': (32,),
  'codebook_size': 8192,
  'latent_channels': 256,
}
TINY = {'channels': 8, 'channel_multipliers': (1, 2), 'codebook_size': 6, 'latent_channels': 4}
TINY |= {'num_res_blocks': 1}
NETWORKS = ('taming', 'openai')


def build(size=8, colours=3, **fields):
  module = Autoencoder(image_channels=colours, bottleneck='gumbel', **fields)
  return Model(module=module, inputs=(jax.ShapeDtypeStruct((1, size, size, colours), jnp.float32),))


def shapes(model):
  return jax.eval_shape(model.init, jax.random.key(0))


def test_parameters_of_the_published_discrete_vae():
  params = shapes(build(256, **DALLE))
  parts = {name: cost.num_parameters(value) for name, value in params.items()}
  assert parts['encoder'] + parts['logits_head'] == 53_786_240
  assert parts['decoder'] + parts['codes'] == 43_829_766
  assert parts.keys() == {'encoder', 'decoder', 'codes', 'logits_head'}


def test_parameters_of_the_published_relaxed_vqgan():
  params = shapes(build(256, **TAMING_F8))
  parts = {name: cost.num_parameters(value) for name, value in params.items()}
  assert parts['logits_head'] == 2_105_344 and parts['codes'] == 2_097_152
  assert parts['encoder'] == 26_345_728 + 65_792 and parts['decoder'] == 38_316_163 + 65_792
  assert sum(parts.values()) == 68_995_971


def test_logits_and_codes_have_the_grid_of_the_image():
  model = build(256, **DALLE)
  params, image = shapes(model), jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32)
  logits = jax.eval_shape(lambda p, x: model.apply(p, x, method='logits'), params, image)
  assert logits.shape == (2, 32, 32, 8192) and logits.dtype == jnp.float32
  z, logvar = jax.eval_shape(lambda p, x: model.apply(p, x, method='encode'), params, image)
  assert z.shape == (2, 32, 32, 128) and logvar is None
  features = jax.eval_shape(lambda p, z: model.apply(p, z, method='decode_features'), params, z)
  outputs = jax.eval_shape(lambda p, h: model.apply(p, h, method='last_conv'), params, features)
  assert outputs.shape == (2, 256, 256, 6)
  assert jax.eval_shape(lambda p, z: model.apply(p, z, method='decode'), params, z).shape == image.shape


@pytest.mark.parametrize(
  ('network', 'levels', 'colours'),
  some_slow(list(itertools.product(NETWORKS, [1, 3], [1, 3])), ('taming', 3, 1), ('openai', 1, 3)),
)
def test_any_width_and_number_of_levels(network, levels, colours):
  fields = {**TINY, 'network': network, 'channel_multipliers': (1, 2, 3)[:levels], 'dtype': 'bfloat16'}
  model = build(8, colours, **fields)
  x = jax.ShapeDtypeStruct((2, 8, 8, colours), jnp.float32)
  logits = jax.eval_shape(lambda p, x: model.apply(p, x, method='logits'), shapes(model), x)
  assert logits.shape == (2, 8 // 2 ** (levels - 1), 8 // 2 ** (levels - 1), 6)
  assert logits.dtype == jnp.float32
  assert jax.eval_shape(lambda p, x: model.apply(p, x), shapes(model), x).shape == x.shape


@pytest.fixture(scope='module', params=NETWORKS)
def tiny(request):
  model = build(network=request.param, pixel_map=0.1, **TINY)
  return model, jax.jit(model.init)(jax.random.key(0))


@pytest.mark.slow
def test_latents_are_the_codes_of_the_largest_logits(tiny):
  model, params = tiny
  x = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3), minval=-1.0)
  logits = model.apply(params, x, method='logits')
  z, _ = model.apply(params, x, method='encode')
  np.testing.assert_array_equal(z, params['codes'][jnp.argmax(logits, -1)])
  image = model.apply(params, z, method='decode')
  features = model.apply(params, z, method='decode_features')
  mu = model.apply(params, features, method='last_conv')[..., :3]
  np.testing.assert_allclose(image, (jax.nn.sigmoid(mu) - 0.1) / 0.4 - 1, atol=1e-6)
  np.testing.assert_array_equal(image, model.apply(params, x))


@pytest.mark.slow
@pytest.mark.parametrize('network', NETWORKS)
def test_the_first_logits_are_as_small_as_their_scale(network):
  small, full = (build(network=network, **TINY, logits_scale=scale) for scale in (0.1, 1.0))
  small, full = (jax.jit(model.init)(jax.random.key(0)) for model in (small, full))
  np.testing.assert_allclose(small['logits_head']['kernel'], 0.1 * full['logits_head']['kernel'], rtol=1e-6)
  assert np.any(full['logits_head']['kernel'])
  np.testing.assert_array_equal(small['codes'], full['codes'])


def test_published_kernels_start_with_the_variance_of_their_inputs():
  params = jax.jit(build(network='openai', **{**TINY, 'channels': 64, 'codebook_size': 512}).init)(
    jax.random.key(0)
  )
  kernels = {
    1 / (49 * 3): params['encoder']['conv_in']['kernel'],
    1 / (9 * 16): params['decoder']['body']['up_0_0']['conv_2']['kernel'],
    1 / 512: params['codes'],
  }
  for variance, kernel in kernels.items():
    np.testing.assert_allclose(np.var(kernel), variance, rtol=0.15)
  assert not np.any(params['decoder']['body']['codes_bias'])


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'codebook_size': 1}, "model.codebook_size is 1; it must be at least 2 for model.bottleneck 'gumbel'"),
    ({'codebook_size': 0}, 'model.codebook_size is 0; it must be at least 2'),
    ({'network': 'dalle'}, "model.network is 'dalle'; choose one of taming, openai"),
    (
      {'network': 'openai', 'attention_resolutions': (4,)},
      r'attention_resolutions is \(4,\), but',
    ),
    ({'network': 'openai', 'dropout': 0.1}, "model.dropout is 0.1, but model.network = 'openai' has 0.0"),
    ({'network': 'openai', 'tanh_out': True}, "model.tanh_out is True, but model.network = 'openai'"),
    ({'network': 'openai', 'bottleneck': 'vq'}, "model.bottleneck is 'vq', but .* has 'gumbel' alone"),
    ({'pixel_map': 0.5}, r'model.pixel_map is 0.5; it must be in \[0, 0.5\)'),
    ({'pixel_map': -0.1}, 'model.pixel_map is -0.1'),
    ({'pixel_map': 0.1, 'tanh_out': True}, 'model.tanh_out is True, but with model.pixel_map = 0.1'),
  ],
)
def test_mistakes_are_user_errors(changes, message):
  with pytest.raises(UserError, match=message):
    Autoencoder(**{'image_channels': 3, 'bottleneck': 'gumbel', **TINY, **changes})
