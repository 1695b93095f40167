import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.errors import UserError
from vaediff.models.functional import Model
from vaediff.models.unet import UNet, convert_formulation, feature_shapes

TINY = {
  'variant': 'openai',
  'image_size': 8,
  'image_channels': 2,
  'channels': 64,
  'channel_multipliers': (1, 1),
  'num_res_blocks': 1,
  'attention_resolutions': (),
  'num_heads': 2,
  'dropout': 0.5,
  'condition_on_image': True,
  'latent_dim': 3,
  'scale_shift_norm': False,
  'learned_null': True,
  'remat': False,
  'dtype': 'float32',
}
ONE_LEVEL = {'channel_multipliers': (1,), 'attention_resolutions': (8,)}
CIFAR = {'image_size': 32, 'channels': 128, 'channel_multipliers': (1, 2, 2, 2)}
CIFAR_LARGE = {**CIFAR, 'channels': 160, 'num_res_blocks': 3}
CELEBA64 = {'image_size': 64, 'channels': 128, 'channel_multipliers': (1, 2, 2, 2, 4)}
CELEBAMASKHQ128 = {'image_size': 128, 'channels': 128, 'channel_multipliers': (1, 2, 2, 3, 4)}
FFHQ128 = {'image_size': 128, 'channels': 128, 'channel_multipliers': (1, 1, 2, 3, 4)}
CELEBAHQ256 = {'image_size': 256, 'channels': 128, 'channel_multipliers': (1, 1, 2, 2, 4, 4)}


def build(**changes) -> Model:
  module = UNet(**{**TINY, **changes})
  size, channels = module.image_size, module.image_channels
  image = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
  time = jax.ShapeDtypeStruct((1,), jnp.float32)
  z = jax.ShapeDtypeStruct((1, module.latent_dim), jnp.float32)
  x0_vae = image if module.condition_on_image else None
  return Model(module=module, inputs=(image, time, x0_vae, z if module.latent_dim else None))


def shapes(model: Model):
  return jax.eval_shape(model.init, jax.random.key(0))


def count(model: Model) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(model)))


def published(architecture: dict, attention_resolutions: tuple[int, ...], **changes) -> Model:
  defaults = {'image_channels': 3, 'num_res_blocks': 2, 'latent_dim': 0, 'learned_null': False}
  return build(**{**defaults, **architecture, 'attention_resolutions': attention_resolutions, **changes})


def random_params(model: Model, rng):
  # Not the module's own initialisation, whose zeros would hide most of the network.
  return jax.tree.map(lambda leaf: jnp.float32(0.1 * rng.normal(size=leaf.shape)), shapes(model))


def random_inputs(rng):
  image = lambda: jnp.float32(rng.normal(size=(2, 8, 8, 2)))
  return image(), jnp.float32([0.2, 1.0]), image(), jnp.float32(rng.normal(size=(2, 3)))


def apply(model: Model, params, *args, **kwargs):
  return jax.jit(model.apply)(params, *args, **kwargs)


@pytest.fixture
def rng():
  return np.random.default_rng(0)


# Millions of parameters, to 10k. Attention at the resolutions of the released code, which compared
# its setting of 16 with the downsampling rate, and at resolution 16; then the former with z.
@pytest.mark.parametrize(
  ('architecture', 'as_coded', 'as_coded_millions', 'at_16_millions', 'z_dim', 'with_z_millions'),
  [
    (CIFAR, (), 34.43, 35.75, 512, 37.52),
    (CIFAR_LARGE, (), 70.88, 73.76, 512, 77.05),
    (CELEBA64, (4,), 82.64, 78.70, 512, 87.31),
    (CELEBAMASKHQ128, (8,), 95.17, 92.87, 1024, 100.42),
    (FFHQ128, (8,), 87.90, 85.61, 1024, 92.83),
    (CELEBAHQ256, (16,), 113.68, 113.68, 1024, 119.59),
  ],
)
def test_parameters_are_the_published_networks(
  architecture, as_coded, as_coded_millions, at_16_millions, z_dim, with_z_millions
):
  millions = lambda model: round(count(model) / 1e6, 2)
  assert millions(published(architecture, as_coded)) == as_coded_millions
  assert millions(published(architecture, (16,))) == at_16_millions
  with_z = published(architecture, as_coded, latent_dim=z_dim, scale_shift_norm=True)
  assert millions(with_z) == with_z_millions


@pytest.mark.parametrize('variant', ['openai', 'ddim'])
def test_cifar10_parameters_to_the_last_one(variant):
  assert count(published(CIFAR, (16,), variant=variant)) == 35_749_763
  # Ho et al. 2020 (2006.11239), appendix B: 35.7 million, without a condition.
  alone = published(CIFAR, (16,), variant=variant, condition_on_image=False)
  assert count(alone) == 35_749_763 - 3 * 9 * 128


def test_heads_do_not_change_the_parameters():
  assert shapes(build(num_heads=1)) == shapes(build(num_heads=4))


def test_parameters_are_plain_dicts_with_stable_names():
  params = shapes(build(attention_resolutions=(4,), remat=True))
  assert type(params) is dict
  assert set(params) == {
      'time_mlp', 'z_mlp', 'conv_in', 'down_0', 'down_1', 'middle', 'up_1', 'up_0', 'norm_out',
      'conv_out', 'null_x0_vae', 'null_z',
  }  # fmt: skip
  assert set(params['down_0']) == {'res_0', 'down'}
  assert set(params['down_1']) == {'res_0', 'attn_0'}
  assert set(params['middle']) == {'res_0', 'attn', 'res_1'}
  assert set(params['up_1']) == {'res_0', 'attn_0', 'res_1', 'attn_1', 'up'}
  assert set(params['up_0']['res_0']) == {'norm_1', 'conv_1', 'emb', 'norm_2', 'conv_2', 'skip'}
  assert params['null_x0_vae'].shape == (8, 8, 2) and params['null_z'].shape == (3,)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}
  assert not {'null_x0_vae', 'null_z'} & set(shapes(build(learned_null=False)))


@pytest.mark.parametrize('variant', ['openai', 'ddim'])
def test_output_at_initialisation(key, rng, variant):
  key_init, key_dropout = jax.random.split(key)
  model = build(**ONE_LEVEL, variant=variant)
  params = jax.jit(model.init)(key_init)
  assert not np.any(params['null_x0_vae']) and not np.any(params['null_z'])
  x_t, t, x0_vae, z = random_inputs(rng)
  y = apply(model, params, x_t, t, x0_vae, z, key_dropout=key_dropout)
  assert y.shape == x_t.shape and y.dtype == jnp.float32
  if variant == 'openai':
    assert not np.any(y)
  else:
    assert np.all(np.isfinite(y)) and 0.01 < np.std(y) < 10.0


def test_remat_changes_neither_output_nor_gradient(rng):
  inputs = random_inputs(rng)
  key_dropout = jax.random.key(1)
  params = random_params(build(**ONE_LEVEL), rng)
  results = []
  for remat in (False, True):
    model = build(**ONE_LEVEL, remat=remat)
    assert shapes(model) == jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)

    def loss(params, key, model=model):
      return jnp.mean(jnp.square(model.apply(params, *inputs, key_dropout=key)))

    gradient = jax.jit(jax.value_and_grad(loss))
    # A clone: both networks must draw the same dropout.
    results.append(gradient(params, jax.random.clone(key_dropout)))
    primitives = str(jax.make_jaxpr(jax.grad(loss))(params, jax.random.clone(key_dropout)))
    assert ('checkpoint' in primitives or 'remat' in primitives) == remat
  for a, b in zip(*(jax.tree.leaves(result) for result in results), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_bfloat16_is_close_and_returns_float32(rng):
  exact, rough = build(**ONE_LEVEL), build(**ONE_LEVEL, dtype='bfloat16')
  params, inputs = random_params(exact, rng), random_inputs(rng)
  assert shapes(exact) == shapes(rough)
  a, b = apply(exact, params, *inputs), apply(rough, params, *inputs)
  assert b.dtype == jnp.float32
  assert 0.0 < np.abs(a - b).max() < 0.05 * np.abs(a).max()


def test_dropout_needs_a_key_and_uses_it(rng):
  model = build(**ONE_LEVEL)
  params, inputs = random_params(model, rng), random_inputs(rng)
  without = apply(model, params, *inputs)
  np.testing.assert_array_equal(without, apply(build(**ONE_LEVEL, dropout=0.0), params, *inputs))
  run = jax.jit(lambda key: model.apply(params, *inputs, key_dropout=key))
  first, second = run(jax.random.key(1)), run(jax.random.key(2))
  assert np.abs(first - without).max() > 1e-3
  assert np.abs(first - second).max() > 1e-3


def test_dropped_conditions_are_replaced_example_by_example(rng):
  model = build()
  params = random_params(model, rng)
  x_t, t, x0_vae, z = random_inputs(rng)
  drop = jnp.array([True, False])
  run = jax.jit(model.apply)
  kept, mixed = run(params, x_t, t, x0_vae, z), run(params, x_t, t, x0_vae, z, drop)
  other = run(params, x_t, t, x0_vae + 1.0, z - 1.0, drop)
  np.testing.assert_array_equal(mixed[0], other[0])
  assert np.abs(mixed[1] - other[1]).max() > 1e-3
  np.testing.assert_allclose(mixed[1], kept[1], atol=1e-6)
  null_image = jnp.broadcast_to(params['null_x0_vae'][None], x0_vae.shape)
  null_z = jnp.broadcast_to(params['null_z'][None], z.shape)
  np.testing.assert_allclose(mixed[0], run(params, x_t, t, null_image, null_z)[0], atol=1e-6)


def test_output_depends_on_time_and_z(rng):
  model = build(variant='ddim')
  params = random_params(model, rng)
  x_t, t, x0_vae, z = random_inputs(rng)
  run = jax.jit(model.apply)
  y = run(params, x_t, t, x0_vae, z)
  assert np.abs(y - run(params, x_t, t - 0.1, x0_vae, z)).max() > 1e-3
  assert np.abs(y - run(params, x_t, t, x0_vae, z + 1.0)).max() > 1e-3


@pytest.mark.parametrize(
  ('changes', 'given', 'message'),
  [
    ({}, {'x0_vae'}, 'latent_dim=3 needs `z`'),
    ({}, {'z'}, 'condition_on_image=True needs `x0_vae`'),
    ({'latent_dim': 0}, {'x0_vae', 'z'}, 'latent_dim=0 takes no `z`'),
    ({'condition_on_image': False}, {'x0_vae', 'z'}, 'takes no `x0_vae`'),
    ({'learned_null': False}, {'x0_vae', 'z', 'drop'}, 'learned_null=True'),
    ({'image_size': 16}, {'x0_vae', 'z'}, r'x_t of shape \(16, 16, 2\), got \(8, 8, 2\)'),
    ({'latent_dim': 5}, {'x0_vae', 'z'}, r'z has shape \(2, 3\), expected \(batch, 5\)'),
  ],
)
def test_inputs_that_do_not_fit_are_errors(rng, changes, given, message):
  x_t, t, x0_vae, z = random_inputs(rng)
  conditions = {'x0_vae': x0_vae, 'z': z, 'drop': jnp.array([True, False])}
  conditions = {name: value for name, value in conditions.items() if name in given}
  with pytest.raises(ValueError, match=message):
    build(**changes).module.init(jax.random.key(0), x_t, t, **conditions)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'variant': 'adm'}, "model.variant is 'adm'; choose one of openai, ddim"),
    ({'image_size': 9}, 'image_size is 9, .* multiple of 2; nearest: 8 or 10'),
    (
      {'image_size': 5, 'channel_multipliers': (1, 1, 1, 1)},
      'image_size is 5, but 4 levels .* multiple of 8; nearest: 8',
    ),
    ({'attention_resolutions': (4, 2)}, 'attention_resolutions names 2, .* sides 8, 4'),
    ({'num_heads': 3}, 'model.num_heads is 3, .* 64 channels of the attention at resolution 4'),
    ({'num_heads': 0}, 'model.num_heads is 0'),
    ({'channels': 2, 'num_heads': 1}, 'model.channels is 2'),
    ({'channel_multipliers': ()}, 'model.channel_multipliers is empty'),
    ({'dropout': 1.0}, r'model.dropout is 1.0; it must be in \[0, 1\)'),
    ({'dtype': 'float16'}, "model.dtype is 'float16'"),
    ({'condition_on_image': False, 'latent_dim': 0}, 'learned_null is set .* no condition'),
  ],
)
def test_mistakes_are_user_errors(changes, message):
  with pytest.raises(UserError, match=message):
    UNet(**{**TINY, **changes})


def test_heads_need_divide_only_channels_with_attention():
  UNet(**{**TINY, 'channels': 6, 'channel_multipliers': (1, 2), 'num_heads': 4})


def test_formulations_are_the_same_network_in_other_coordinates(rng):
  model = build()
  form2 = random_params(model, rng)
  form1 = convert_formulation(form2, to=1, image_channels=2)
  y_t, t, x0_vae, z = random_inputs(rng)
  run = jax.jit(model.apply)
  expected = run(form2, y_t + x0_vae, t, x0_vae, z)
  assert np.abs(expected - run(form2, y_t, t, x0_vae, z)).max() > 1e-3
  np.testing.assert_allclose(run(form1, y_t, t, x0_vae, z), expected, atol=1e-5)

  back = convert_formulation(form1, to=2, image_channels=2)
  for a, b in zip(jax.tree.leaves(form2), jax.tree.leaves(back), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_only_networks_that_read_the_image_are_converted(rng):
  params = random_params(build(condition_on_image=False), rng)
  with pytest.raises(ValueError, match='Only a network with condition_on_image'):
    convert_formulation(params, to=1, image_channels=2)
  with pytest.raises(ValueError, match='formulations 1 and 2, not 3'):
    convert_formulation(params, to=3, image_channels=2)


# Features -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('changes', [{}, {'attention_resolutions': (8,), 'num_res_blocks': 2}])
def test_features_are_the_maps_of_the_forward_pass(rng, changes):
  """Those of each level's last block, before it is halved, and of the middle."""
  model = build(**changes)
  params, inputs = random_params(model, rng), random_inputs(rng)

  def whole(params):
    _, state = model.module.apply({'params': params}, *inputs, capture_intermediates=True, mutable=True)
    return state['intermediates']

  captured = jax.jit(whole)(params)
  features = jax.jit(lambda params: model.apply(params, *inputs, method='features'))(params)
  last = 'attn_1' if changes else 'res_0'
  levels = [captured['down_0'][last], captured['down_1'][last.replace('attn', 'res')], captured['middle']]
  assert (
    [x.shape[1:] for x in features] == feature_shapes(model.module) == [(8, 8, 64), (4, 4, 64), (4, 4, 64)]
  )
  for got, expected in zip(features, levels, strict=True):
    np.testing.assert_allclose(got, expected['__call__'][0], rtol=1e-5, atol=1e-6)


def test_features_need_no_parameter_of_the_way_up_and_all_of_the_way_down(rng):
  model = build()
  params, (x_t, t, x0_vae, z) = random_params(model, rng), random_inputs(rng)
  down = {k: v for k, v in params.items() if not k.startswith(('up_', 'norm_out', 'conv_out'))}
  assert len(down) == len(params) - 4
  drop = jnp.array([True, False])

  def total(params):
    return sum(
      jnp.sum(jnp.square(x)) for x in model.apply(params, x_t, t, x0_vae, z, drop, method='features')
    )

  grads = jax.jit(jax.grad(total))(down)
  assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))
