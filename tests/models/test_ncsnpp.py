import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.errors import UserError
from vaediff.machine import cost
from vaediff.models import layers, ncsnpp_blocks, resampling
from vaediff.models.functional import Model
from vaediff.models.ncsnpp import NcsnPlusPlus, fold_patches, unfold_patches

pytestmark = pytest.mark.slow  # networks of the denoising GANs: many programs to compile

TINY = {
  'channels': 8,
  'channel_multipliers': (1, 2),
  'num_res_blocks': 1,
  'attention_resolutions': (8,),
  'latent_dim': 5,
  'num_mapping_layers': 1,
  'dropout': 0.0,
  'patch_size': 1,
  'bounded': True,
  'remat': False,
  'dtype': 'float32',
  'out_channels': 3,
  'mapping_dim': 12,
}
SHALLOW = {'channel_multipliers': (1,), 'attention_resolutions': (), 'num_mapping_layers': 0}
OPTIONS = ncsnpp_blocks.BlockOptions(dropout=0.0, deterministic=True, remat=False, dtype=jnp.float32)

# channels, multipliers, residual blocks, attention, side, channels of the data, latent_dim, mapping layers
DDGAN_CIFAR = (128, (1, 2, 2, 2), 2, (16,), 32, 3, 100, 4)
DDGAN_256 = (64, (1, 1, 2, 2, 4, 4), 2, (16,), 256, 3, 100, 3)
WAVEDIFF_CIFAR = (128, (1, 2, 2), 2, (), 16, 12, 100, 4)
LDDGAN_CIFAR = (128, (1, 2, 2), 2, (), 16, 4, 50, 4)
LDDGAN_CIFAR_PAPER = (128, (1, 2, 2), 2, (), 16, 4, 100, 4)
LDDGAN_CELEBA = (128, (1, 2, 2, 2), 2, (16,), 64, 3, 100, 3)
LDDGAN_LSUN = (128, (1, 2, 2, 2), 3, (16,), 32, 4, 50, 3)
LDDGAN_LSUN_PAPER = (128, (1, 2, 2, 2), 2, (16,), 32, 4, 25, 4)


def build(size=8, image_channels=3, condition_channels=0, **changes) -> Model:
  module = NcsnPlusPlus(**{**TINY, **changes})
  struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  condition = struct(1, size, size, condition_channels) if condition_channels else None
  inputs = (struct(1, size, size, image_channels), struct(1), struct(1, module.latent_dim), condition)
  return Model(module=module, inputs=inputs)


def published(channels, multipliers, blocks, attention, size, data_channels, latent_dim, mapping) -> Model:
  return build(
    size,
    data_channels,
    channels=channels,
    channel_multipliers=multipliers,
    num_res_blocks=blocks,
    attention_resolutions=attention,
    latent_dim=latent_dim,
    num_mapping_layers=mapping,
    out_channels=data_channels,
    mapping_dim=256,
  )


def shapes(model: Model):
  return jax.eval_shape(model.init, jax.random.key(0))


def random_params(model: Model, rng):
  # Not the module's own initialisation, whose zeros would hide most of the network.
  draw = lambda leaf: jnp.float32(rng.normal(size=leaf.shape) / max(1, np.prod(leaf.shape[:-1])) ** 0.5)
  return jax.tree.map(draw, shapes(model))


def random_inputs(rng, batch=2, size=8, channels=3):
  normal = lambda *shape: jnp.float32(rng.normal(size=shape))
  return normal(batch, size, size, channels), jnp.arange(batch, dtype=jnp.float32), normal(batch, 5)


def apply(model: Model, params, *args, **kwargs):
  return jax.jit(model.apply)(params, *args, **kwargs)


@pytest.fixture
def rng():
  return np.random.default_rng(0)


@pytest.mark.parametrize(
  ('architecture', 'parameters', 'giga_macs'),
  [
    (DDGAN_CIFAR, 48_432_515, '7.034'),
    (DDGAN_256, 39_726_979, '70.41'),
    (WAVEDIFF_CIFAR, 33_370_124, '1.667'),
    (LDDGAN_CIFAR, 33_329_668, '1.661'),
    (LDDGAN_CIFAR_PAPER, 33_342_468, '1.661'),
    (LDDGAN_CELEBA, 48_366_723, '27.20'),
    (LDDGAN_LSUN, 61_858_180, '8.96'),
    (LDDGAN_LSUN_PAPER, 48_416_772, '7.04'),
  ],
)
def test_parameters_and_cost_are_the_published_networks(architecture, parameters, giga_macs):
  """Xiao et al. 2022 print 48.43 and 39.73 million parameters; of WaveDiff and LDDGAN, 33.37 million."""
  model = published(*architecture)
  params = shapes(model)
  assert cost.num_parameters(params) == parameters
  count = cost.macs(model.apply, params, *model.inputs)
  assert f'{count / 1e9:.{len(giga_macs.split(".")[1])}f}' == giga_macs


def test_parameters_are_plain_dicts_with_stable_names():
  params = shapes(build(remat=True, attention_resolutions=(4,)))
  assert type(params) is dict
  assert set(params) == {
      'time_embedding', 'mapping', 'conv_in', 'down_0_res_0', 'down_0_halve', 'down_0_pyramid',
      'down_1_res_0', 'down_1_attn_0', 'middle_res_0', 'middle_attn', 'middle_res_1', 'up_1_res_0',
      'up_1_res_1', 'up_1_attn', 'up_1_double', 'up_0_res_0', 'up_0_res_1', 'norm_out', 'conv_out',
  }  # fmt: skip
  assert set(params['up_1_double']) == {'norm_1', 'conv_1', 'emb', 'norm_2', 'conv_2', 'skip'}
  assert set(params['down_0_res_0']) == {'norm_1', 'conv_1', 'emb', 'norm_2', 'conv_2'}
  assert set(params['mapping']) == {'dense_0', 'dense_1'}
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}


def test_output_at_initialisation_is_almost_zero(rng):
  model = build(**SHALLOW, bounded=False)
  # XLA's own generator: of this many draws the default one compiles for a long time.
  params = jax.jit(model.init)(jax.random.key(0, impl='rbg'))
  y = apply(model, params, *random_inputs(rng))
  assert y.shape == (2, 8, 8, 3) and y.dtype == jnp.float32
  assert 0.0 < jnp.abs(y).max() < 1e-3
  bound = np.sqrt(3 / (9 * (8 + 8) / 2))
  kernel = params['middle_res_0']['conv_1']['kernel']
  assert 0.9 * bound < jnp.abs(kernel).max() <= bound


def test_only_bounded_outputs_are_bounded(rng):
  free, bounded = build(bounded=False), build()
  params, inputs = random_params(free, rng), random_inputs(rng)
  y = apply(free, params, *inputs)
  assert jnp.abs(y).max() > 1.0
  np.testing.assert_allclose(apply(bounded, params, *inputs), jnp.tanh(y), atol=1e-6)


def test_adaptive_norm_starts_as_the_plain_norm(key, rng):
  x = 3.0 + 2.0 * jnp.float32(rng.normal(size=(2, 3, 5, 64)))
  module = ncsnpp_blocks.AdaptiveGroupNorm()
  params = module.init(key, x, jnp.zeros((2, 7)))
  np.testing.assert_array_equal(params['params']['style']['bias'], np.repeat([1.0, 0.0], 64))
  plain = layers.GroupNorm(epsilon=1e-6).apply({'params': {'scale': jnp.ones(64), 'bias': jnp.zeros(64)}}, x)
  np.testing.assert_allclose(module.apply(params, x, jnp.zeros((2, 7))), plain, atol=1e-5)


@pytest.mark.parametrize(('channels', 'groups'), [(64, 16), (128, 32), (384, 32), (24, 6)])
def test_adaptive_norm_is_the_formula(rng, channels, groups):
  x, style = rng.normal(size=(2, 3, 5, channels)), rng.normal(size=(2, 7))
  kernel, bias = rng.normal(size=(7, 2 * channels)), rng.normal(size=2 * channels)
  params = {'params': {'style': {'kernel': jnp.float32(kernel), 'bias': jnp.float32(bias)}}}
  actual = ncsnpp_blocks.AdaptiveGroupNorm().apply(params, jnp.float32(x), jnp.float32(style))
  grouped = x.reshape(2, 15, groups, -1)
  mean, variance = grouped.mean(axis=(1, 3), keepdims=True), grouped.var(axis=(1, 3), keepdims=True)
  normal = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
  gamma, beta = np.split(style @ kernel + bias, 2, axis=-1)
  np.testing.assert_allclose(actual, gamma[:, None, None] * normal + beta[:, None, None], atol=2e-4)


def test_adaptive_norm_keeps_float32_statistics_in_bfloat16(rng):
  x = jnp.asarray(100.0 + rng.normal(size=(2, 16, 16, 8)), jnp.bfloat16)
  module, style = ncsnpp_blocks.AdaptiveGroupNorm(), jnp.zeros((2, 3))
  params = module.init(jax.random.key(0), x, style)
  y = module.apply(params, x, style)
  assert y.dtype == jnp.bfloat16
  exact = module.apply(params, x.astype(jnp.float32), style)
  np.testing.assert_allclose(np.asarray(y, np.float32), exact, atol=0.02)


def test_mapping_reads_the_direction_of_z_and_is_the_formula(rng):
  z = rng.normal(size=(2, 5))
  module = ncsnpp_blocks.LatentMapping(features=6, num_layers=2)
  variables = module.init(jax.random.key(0), jnp.float32(z))
  h = z / np.sqrt((z**2).mean(axis=1, keepdims=True))
  for i in range(3):
    h = h @ variables['params'][f'dense_{i}']['kernel']
    h = h / (1 + np.exp(-h))
  np.testing.assert_allclose(module.apply(variables, jnp.float32(z)), h, atol=1e-5)
  np.testing.assert_allclose(module.apply(variables, jnp.float32(7 * z)), h, atol=1e-5)


def convolve(x, params, strides=1, padding='SAME'):
  numbers = ('NHWC', 'HWIO', 'NHWC')
  y = jax.lax.conv_general_dilated(
    x, params['kernel'], (strides, strides), padding, dimension_numbers=numbers
  )
  return y + params['bias'][None, None, None]


def multiply(x, params):
  return jnp.einsum('...i,io->...o', x, params['kernel']) + params['bias'].reshape(
    (1,) * (x.ndim - 1) + (-1,)
  )


def adapt(x, style, params):
  return ncsnpp_blocks.AdaptiveGroupNorm().apply({'params': params}, x, style)


@pytest.mark.parametrize(('resample', 'features'), [('none', 8), ('none', 16), ('down', 8), ('up', 8)])
def test_residual_block_is_the_formula(rng, resample, features):
  normal = lambda *shape: jnp.float32(rng.normal(size=shape))
  x, emb, style = normal(2, 6, 4, 8), normal(2, 10), normal(2, 7)
  module = ncsnpp_blocks.ResidualBlock(features=features, resample=resample, options=OPTIONS)
  structs = jax.eval_shape(module.init, jax.random.key(0), x, emb, style)
  p = jax.tree.map(lambda leaf: normal(*leaf.shape), structs)['params']
  functions = {'down': resampling.fir_downsample, 'up': resampling.fir_upsample, 'none': lambda h: h}
  change = functions[resample]

  h = convolve(change(jax.nn.silu(adapt(x, style, p['norm_1']))), p['conv_1'])
  h = h + multiply(jax.nn.silu(emb), p['emb'])[:, None, None]
  h = convolve(jax.nn.silu(adapt(h, style, p['norm_2'])), p['conv_2'])
  skip = multiply(change(x), p['skip']) if 'skip' in p else x
  assert ('skip' in p) == (resample != 'none' or features != 8)
  expected = (h + skip) / np.sqrt(2)
  actual = jax.jit(module.apply)({'params': p}, x, emb, style)
  np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)


def test_attention_block_is_the_formula(rng):
  x = jnp.float32(rng.normal(size=(2, 3, 4, 8)))
  module = ncsnpp_blocks.AttentionBlock(options=OPTIONS)
  structs = jax.eval_shape(module.init, jax.random.key(0), x)
  p = jax.tree.map(lambda leaf: jnp.float32(rng.normal(size=leaf.shape)), structs)['params']
  h = layers.GroupNorm(epsilon=1e-6).apply({'params': p['norm']}, x).reshape(2, 12, 8)
  query, key, value = (np.asarray(multiply(h, p[name])) for name in ('query', 'key', 'value'))
  logits = query @ key.swapaxes(1, 2) / np.sqrt(8)
  weights = np.exp(logits - logits.max(axis=2, keepdims=True))
  h = (weights / weights.sum(axis=2, keepdims=True)) @ value
  expected = (x + multiply(jnp.float32(h.reshape(2, 3, 4, 8)), p['out'])) / np.sqrt(2)
  np.testing.assert_allclose(jax.jit(module.apply)({'params': p}, x), expected, rtol=1e-3, atol=1e-3)


def test_branches_start_at_almost_nothing(key, rng):
  x, emb, style = jnp.float32(rng.normal(size=(1, 4, 4, 8))), jnp.ones((1, 6)), jnp.ones((1, 7))
  key_residual, key_attention = jax.random.split(key)
  block = ncsnpp_blocks.ResidualBlock(features=8, resample='none', options=OPTIONS)
  y, _ = block.init_with_output(key_residual, x, emb, style)
  np.testing.assert_allclose(y, x / np.sqrt(2), atol=1e-3)
  y, _ = ncsnpp_blocks.AttentionBlock(options=OPTIONS).init_with_output(key_attention, x)
  np.testing.assert_allclose(y, x / np.sqrt(2), atol=1e-3)


def test_pyramid_is_a_convolution_of_the_blurred_image(key, rng):
  x = jnp.float32(rng.normal(size=(2, 6, 4, 3)))
  y, variables = ncsnpp_blocks.PyramidDown(features=5, dtype=jnp.float32).init_with_output(key, x)
  assert y.shape == (2, 3, 2, 5)
  expected = convolve(resampling.blur(x), variables['params']['conv'], strides=2, padding='VALID')
  np.testing.assert_allclose(y, expected, atol=1e-6)


def test_examples_do_not_see_each_other(rng):
  model = build()
  params = random_params(model, rng)
  inputs = random_inputs(rng, batch=3)
  run = jax.jit(model.apply)
  y = run(params, *inputs)
  other = run(params, *(value.at[1:].add(1.0) for value in inputs))
  np.testing.assert_allclose(y[0], other[0], atol=1e-6)
  assert jnp.abs(y[1:] - other[1:]).max() > 1e-3
  alone = run(params, *(value[:1] for value in inputs))
  np.testing.assert_allclose(y[0], alone[0], atol=1e-5)


def test_every_input_matters(rng):
  model = build(condition_channels=2)
  params = random_params(model, rng)
  x_t, t, z = random_inputs(rng)
  condition = jnp.float32(rng.normal(size=(2, 8, 8, 2)))
  run = jax.jit(model.apply)
  y = run(params, x_t, t, z, condition)
  for changed in (
    (x_t + 0.5, t, z, condition),
    (x_t, t + 1.0, z, condition),
    (x_t, t, -z, condition),
    (x_t, t, z, condition + 0.5),
  ):
    assert jnp.abs(y - run(params, *changed)).max() > 1e-3
  np.testing.assert_allclose(y, run(params, x_t, jnp.arange(2), z, condition), atol=1e-6)


def test_condition_is_more_channels_of_the_state(rng):
  joint, separate = build(image_channels=5), build(condition_channels=2)
  assert shapes(joint) == shapes(separate)
  params = random_params(joint, rng)
  x, t, z = random_inputs(rng, channels=5)
  expected = apply(joint, params, x, t, z)
  np.testing.assert_allclose(apply(separate, params, x[..., :3], t, z, x[..., 3:]), expected, atol=1e-6)


def test_remat_changes_neither_output_nor_gradient(rng):
  params, inputs = random_params(build(**SHALLOW), rng), random_inputs(rng)
  results = []
  for remat in (False, True):
    model = build(**SHALLOW, dropout=0.3, remat=remat)
    assert shapes(model) == jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)

    def loss(params, key, model=model):
      return jnp.mean(jnp.square(model.apply(params, *inputs, key_dropout=key)))

    results.append(jax.jit(jax.value_and_grad(loss))(params, jax.random.key(1)))
    primitives = str(jax.make_jaxpr(jax.grad(loss))(params, jax.random.key(1)))
    assert ('checkpoint' in primitives or 'remat' in primitives) == remat
  for a, b in zip(*(jax.tree.leaves(result) for result in results), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_bfloat16_is_close_and_returns_float32(rng):
  exact, rough = build(**SHALLOW, bounded=False), build(**SHALLOW, bounded=False, dtype='bfloat16')
  params, inputs = random_params(exact, rng), random_inputs(rng)
  assert shapes(exact) == shapes(rough)
  a, b = apply(exact, params, *inputs), apply(rough, params, *inputs)
  assert b.dtype == jnp.float32
  assert 0.0 < jnp.abs(a - b).max() < 0.05 * jnp.abs(a).max()


def test_dropout_needs_a_key_and_uses_it(rng):
  model = build(**SHALLOW, dropout=0.5)
  params, inputs = random_params(model, rng), random_inputs(rng)
  without = apply(model, params, *inputs)
  run = jax.jit(lambda key: model.apply(params, *inputs, key_dropout=key))
  first, second = run(jax.random.key(1)), run(jax.random.key(2))
  assert min(jnp.abs(first - without).max(), jnp.abs(first - second).max()) > 1e-3


def test_patches_are_folded_and_unfolded(rng):
  x = jnp.float32(rng.normal(size=(2, 4, 6, 3)))
  folded = fold_patches(x, 2)
  assert folded.shape == (2, 2, 3, 12)
  np.testing.assert_array_equal(folded[1, 1, 2].reshape(2, 2, 3), x[1, 2:4, 4:6])
  np.testing.assert_array_equal(unfold_patches(folded, 2), x)
  np.testing.assert_array_equal(unfold_patches(fold_patches(x, 1), 1), x)


def test_a_network_of_patches_is_the_network_of_folded_images(rng):
  patches, pixels = build(16, **SHALLOW, patch_size=2), build(8, 12, **SHALLOW, out_channels=12)
  assert shapes(patches) == shapes(pixels)
  params = random_params(patches, rng)
  x, t, z = random_inputs(rng, size=16)
  y = apply(patches, params, x, t, z)
  assert y.shape == x.shape
  np.testing.assert_allclose(fold_patches(y, 2), apply(pixels, params, fold_patches(x, 2), t, z), atol=1e-5)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'channels': 6, 'dtype': 'float16'}, "model.dtype is 'float16'; choose one of float32, bfloat16"),
    ({'channels': 7}, 'model.channels is 7; it must be even and at least 4'),
    ({'channels': 2}, 'model.channels is 2'),
    ({'channel_multipliers': ()}, r'model.channel_multipliers is \(\)'),
    ({'channel_multipliers': (1, 0)}, r'model.channel_multipliers is \(1, 0\).*at least 1'),
    ({'num_res_blocks': 0}, 'model.num_res_blocks is 0; it must be at least 1'),
    ({'latent_dim': 0}, 'model.latent_dim is 0; it must be at least 1'),
    ({'num_mapping_layers': -1}, 'model.num_mapping_layers is -1; it must be at least 0'),
    ({'mapping_dim': 0}, 'model.mapping_dim is 0'),
    ({'patch_size': 0}, 'model.patch_size is 0'),
    ({'out_channels': 0}, 'model.out_channels is 0'),
    ({'dropout': 1.0}, r'model.dropout is 1.0; it must be in \[0, 1\)'),
  ],
)
def test_mistakes_are_user_errors(changes, message):
  with pytest.raises(UserError, match=message):
    NcsnPlusPlus(**{**TINY, **changes})


def test_inputs_that_do_not_fit_are_errors(rng):
  with pytest.raises(UserError, match='x_t is 9 x 9, .*patch_size 1 and 2 levels .* multiples of 2'):
    shapes(build(9))
  with pytest.raises(UserError, match='x_t is 10 x 10, .*patch_size 2 and 2 levels .* multiples of 4'):
    shapes(build(10, patch_size=2))
  with pytest.raises(UserError, match='attention_resolutions names 16, .* sides 8, 4'):
    shapes(build(8, attention_resolutions=(4, 16)))
  x_t, t, z = random_inputs(rng)
  model = build(attention_resolutions=())
  with pytest.raises(ValueError, match=r'z has shape \(2, 4\), expected \(batch, 5\)'):
    jax.eval_shape(model.module.init, jax.random.key(0), x_t, t, z[:, :4])
