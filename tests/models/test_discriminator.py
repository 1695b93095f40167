import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vaediff.errors import UserError
from vaediff.machine import cost
from vaediff.models import resampling
from vaediff.models.discriminator import DownBlock, TimeDiscriminator, minibatch_std

pytestmark = pytest.mark.slow  # networks of the denoising GANs: many programs to compile

TINY = {'variant': 'small', 'num_layers': 3, 'dtype': 'float32', 'channels': 2, 'time_dim': 6}


def shapes(module, size, channels, batch=4):
  image = jax.ShapeDtypeStruct((batch, size, size, channels), jnp.float32)
  time = jax.ShapeDtypeStruct((batch,), jnp.int32)
  return jax.eval_shape(module.init, jax.random.key(0), image, time, image)


def random_params(module, rng, channels=3, size=16):
  draw = lambda leaf: jnp.float32(rng.normal(size=leaf.shape) / max(1, np.prod(leaf.shape[:-1])) ** 0.5)
  return jax.tree.map(draw, shapes(module, size, channels))


def random_inputs(rng, batch=8, size=16):
  x_t, x_next = (jnp.float32(rng.normal(size=(batch, size, size, 3))) for _ in range(2))
  return x_t, jnp.arange(batch) % 4, x_next


@pytest.fixture
def rng():
  return np.random.default_rng(0)


@pytest.mark.parametrize(
  ('variant', 'num_layers', 'size', 'channels', 'millions'),
  [
    ('small', 4, 32, 3, 12.74),  # DDGAN, CIFAR-10
    ('large', 6, 256, 3, 27.74),  # DDGAN, 256 pixels
    ('small', 3, 16, 12, 7.63),  # WaveDiff, CIFAR-10
    ('small', 4, 32, 12, 12.74),  # WaveDiff, STL-10
    ('large', 5, 128, 12, 22.63),  # WaveDiff, 256 pixels
    ('small', 3, 16, 4, 7.63),  # LDDGAN, CIFAR-10
    ('large', 4, 64, 3, 17.51),  # LDDGAN, CelebA-HQ
    ('large', 4, 32, 4, 17.51),  # LDDGAN, LSUN
  ],
)
def test_parameters_are_the_published_networks(variant, num_layers, size, channels, millions):
  module = TimeDiscriminator(variant=variant, num_layers=num_layers, dtype='float32')
  count = cost.num_parameters(shapes(module, size, channels))
  assert round(count / 1e6, 2) == millions
  if (variant, channels) == ('small', 3):
    widths = [(128, 128), (128, 256), (256, 512), (512, 512)]
    blocks = sum(9 * a * b + b + 256 * b + b + 9 * b * b + b + a * b for a, b in widths)
    ends = 2 * (256 * 256 + 256) + 6 * 128 + 128 + 9 * 513 * 512 + 512 + 512 + 1
    assert count == blocks + ends


@pytest.mark.parametrize(('init_scale', 'low', 'high'), [(0.0, 0.0, 1e-3), (1.0, 0.05, 10.0)])
def test_the_first_logits_are_zero_or_not(rng, init_scale, low, high):
  module = TimeDiscriminator(**{**TINY, 'channels': 8}, init_scale=init_scale)
  inputs = random_inputs(rng)
  logits = module.apply(module.init(jax.random.key(0), *inputs), *inputs)
  assert low <= float(jnp.abs(logits).mean()) < high


def test_parameters_have_stable_names():
  params = shapes(TimeDiscriminator(**TINY), 16, 3)['params']
  blocks = {'block_0', 'block_1', 'block_2'}
  assert set(params) == {'time_embedding', 'conv_in', 'conv_out', 'logit', *blocks}
  assert set(params['block_0']) == {'conv_1', 'emb', 'conv_2', 'skip'}
  assert set(params['block_0']['skip']) == {'kernel'}
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}


@pytest.mark.parametrize(('batch', 'group_size'), [(8, 4), (6, 3), (3, 4), (4, 1)])
def test_minibatch_std_is_the_loop(rng, batch, group_size):
  x = rng.normal(size=(batch, 2, 3, 5))
  actual = minibatch_std(jnp.float32(x), group_size=group_size)
  group = min(batch, group_size)
  for first in range(0, batch, group):
    deviations = []
    for i in range(2):
      for j in range(3):
        for c in range(5):
          values = x[first : first + group, i, j, c]
          deviations.append(np.sqrt(np.mean((values - np.mean(values)) ** 2) + 1e-8))
    np.testing.assert_allclose(actual[first : first + group], np.mean(deviations), rtol=1e-5)


def test_minibatch_std_of_equal_examples_has_a_gradient():
  x = jnp.ones((4, 2, 2, 3), jnp.bfloat16)
  spread = minibatch_std(x, group_size=4)
  assert spread.dtype == jnp.float32
  np.testing.assert_allclose(spread, 1e-4, rtol=1e-5)
  gradient = jax.grad(lambda x: minibatch_std(x, group_size=4).sum())(x.astype(jnp.float32))
  assert np.all(np.isfinite(gradient))


def test_groups_that_do_not_divide_the_batch_are_a_user_error():
  with pytest.raises(UserError, match='groups of 4 examples .*group_size.* batch of 6; .*multiple of 4'):
    minibatch_std(jnp.zeros((6, 1, 1, 1)), group_size=4)


def test_groups_of_a_sharded_batch_stay_on_their_devices(rng):
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  sharding = NamedSharding(mesh, PartitionSpec('data'))
  x = jax.device_put(jnp.float32(rng.normal(size=(32, 2, 2, 3))), sharding)
  run = jax.jit(lambda x: minibatch_std(x, group_size=4), out_shardings=sharding)
  program = run.lower(x).compile().as_text()
  for transfer in ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute'):
    assert transfer not in program
  np.testing.assert_allclose(run(x), minibatch_std(jnp.asarray(np.asarray(x)), group_size=4), rtol=1e-6)


def test_logits_see_their_own_group_only(rng):
  module = TimeDiscriminator(**TINY)
  params = random_params(module, rng)
  x_t, t, x_next = random_inputs(rng)
  run = jax.jit(module.apply)
  logits = run(params, x_t, t, x_next)
  assert logits.shape == (8,) and logits.dtype == jnp.float32
  changed = run(params, x_t.at[5].add(1.0), t, x_next)
  np.testing.assert_allclose(logits[:4], changed[:4], rtol=1e-5)
  assert np.all(jnp.abs(logits - changed)[4:] > 1e-5)


def test_every_input_matters(rng):
  module = TimeDiscriminator(**TINY)
  params = random_params(module, rng)
  kernel = params['params']['conv_in']['kernel']
  params['params']['conv_in']['kernel'] = jnp.concatenate([kernel, kernel[:2]])
  x_t, t, x_next = random_inputs(rng)
  condition = x_t[..., :2]
  run = jax.jit(module.apply)
  logits = run(params, x_t, t, x_next, condition)
  for changed in (
    (x_t + 0.5, t, x_next, condition),
    (x_t, t + 1, x_next, condition),
    (x_t, t, x_next + 0.5, condition),
    (x_t, t, x_next, condition + 0.5),
    (x_next, t, x_t, condition),
  ):
    assert jnp.abs(logits - run(params, *changed)).max() > 1e-3
  np.testing.assert_allclose(logits, run(params, x_t, t.astype(jnp.float32), x_next, condition), rtol=1e-6)


@pytest.mark.parametrize('halve', [False, True])
def test_block_is_the_formula(rng, halve):
  normal = lambda *shape: jnp.float32(rng.normal(size=shape))
  x, emb = normal(2, 6, 4, 5), normal(2, 3)
  module = DownBlock(features=7, halve=halve, dtype=jnp.float32)
  structs = jax.eval_shape(module.init, jax.random.key(0), x, emb)
  p = jax.tree.map(lambda leaf: normal(*leaf.shape), structs)['params']
  act = lambda h: jnp.maximum(h, 0.2 * h)
  change = resampling.fir_downsample if halve else lambda h: h

  def convolve(h, layer):
    numbers = ('NHWC', 'HWIO', 'NHWC')
    h = jax.lax.conv_general_dilated(h, layer['kernel'], (1, 1), 'SAME', dimension_numbers=numbers)
    return h + layer['bias'][None, None, None]

  h = convolve(act(x), p['conv_1'])
  h = act(h + (emb @ p['emb']['kernel'] + p['emb']['bias'][None])[:, None, None])
  h = convolve(change(h), p['conv_2']) + change(x) @ p['skip']['kernel']
  actual = jax.jit(module.apply)({'params': p}, x, emb)
  np.testing.assert_allclose(actual, h / np.sqrt(2), rtol=1e-4, atol=1e-4)


def test_the_gradient_penalty_can_be_differentiated(rng):
  """R1 needs the gradient of a squared gradient with respect to x_t."""
  module = TimeDiscriminator(**TINY)
  params = random_params(module, rng)
  x_t, t, x_next = random_inputs(rng, batch=4)

  def penalty(params):
    gradient = jax.grad(lambda x: module.apply(params, x, t, x_next).sum())(x_t)
    return jnp.square(gradient).sum(axis=(1, 2, 3)).mean()

  value, gradient = jax.jit(jax.value_and_grad(penalty))(params)
  assert value > 0.0
  for path in (('conv_in',), ('block_1', 'conv_2'), ('conv_out',), ('logit',)):
    leaf = gradient['params']
    for name in path:
      leaf = leaf[name]
    assert np.all(np.isfinite(leaf['kernel'])) and np.any(leaf['kernel'])


def test_small_networks_start_undecided(rng):
  inputs = random_inputs(rng, batch=4)
  spread = {}
  for variant in ('small', 'large'):
    module = TimeDiscriminator(**{**TINY, 'variant': variant})
    params = jax.jit(module.init)(jax.random.key(0, impl='rbg'), *inputs)
    spread[variant] = jnp.abs(jax.jit(module.apply)(params, *inputs)).max()
  assert 0.0 < spread['small'] < 1e-2 < spread['large']


def test_bfloat16_is_close_and_returns_float32(rng):
  exact, rough = TimeDiscriminator(**TINY), TimeDiscriminator(**{**TINY, 'dtype': 'bfloat16'})
  params, inputs = random_params(exact, rng), random_inputs(rng)
  assert shapes(exact, 16, 3) == shapes(rough, 16, 3)
  a, b = (jax.jit(module.apply)(params, *inputs) for module in (exact, rough))
  assert b.dtype == jnp.float32
  assert 0.0 < jnp.abs(a - b).max() < 0.05 * jnp.abs(a).max()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'variant': 'tiny'}, "discriminator.variant is 'tiny'; choose one of small, large"),
    ({'num_layers': 2}, "discriminator.num_layers is 2; a 'small' discriminator has 3 to 4"),
    ({'num_layers': 5}, "num_layers is 5; a 'small' discriminator has 3 to 4"),
    ({'variant': 'large', 'num_layers': 9}, "num_layers is 9; a 'large' discriminator has 3 to 8"),
    ({'time_dim': 5}, 'discriminator.time_dim is 5; it must be even and at least 4'),
    ({'channels': 0}, 'discriminator.channels is 0; it must be at least 1'),
    ({'group_size': 0}, 'discriminator.group_size is 0; it must be at least 1'),
    ({'init_scale': -1.0}, 'discriminator.init_scale is -1.0; it must be at least 0'),
    ({'dtype': 'float16'}, "discriminator.dtype is 'float16'; choose one of float32, bfloat16"),
  ],
)
def test_mistakes_are_user_errors(changes, message):
  with pytest.raises(UserError, match=message):
    TimeDiscriminator(**{**TINY, **changes})


def test_inputs_that_do_not_fit_are_errors():
  module = TimeDiscriminator(**{**TINY, 'variant': 'large', 'num_layers': 4})
  with pytest.raises(UserError, match="x_t is 24 x 24, .*'large'.* 4 halves it 4 times .* multiples of 16"):
    shapes(module, 24, 3)
  with pytest.raises(UserError, match='groups of 4 examples .*batch of 6'):
    shapes(module, 16, 3, batch=6)
