"""Maps of tokens inside the U-Net: parameters of the nine places and ways, and what each of them does."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from some_slow import some_slow

from configs import presets
from vaediff.errors import UserError
from vaediff.models import layers, ports, token_injection
from vaediff.models.functional import Model
from vaediff.models.ports import Port
from vaediff.models.unet import UNet

PLACES = [(position, how) for position in token_injection.POSITIONS for how in token_injection.WAYS]
SMALL = {
  'variant': 'openai', 'channels': 8, 'channel_multipliers': (1, 2), 'num_res_blocks': 1,
  'attention_resolutions': (), 'num_heads': 2, 'dropout': 0.0, 'scale_shift_norm': True,
}  # fmt: skip
GRID = (2, 2, 4)


def build(port, size=4, fields=SMALL, channels=1, **changes):
  named = {} if port is None else {'tokens': port}
  state = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
  module = UNet(
    **{'num_heads': 1, 'remat': False, 'dtype': 'float32', **fields, **changes},
    image_size=size, image_channels=channels, ports=tuple(named.items()),
  )  # fmt: skip
  return Model(module=module, inputs=(state, jax.ShapeDtypeStruct((1,), jnp.float32), ports.structs(named)))


def count(model):
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def published(preset, port=None):
  return count(build(port, 256, presets.UNET[preset], 3, learned_variance=True))


def random_of(model, seed=0):
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return jax.tree.map(lambda leaf: jnp.float32(0.3 * rng.normal(size=leaf.shape)), shapes)


def images(count=2):
  return jax.random.normal(jax.random.key(1), (count, 4, 4, 1)), jnp.full(count, 0.4)


def tokens(seed=2, count=2, grid=GRID):
  return jax.random.normal(jax.random.key(seed), (count, *grid))


@pytest.mark.slow
def test_bases_are_of_the_published_size():
  assert published('divae_f16') == 350_341_638
  assert published('divae_f8') == 296_029_190


@pytest.mark.parametrize(
  ('position', 'how', 'parameters'),
  some_slow([
    ('encoder', 'concat', 6_293_504),
    ('encoder', 'add', 526_336),
    ('encoder', 'attention', 5_256_192),
    ('middle', 'concat', 3_671_552),
    ('middle', 'add', 263_168),
    ('middle', 'attention', 2_628_096),
    ('decoder', 'concat', 7_865_856),
    ('decoder', 'add', 789_504),
    ('decoder', 'attention', 7_884_288),
  ], ('decoder', 'attention', 7_884_288)),
)  # fmt: skip
def test_parameters_that_each_place_and_way_adds(position, how, parameters):
  port = Port(enters=position, how=how, shape=(16, 16, 256))
  assert published('divae_f16', port) - 350_341_638 == parameters


@pytest.mark.parametrize(
  ('position', 'how'),
  some_slow(PLACES, ('encoder', 'concat'), ('decoder', 'attention')),
)
def test_every_example_reads_its_own_tokens(position, how):
  model = build(Port(enters=position, how=how, shape=GRID))
  params, (x, t) = random_of(model), images()
  first, second = tokens(), tokens(3)
  run = jax.jit(lambda values: model.apply(params, x, t, {'tokens': values}))
  before, after = run(first), run(first.at[0].set(second[0]))
  assert before.shape == x.shape
  np.testing.assert_array_equal(before[1], after[1])
  assert np.abs(before[0] - after[0]).max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize('position', token_injection.POSITIONS)
def test_attention_changes_nothing_at_first(position):
  plain = build(None)
  params = random_of(plain)
  model = build(Port(enters=position, how='attention', shape=(3, 5, 6)))
  fresh = jax.jit(model.init)(jax.random.key(0))

  def laid_over(tree, known):
    both = {
      name: laid_over(tree[name], leaf) if isinstance(leaf, dict) else leaf for name, leaf in known.items()
    }
    return {**tree, **both}

  x, t = images()
  values = {'tokens': tokens(grid=(3, 5, 6))}  # its grid is free
  np.testing.assert_array_equal(
    jax.jit(model.apply)(laid_over(fresh, params), x, t, values), jax.jit(plain.apply)(params, x, t)
  )


def test_order_of_tokens_does_not_matter_where_they_say_their_place(monkeypatch):
  module = token_injection.TokenAttention(heads=2, norm_epsilon=1e-5, dtype=jnp.float32)
  x, seen = jax.random.normal(jax.random.key(0), (2, 4, 4, 8)), tokens(grid=(2, 3, 8))
  shapes = jax.eval_shape(module.init, jax.random.key(0), x, seen)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: jnp.float32(rng.normal(size=leaf.shape)), shapes)
  order, known = np.array([3, 0, 5, 1, 4, 2]), layers.positions
  apply = lambda seen: jax.jit(module.apply)(params, x, seen)
  before = apply(seen)
  move = lambda grid: grid.reshape(*grid.shape[:-3], 6, 8)[..., order, :].reshape(grid.shape)
  without_place = apply(move(seen))
  assert np.abs(without_place - before).max() > 1e-2  # moved without their position
  of_tokens = lambda *shape: move(known(*shape)) if shape == (2, 3, 8) else known(*shape)
  monkeypatch.setattr(layers, 'positions', of_tokens)
  moved = jax.jit(lambda seen: module.apply(params, x, seen))(move(seen))  # traced anew
  np.testing.assert_allclose(moved, before, atol=1e-4)


@pytest.mark.parametrize('how', some_slow(token_injection.WAYS, 'add'))
def test_a_dropped_example_reads_one_vector_everywhere(how):
  model = build(Port(enters='middle', how=how, shape=GRID, droppable=True))
  params, (x, t) = random_of(model), images()
  assert params['null_tokens'].shape == (4,)
  run = jax.jit(lambda values, mask: model.apply(params, x, t, {'tokens': values}, {'tokens': mask}))
  dropped = run(tokens(), jnp.bool_([True, False]))
  null = jnp.broadcast_to(params['null_tokens'], (2, *GRID))
  np.testing.assert_allclose(dropped[0], run(null, jnp.zeros(2, bool))[0], atol=1e-5)
  np.testing.assert_array_equal(dropped[1], run(tokens(), jnp.zeros(2, bool))[1])


def test_maps_of_the_way_down_keep_their_widths():
  model = build(Port(enters='encoder', how='concat', shape=GRID))
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  maps = jax.eval_shape(lambda p, i: model.apply(p, *i, method='features'), shapes, model.inputs)
  assert [leaf.shape[1:] for leaf in maps] == [(4, 4, 8), (2, 2, 16), (2, 2, 16)]


@pytest.mark.slow
def test_memory_saving_and_bfloat16_compute_the_same():
  port = Port(enters='decoder', how='attention', shape=GRID)
  model, (x, t) = build(port), images()
  params = random_of(model)
  known = jax.jit(model.apply)(params, x, t, {'tokens': tokens()})
  remat = jax.jit(build(port, remat=True).apply)(params, x, t, {'tokens': tokens()})
  np.testing.assert_allclose(remat, known, atol=1e-5)
  short = jax.jit(build(port, dtype='bfloat16').apply)(params, x, t, {'tokens': tokens()})
  assert short.dtype == jnp.float32
  assert np.abs(short - known).max() < 0.1 * np.abs(known).max()


@pytest.mark.parametrize(
  ('shape', 'message'),
  [
    ((1, 1, 4), r'tokens has a grid of 1 x 1, but .* has 2 x 2: .* 2 levels; take log2 f \+ 1 = 3 levels'),
    ((4, 4, 4), r'grid of 4 x 4, but .* has 2 x 2: .* take log2 f \+ 1 = 1 levels for f = 1'),
    ((3, 2, 4), "grid of 3 x 2, but .* has 2 x 2: .* 2 levels; use how = 'attention'"),
  ],
)  # fmt: skip
def test_grids_that_do_not_fit_are_refused(shape, message):
  for how in ('concat', 'add'):
    with pytest.raises(UserError, match=message):
      build(Port(enters='middle', how=how, shape=shape))
  build(Port(enters='middle', how='attention', shape=shape))


def test_ports_inside_are_maps_with_a_way_to_join():
  for fields in (
    {'enters': 'middle', 'shape': (4,)},
    {'enters': 'middle', 'shape': GRID, 'how': 'multiply'},
    {'enters': 'concat', 'shape': GRID, 'how': 'add'},
    {'enters': 'vector', 'shape': (), 'how': 'attention'},
    {'enters': 'bottom', 'shape': GRID},
  ):
    with pytest.raises(ValueError, match='port'):
      Port(**fields)
