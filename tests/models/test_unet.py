import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from some_slow import some_slow

from vaediff import experiments
from vaediff.conditions.base import Conditions
from vaediff.diffusion import schedules
from vaediff.errors import UserError
from vaediff.experiments.denoiser import Denoiser
from vaediff.models import ports
from vaediff.models.functional import Model
from vaediff.models.ports import Port
from vaediff.models.unet import UNet, convert_formulation

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
  'scale_shift_norm': False,
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


def build(*, on_image: bool = True, latent_dim: int = 3, droppable: bool = True, **changes) -> Model:
  """Returns a network that reads x0_vae, a code z of some size (0 = none), or both."""
  fields = {**TINY, **changes}
  shape = (fields['image_size'], fields['image_size'], fields['image_channels'])
  known = {}
  if on_image:
    known['x0_vae'] = Port(enters='concat', shape=shape, droppable=droppable)
  if latent_dim:
    known['z'] = Port(enters='vector', shape=(latent_dim,), droppable=droppable)
  image, time = (jax.ShapeDtypeStruct((1, *own), jnp.float32) for own in (shape, ()))
  module = UNet(ports=tuple(known.items()), **fields)
  return Model(module=module, inputs=(image, time, ports.structs(known)))


def shapes(model: Model):
  return jax.eval_shape(model.init, jax.random.key(0))


def count(model: Model) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(model)))


def published(architecture: dict, attention_resolutions: tuple[int, ...], **changes) -> Model:
  defaults = {'image_channels': 3, 'num_res_blocks': 2, 'latent_dim': 0, 'droppable': False}
  return build(**{**defaults, **architecture, 'attention_resolutions': attention_resolutions, **changes})


def random_params(model: Model, rng):
  # Not the module's own initialisation, whose zeros would hide most of the network.
  return jax.tree.map(lambda leaf: jnp.float32(0.1 * rng.normal(size=leaf.shape)), shapes(model))


def random_inputs(rng):
  image = lambda: jnp.float32(rng.normal(size=(2, 8, 8, 2)))
  x_t, x0_vae = image(), image()
  return x_t, jnp.float32([0.2, 1.0]), {'x0_vae': x0_vae, 'z': jnp.float32(rng.normal(size=(2, 3)))}


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
@pytest.mark.slow
def test_parameters_are_the_published_networks(
  architecture, as_coded, as_coded_millions, at_16_millions, z_dim, with_z_millions
):
  millions = lambda model: round(count(model) / 1e6, 2)
  assert millions(published(architecture, as_coded)) == as_coded_millions
  assert millions(published(architecture, (16,))) == at_16_millions
  with_z = published(architecture, as_coded, latent_dim=z_dim, scale_shift_norm=True)
  assert millions(with_z) == with_z_millions


@pytest.mark.parametrize('variant', some_slow(['openai', 'ddim'], 'openai'))
def test_cifar10_parameters_to_the_last_one(variant):
  assert count(published(CIFAR, (16,), variant=variant)) == 35_749_763
  # Ho et al. 2020 (2006.11239), appendix B: 35.7 million, without a condition.
  alone = published(CIFAR, (16,), variant=variant, on_image=False)
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
  assert not {'null_x0_vae', 'null_z'} & set(shapes(build(droppable=False)))


@pytest.mark.parametrize('variant', some_slow(['openai', 'ddim'], 'openai'))
def test_output_at_initialisation(key, rng, variant):
  key_init, key_dropout = jax.random.split(key)
  model = build(**ONE_LEVEL, variant=variant)
  params = jax.jit(model.init)(key_init)
  assert not np.any(params['null_x0_vae']) and not np.any(params['null_z'])
  x_t, t, values = random_inputs(rng)
  y = apply(model, params, x_t, t, values, key_dropout=key_dropout)
  assert y.shape == x_t.shape and y.dtype == jnp.float32
  if variant == 'openai':
    assert not np.any(y)
  else:
    assert np.all(np.isfinite(y)) and 0.01 < np.std(y) < 10.0


@pytest.mark.slow
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


@pytest.mark.slow
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
  x_t, t, values = random_inputs(rng)
  drop = dict.fromkeys(values, jnp.array([True, False]))
  run = jax.jit(model.apply)
  kept, mixed = run(params, x_t, t, values), run(params, x_t, t, values, drop)
  other = run(params, x_t, t, {'x0_vae': values['x0_vae'] + 1.0, 'z': values['z'] - 1.0}, drop)
  np.testing.assert_array_equal(mixed[0], other[0])
  assert np.abs(mixed[1] - other[1]).max() > 1e-3
  np.testing.assert_allclose(mixed[1], kept[1], atol=1e-6)
  nulls = {
    name: jnp.broadcast_to(params[f'null_{name}'][None], value.shape) for name, value in values.items()
  }
  np.testing.assert_allclose(mixed[0], run(params, x_t, t, nulls)[0], atol=1e-6)


def test_output_depends_on_time_and_z(rng):
  model = build(variant='ddim')
  params = random_params(model, rng)
  x_t, t, values = random_inputs(rng)
  run = jax.jit(model.apply)
  y = run(params, x_t, t, values)
  assert np.abs(y - run(params, x_t, t - 0.1, values)).max() > 1e-3
  assert np.abs(y - run(params, x_t, t, {**values, 'z': values['z'] + 1.0})).max() > 1e-3


@pytest.mark.parametrize(
  ('changes', 'given', 'dropped', 'message'),
  [
    ({}, {'x0_vae'}, '', r"reads the values \['x0_vae', 'z'\], got \['x0_vae'\]"),
    ({}, {'z'}, '', r"reads the values \['x0_vae', 'z'\], got \['z'\]"),
    ({'latent_dim': 0}, {'x0_vae', 'z'}, '', r"reads the values \['x0_vae'\], got \['x0_vae', 'z'\]"),
    ({'on_image': False}, {'x0_vae', 'z'}, '', r"reads the values \['z'\], got \['x0_vae', 'z'\]"),
    ({'droppable': False}, {'x0_vae', 'z'}, 'z', r"'z' cannot be dropped; .* learned stand-in: \[\]"),
    ({'on_image': False, 'latent_dim': 0}, {}, 'z', r"'z' cannot be dropped; .* learned stand-in: \[\]"),
    ({'latent_dim': 0}, {'x0_vae'}, 'z', r"'z' cannot be dropped; .* learned stand-in: \['x0_vae'\]"),
    ({'image_size': 16}, {'x0_vae', 'z'}, '', r'x_t of shape \(16, 16, 2\), got \(8, 8, 2\)'),
    ({'latent_dim': 5}, {'x0_vae', 'z'}, '', r'reads z of shape \(5,\) per example, got \(3,\)'),
  ],
)
def test_inputs_that_do_not_fit_are_errors(rng, changes, given, dropped, message):
  x_t, t, values = random_inputs(rng)
  values = {name: value for name, value in values.items() if name in given}
  drop = {dropped: jnp.array([True, False])} if dropped else {}
  with pytest.raises(ValueError, match=message):
    build(**changes).module.init(jax.random.key(0), x_t, t, values, drop)


def test_an_image_beside_the_state_has_the_shape_of_its_port(rng):
  x_t, t, values = random_inputs(rng)
  with pytest.raises(ValueError, match=r'reads x0_vae of shape \(8, 8, 2\) per example, got \(4, 8, 2\)'):
    build().module.init(jax.random.key(0), x_t, t, {**values, 'x0_vae': values['x0_vae'][:, :4]})


@pytest.mark.slow
def test_coordinates_are_a_linear_map_of_row_and_column(rng):
  plain, placed = build(), build(coordinates=True)
  assert count(placed) == count(plain) + 2 * TINY['channels']
  params = random_params(plain, rng)
  inputs = random_inputs(rng)
  nowhere = {**params, 'coordinates': jnp.zeros((2, TINY['channels']))}
  np.testing.assert_array_equal(apply(placed, nowhere, *inputs), apply(plain, params, *inputs))

  kernel = jnp.float32(rng.normal(size=(2, TINY['channels'])))
  first = lambda model, params: model.module.apply(
    {'params': params}, *inputs, {}, {}, jnp.zeros(()), deterministic=True, method='maps'
  )[0]
  rows = np.linspace(-1, 1, 8)[:, None, None] * np.asarray(kernel[0])
  columns = np.linspace(-1, 1, 8)[None, :, None] * np.asarray(kernel[1])
  moved = first(placed, {**params, 'coordinates': kernel}) - first(plain, params)
  np.testing.assert_allclose(moved, np.broadcast_to(rows + columns, moved.shape), atol=1e-5)


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
  ],
)
def test_mistakes_are_user_errors(changes, message):
  with pytest.raises(UserError, match=message):
    UNet(**{**TINY, **changes})


def test_a_dropout_without_a_condition_is_a_user_error():
  config = importlib.import_module('configs.digits').get_config('unconditional,debug')
  config.refiner.diffusion.condition_dropout = 0.1
  with pytest.raises(UserError, match=r'condition_dropout is 0\.1, .* nothing .* that could be dropped'):
    experiments.build(config, 'refiner')


def test_heads_need_divide_only_channels_with_attention():
  UNet(**{**TINY, 'channels': 6, 'channel_multipliers': (1, 2), 'num_heads': 4})


def test_formulations_are_the_same_network_in_other_coordinates(rng):
  model = build()
  form2 = random_params(model, rng)
  form1 = convert_formulation(form2, to=1, image_channels=2)
  y_t, t, values = random_inputs(rng)
  run = jax.jit(model.apply)
  expected = run(form2, y_t + values['x0_vae'], t, values)
  assert np.abs(expected - run(form2, y_t, t, values)).max() > 1e-3
  np.testing.assert_allclose(run(form1, y_t, t, values), expected, atol=1e-5)

  back = convert_formulation(form1, to=2, image_channels=2)
  for a, b in zip(jax.tree.leaves(form2), jax.tree.leaves(back), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_only_networks_that_read_the_image_are_converted(rng):
  params = random_params(build(on_image=False), rng)
  with pytest.raises(ValueError, match='Only a network that concatenates one image'):
    convert_formulation(params, to=1, image_channels=2)
  with pytest.raises(ValueError, match='formulations 1 and 2, not 3'):
    convert_formulation(params, to=3, image_channels=2)


# Features -------------------------------------------------------------------------------------------


def feature_shapes(model: Model):
  denoiser = Denoiser(
    model=model, conditions=Conditions(), schedule=schedules.LinearBeta(), prediction='eps',
    loss_weight='snr', bound=None, clip='none', threshold_percentile=100.0,
  )  # fmt: skip
  return denoiser.feature_shapes()


@pytest.mark.parametrize('changes', some_slow([{}, {'attention_resolutions': (8,), 'num_res_blocks': 2}], {}))
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
  assert [x.shape[1:] for x in features] == feature_shapes(model) == [(8, 8, 64), (4, 4, 64), (4, 4, 64)]
  for got, expected in zip(features, levels, strict=True):
    np.testing.assert_allclose(got, expected['__call__'][0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_features_need_no_parameter_of_the_way_up_and_all_of_the_way_down(rng):
  model = build()
  params, (x_t, t, values) = random_params(model, rng), random_inputs(rng)
  down = {k: v for k, v in params.items() if not k.startswith(('up_', 'norm_out', 'conv_out'))}
  assert len(down) == len(params) - 4
  drop = dict.fromkeys(values, jnp.array([True, False]))

  def total(params):
    return sum(jnp.sum(jnp.square(x)) for x in model.apply(params, x_t, t, values, drop, method='features'))

  grads = jax.jit(jax.grad(total))(down)
  assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))
