import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from some_slow import some_slow

from vaediff.errors import UserError
from vaediff.machine import cost
from vaediff.models.autoencoder import LAST_KERNEL, Autoencoder, LightDecoder
from vaediff.models.functional import Model

TINY = {
  'image_channels': 2,
  'latent_channels': 3,
  'channels': 8,
  'channel_multipliers': (1, 2),
  'num_res_blocks': 1,
}
CIFAR = {
  'latent_channels': 4,
  'channel_multipliers': (1, 2),
  'attention_resolutions': (16,),
  'dropout': 0.2,
  'tanh_out': True,
}
CELEBA = {
  'latent_channels': 3,
  'channel_multipliers': (1, 2, 4),
  'bottleneck': 'vq',
  'codebook_size': 8192,
}
LSUN = {'latent_channels': 4, 'channel_multipliers': (1, 2, 4, 4)}
# The configuration of this one is inferred: the only one tried, and its figures fit.
VQ_F8 = {
  'latent_channels': 4,
  'channel_multipliers': (1, 2, 2, 4),
  'attention_resolutions': (32,),
  'bottleneck': 'vq',
  'codebook_size': 16384,
}


def build(size: int = 8, **changes) -> Model:
  module = Autoencoder(**{**TINY, **changes})
  image = jax.ShapeDtypeStruct((1, size, size, module.image_channels), jnp.float32)
  return Model(module=module, inputs=(image,))


def shapes(model: Model):
  return jax.eval_shape(model.init, jax.random.key(0))


def random_params(model: Model, rng, scale: float = 0.2):
  return jax.tree.map(lambda leaf: jnp.float32(scale * rng.normal(size=leaf.shape)), shapes(model))


def random_images(rng, size: int = 8, channels: int = 2):
  return jnp.float32(rng.uniform(-1, 1, size=(2, size, size, channels)))


def apply(model: Model, params, *args, **kwargs):
  return jax.jit(model.apply, static_argnames='method')(params, *args, **kwargs)


@pytest.fixture
def rng():
  return np.random.default_rng(0)


# Given to three or four digits. `quant_conv` (in the encoder) and `post_quant_conv` (in the decoder) are
# counted here; they have 12 to 72 parameters, too few to show in the published figures.
@pytest.mark.parametrize(
  ('architecture', 'size', 'decoder', 'encoder', 'decoder_gmacs'),
  [
    (CIFAR, 32, 8_631_575, 6_015_184, 3.613),  # 8.632 and 6.015 M
    (CELEBA, 256, 32_960_783, 22_337_423, 335.291),  # 32.96 and 22.337 M
    (LSUN, 256, 49_490_199, 34_163_664, 311.094),  # 49.49 and 34.164 M
    (VQ_F8, 256, 40_253_975, 27_397_784, 236.200),  # 40.25 M
  ],
  ids=['cifar10', 'celeba256', 'lsun256', 'vq_f8'],
)
@pytest.mark.slow
def test_parameters_and_macs_are_the_published_networks(architecture, size, decoder, encoder, decoder_gmacs):
  defaults = {'num_res_blocks': 2, 'channels': 128, 'image_channels': 3}
  model = build(size, **{**defaults, **architecture})
  params = shapes(model)
  assert cost.num_parameters(params['decoder']) == decoder
  assert cost.num_parameters(params['encoder']) == encoder
  if model.module.bottleneck == 'vq' and size == 256 and decoder < 33e6:
    assert cost.num_parameters(params['codes']) == 8192 * 3
  side = size // model.module.factor
  z = jax.ShapeDtypeStruct((1, side, side, model.module.latent_channels), jnp.float32)
  macs = cost.macs(lambda params, z: model.apply(params, z, method='decode'), params, z)
  assert round(macs / 1e9, 3) == decoder_gmacs


def test_parameters_are_plain_dicts_with_stable_names():
  params = shapes(build(remat=True, attention_resolutions=(4,)))
  assert type(params) is dict and set(params) == {'encoder', 'decoder'}
  assert set(params['encoder']) == {
    'conv_in', 'down_0', 'down_1', 'middle', 'norm_out', 'conv_out', 'quant_conv',
  }  # fmt: skip
  assert set(params['decoder']) == {'body', 'conv_out'}
  assert set(params['decoder']['body']) == {
    'post_quant_conv', 'conv_in', 'middle', 'up_1', 'up_0', 'norm_out',
  }  # fmt: skip
  assert set(params['encoder']['down_0']) == {'res_0', 'down'}
  assert set(params['encoder']['down_1']) == {'res_0', 'attn_0'}
  assert set(params['decoder']['body']['up_1']) == {'res_0', 'attn_0', 'res_1', 'attn_1', 'up'}
  assert set(params['decoder']['body']['up_0']) == {'res_0', 'res_1'}
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}


@pytest.mark.parametrize(
  ('bottleneck', 'levels'),
  some_slow(list(itertools.product(['kl', 'none', 'vq'], [2, 3, 4])), ('kl', 2), ('none', 4), ('vq', 3)),
)
def test_shapes_and_types(levels, bottleneck):
  model = build(
    16,
    channel_multipliers=(1,) * levels,
    bottleneck=bottleneck,
    codebook_size=5 * (bottleneck == 'vq'),
  )
  factor = 2 ** (levels - 1)
  assert model.module.factor == factor
  params = shapes(model)
  images = jax.ShapeDtypeStruct((3, 16, 32, 2), jnp.float32)
  mean, logvar = jax.eval_shape(lambda p, x: model.apply(p, x, method='encode'), params, images)
  assert mean.shape == (3, 16 // factor, 32 // factor, 3) and mean.dtype == jnp.float32
  assert (logvar is not None) == (bottleneck == 'kl')
  assert logvar is None or (logvar.shape, logvar.dtype) == (mean.shape, mean.dtype)
  decoded = jax.eval_shape(lambda p, z: model.apply(p, z, method='decode'), params, mean)
  assert (decoded.shape, decoded.dtype) == (images.shape, jnp.float32)


@pytest.mark.slow
def test_latents_are_bounded_as_the_bottleneck_says(rng):
  images = random_images(rng)
  none = build(bottleneck='none')
  params = random_params(none, rng)
  mean, logvar = apply(none, params, images, method='encode')
  assert logvar is None and 0.1 < float(np.abs(mean).max()) < 1.0
  # The continuous latent of 'vq' is what goes into the tanh of 'none'.
  vq = build(bottleneck='vq', codebook_size=4)
  latent, _ = apply(vq, {**params, 'codes': np.zeros((4, 3), np.float32)}, images, method='encode')
  np.testing.assert_allclose(np.tanh(latent), mean, atol=1e-5)

  kl = build(bottleneck='kl')
  params = random_params(kl, rng)
  for bias, expected in ((1e6, 20.0), (-1e6, -30.0)):
    params['encoder']['quant_conv']['bias'] = jnp.full((6,), bias)
    mean, logvar = apply(kl, params, images, method='encode')
    np.testing.assert_array_equal(logvar, expected)
    assert np.all(np.abs(mean) > 1e5)


@pytest.mark.parametrize('tanh_out', some_slow([False, True], True))
def test_decode_is_the_last_convolution_of_its_features(rng, tanh_out):
  model = build(tanh_out=tanh_out)
  params = random_params(model, rng)
  params['decoder']['conv_out']['bias'] = jnp.float32([2.0, -2.0])
  z = jnp.float32(rng.normal(size=(2, 4, 4, 3)))
  image = apply(model, params, z, method='decode')
  features = apply(model, params, z, method='decode_features')
  assert features.shape == (2, 8, 8, 8) and features.dtype == jnp.float32
  np.testing.assert_allclose(apply(model, params, features, method='last_conv'), image, atol=1e-6)
  assert (np.abs(image).max() < 1.0) == tanh_out


def test_gradient_of_the_last_kernel_alone_is_that_of_the_whole_decoder(rng):
  model = build()
  params = random_params(model, rng)
  z = jnp.float32(rng.normal(size=(2, 4, 4, 3)))
  features = apply(model, params, z, method='decode_features')

  def loss_of_last(kernel):
    conv = {**params['decoder']['conv_out'], 'kernel': kernel}
    return jnp.sin(model.apply({'decoder': {'conv_out': conv}}, features, method='last_conv')).sum()

  def loss_of_whole(kernel):
    conv = {**params['decoder']['conv_out'], 'kernel': kernel}
    decoder = {**params['decoder'], 'conv_out': conv}
    return jnp.sin(model.apply({'decoder': decoder}, z, method='decode')).sum()

  kernel = params
  for name in LAST_KERNEL:
    kernel = kernel[name]
  assert kernel.shape == (3, 3, 8, 2)
  expected = jax.jit(jax.grad(loss_of_whole))(kernel)
  np.testing.assert_allclose(jax.jit(jax.grad(loss_of_last))(kernel), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_call_decodes_the_mean(rng):
  model = build(bottleneck='vq', codebook_size=4)
  params, images = random_params(model, rng), random_images(rng)
  both = lambda params, x: model.apply(params, model.apply(params, x, method='encode')[0], method='decode')
  np.testing.assert_allclose(apply(model, params, images), jax.jit(both)(params, images), atol=1e-5)
  assert params['codes'].shape == (4, 3)


@pytest.mark.slow
def test_remat_and_bfloat16_are_the_same_network(rng):
  exact, remat, rough = build(), build(remat=True), build(dtype='bfloat16')
  params, z = random_params(exact, rng), jnp.float32(rng.normal(size=(2, 4, 4, 3)))
  assert shapes(exact) == shapes(remat) == shapes(rough)
  image = apply(exact, params, z, method='decode')
  np.testing.assert_allclose(apply(remat, params, z, method='decode'), image, atol=1e-5)
  near = apply(rough, params, z, method='decode')
  assert near.dtype == jnp.float32
  assert 0.0 < np.abs(near - image).max() < 0.1 * np.abs(image).max()
  primitives = str(jax.make_jaxpr(jax.grad(lambda p: remat.apply(p, z, method='decode').sum()))(params))
  assert 'checkpoint' in primitives or 'remat' in primitives


@pytest.mark.slow
def test_dropout_needs_a_key_and_uses_it(rng):
  model = build(dropout=0.5)
  params, z = random_params(model, rng), jnp.float32(rng.normal(size=(2, 4, 4, 3)))
  without = apply(model, params, z, method='decode')
  run = jax.jit(lambda key: model.apply(params, z, method='decode', key_dropout=key, deterministic=False))
  first, second = run(jax.random.key(1)), run(jax.random.key(2))
  assert np.abs(first - without).max() > 1e-3 and np.abs(first - second).max() > 1e-3


def test_stride_two_convolution_reads_no_zeros_before_the_map(rng):
  """Zeros after rows and columns only: output (i, j) sees inputs 2i ... 2i + 2."""
  from vaediff.models.autoencoder_blocks import VARIANT, Level
  from vaediff.models.unet_blocks import BlockOptions

  options = BlockOptions(
    variant=VARIANT,
    num_heads=1,
    dropout=0.0,
    deterministic=True,
    scale_shift_norm=False,
    remat=False,
    dtype=jnp.float32,
  )
  level = Level(features=1, num_blocks=0, attend=False, resample='down', options=options)
  kernel, bias = rng.normal(size=(3, 3, 1, 1)), np.zeros(1)
  x = rng.normal(size=(1, 4, 4, 1))
  params = {'params': {'down': {'kernel': jnp.float32(kernel), 'bias': jnp.float32(bias)}}}
  padded = np.pad(x[0, :, :, 0], ((0, 1), (0, 1)))
  expected = [[(padded[i : i + 3, j : j + 3] * kernel[:, :, 0, 0]).sum() for j in (0, 2)] for i in (0, 2)]
  np.testing.assert_allclose(level.apply(params, jnp.float32(x))[0, :, :, 0], expected, atol=1e-5)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'bottleneck': 'vae'}, "model.bottleneck is 'vae'; choose one of kl, none, vq"),
    ({'image_channels': 0}, 'model.image_channels is 0; it must be at least 1'),
    ({'latent_channels': 0}, 'model.latent_channels is 0; it must be at least 1'),
    ({'channels': 0}, 'model.channels is 0; it must be at least 1'),
    ({'num_res_blocks': 0}, 'model.num_res_blocks is 0; it must be at least 1'),
    ({'channel_multipliers': ()}, r'model.channel_multipliers is \(\); give one multiplier per level'),
    ({'channel_multipliers': (1, 0)}, r'model.channel_multipliers is \(1, 0\); .* each at least 1'),
    ({'dropout': 1.0}, r'model.dropout is 1.0; it must be in \[0, 1\)'),
    ({'bottleneck': 'vq'}, "model.codebook_size is 0; it must be at least 1 for model.bottleneck 'vq'"),
    ({'codebook_size': 4}, "model.codebook_size is 4; it must be 0 without 'vq'"),
    ({'dtype': 'float16'}, "model.dtype is 'float16'"),
  ],
)
def test_mistakes_are_user_errors(changes, message):
  with pytest.raises(UserError, match=message):
    Autoencoder(**{**TINY, **changes})


@pytest.mark.parametrize(
  ('changes', 'shape', 'message'),
  [
    ({}, (1, 8, 8, 3), 'images have 3 channels, but model.image_channels is 2'),
    ({}, (1, 9, 8, 2), r'images are 9 x 8, but 2 levels .* multiples of 2'),
    ({'attention_resolutions': (16,)}, (1, 8, 8, 2), 'attention_resolutions names 16, .* sides 8, 4'),
  ],
)
def test_images_that_do_not_fit_are_user_errors(changes, shape, message):
  model = Autoencoder(**{**TINY, **changes})
  with pytest.raises(UserError, match=message):
    jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))


@pytest.mark.parametrize(('num_upsamplings', 'parameters'), [(2, 1_074_883), (3, 1_554_883)])
def test_light_decoder_is_small(num_upsamplings, parameters):
  side = 256 >> num_upsamplings
  z = jax.ShapeDtypeStruct((1, side, side, 4), jnp.float32)
  module = LightDecoder(latent_channels=4, image_channels=3, num_upsamplings=num_upsamplings)
  model = Model(module=module, inputs=(z,))
  params = shapes(model)
  assert cost.num_parameters(params) == parameters
  # At least 15 times cheaper than the decoders that it stands in for, 335 and 311 GMAC.
  assert cost.macs(model.apply, params, z) < 311e9 / 15
  image = jax.eval_shape(model.apply, params, z)
  assert image.shape == (1, 256, 256, 3) and image.dtype == jnp.float32


def test_light_decoder_in_bfloat16_is_close_and_returns_float32(rng):
  fields = {'latent_channels': 3, 'image_channels': 2, 'num_upsamplings': 1, 'channels': 4, 'num_blocks': 1}
  z = jnp.float32(rng.normal(size=(2, 4, 4, 3)))
  inputs = (jax.ShapeDtypeStruct(z.shape, z.dtype),)
  exact = Model(module=LightDecoder(**fields), inputs=inputs)
  rough = Model(module=LightDecoder(**fields, dtype='bfloat16'), inputs=inputs)
  params = random_params(exact, rng)
  image, near = apply(exact, params, z), apply(rough, params, z)
  assert image.shape == (2, 8, 8, 2) and near.dtype == jnp.float32
  assert 0.0 < np.abs(near - image).max() < 0.05 * np.abs(image).max()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'num_blocks': 0}, 'model.num_blocks is 0; it must be at least 1'),
    ({'num_upsamplings': -1}, 'model.num_upsamplings is -1; it must be at least 0'),
    ({'channels': 0}, 'model.channels is 0; it must be at least 1'),
    ({'dtype': 'int8'}, "model.dtype is 'int8'"),
  ],
)
def test_light_decoder_mistakes_are_user_errors(changes, message):
  with pytest.raises(UserError, match=message):
    LightDecoder(**{'latent_channels': 3, 'image_channels': 2, 'num_upsamplings': 1, **changes})


def test_latents_that_do_not_fit_are_user_errors(rng):
  z = jnp.zeros((1, 4, 4, 5))
  light = LightDecoder(latent_channels=3, image_channels=2, num_upsamplings=1)
  with pytest.raises(UserError, match='latents have 5 channels, but model.latent_channels is 3'):
    light.init(jax.random.key(0), z)
  model = build()
  with pytest.raises(UserError, match='latents have 5 channels, but model.latent_channels is 3'):
    model.apply(random_params(model, rng), z, method='decode')
