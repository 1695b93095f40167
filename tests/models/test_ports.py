"""Ports of every kind: what the network makes of a value, what stands in for it, what is learned about it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from some_slow import some_slow

from vaediff.models import ports
from vaediff.models.functional import Model
from vaediff.models.ports import Port
from vaediff.models.unet import UNet

COUNT, SIDE, WIDTH, CLASSES = 3, 4, 8, 5
KINDS = {
  'low': Port(enters='concat', shape=(SIDE, SIDE, 2), droppable=True),
  'z': Port(enters='vector', shape=(3,), droppable=True),
  'weight': Port(enters='vector', shape=(), droppable=True),
  'label': Port(enters='vector', shape=(), classes=CLASSES, droppable=True),
}
LEVEL = Port(enters='vector', shape=(), level=True, droppable=True)
NAMES = {
  'low': {'null_low': (SIDE, SIDE, 2)},
  'z': {
    'null_z': (3,),
    'z_mlp/dense_0/kernel': (3, WIDTH),
    'z_mlp/dense_0/bias': (WIDTH,),
    'z_mlp/dense_1/kernel': (WIDTH, WIDTH),
    'z_mlp/dense_1/bias': (WIDTH,),
  },
  'weight': {'null_weight': (), 'weight/kernel': (WIDTH, WIDTH)},
  'label': {'label_table/embedding': (CLASSES + 1, WIDTH)},
}


def waves(position):
  return jnp.sin(position[:, None] * jnp.arange(1, WIDTH + 1)[None, :] / 100)


class Toy(nn.Module):
  """Returns what a network reads: the state with what is beside it, and the embedding."""

  ports: ports.Named

  @nn.compact
  def __call__(self, x, values={}, drop={}, *, deterministic=True):  # noqa: B006
    ports.check(self.ports, values, drop)
    start = jnp.ones((len(x), WIDTH))
    emb = ports.embed(self, self.ports, start, values, drop, waves, jnp.float32)
    return ports.join(self, self.ports, x, values, drop), emb


def toy(*names, **changes) -> Model:
  known = {name: changes[name] if name in changes else KINDS[name] for name in names}
  state = jax.ShapeDtypeStruct((1, SIDE, SIDE, 1), jnp.float32)
  return Model(module=Toy(ports=tuple(known.items())), inputs=(state, ports.structs(known)))


def init(model):
  """As `Model.init`, also where nothing is learned."""
  zeros = jax.tree.map(lambda struct: jnp.zeros(struct.shape, struct.dtype), model.inputs)
  return model.module.init(jax.random.key(0), *zeros).get('params', {})


def randomised(params, seed=5):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: jnp.float32(rng.normal(size=leaf.shape)), params)


@functools.cache
def params_of(*names):
  return randomised(init(toy(*names)))


@pytest.fixture
def x():
  return jax.random.normal(jax.random.key(1), (COUNT, SIDE, SIDE, 1))


@pytest.fixture
def values():
  keys = jax.random.split(jax.random.key(2), 3)
  return {
    'low': jax.random.normal(keys[0], (COUNT, SIDE, SIDE, 2)),
    'z': jax.random.normal(keys[1], (COUNT, 3)),
    'weight': jax.random.uniform(keys[2], (COUNT,), minval=0.5, maxval=4.0),
    'label': jnp.array([4, 0, 2]),
  }


def only(values, *names):
  return {name: values[name] for name in names}


def nulls_of(params, names):
  """The values that a dropped example reads, of every example of the batch."""
  full = lambda leaf: jnp.broadcast_to(leaf[None], (COUNT, *leaf.shape))
  return {
    name: jnp.full(COUNT, CLASSES) if name == 'label' else full(params[f'null_{name}']) for name in names
  }


def same(actual, expected):
  for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(one, other)


def differ(one, other, row):
  return any(np.any(a[row] != b[row]) for a, b in zip(one, other, strict=True))


# What is learned --------------------------------------------------------------------------------------


def named_shapes(params):
  paths = jax.tree_util.tree_leaves_with_path(params)
  return {'/'.join(step.key for step in path): leaf.shape for path, leaf in paths}


@pytest.mark.parametrize('name', KINDS)
def test_parameters_are_named_after_the_value(name):
  assert named_shapes(init(toy(name))) == NAMES[name]


@pytest.mark.parametrize('name', KINDS)
def test_what_cannot_be_dropped_has_no_stand_in(name):
  port = Port(enters=KINDS[name].enters, shape=KINDS[name].shape, classes=KINDS[name].classes)
  expected = {key: shape for key, shape in NAMES[name].items() if not key.startswith('null_')}
  if name == 'label':
    expected = {'label_table/embedding': (CLASSES, WIDTH)}
  assert named_shapes(init(toy(name, **{name: port}))) == expected


def test_a_level_is_embedded_as_a_time_by_an_mlp_that_is_zero_at_first(x):
  model = toy('level', level=LEVEL)
  params = init(model)
  shapes = {f'level_mlp/dense_{k}/{name}': (WIDTH,) for k in '01' for name in ('bias',)}
  shapes |= {f'level_mlp/dense_{k}/kernel': (WIDTH, WIDTH) for k in '01'}
  assert named_shapes(params) == {**shapes, 'null_level': (WIDTH,)}
  level = jnp.float32([0.0, 0.25, 1.0])
  np.testing.assert_array_equal(model.apply(params, x, {'level': level})[1], np.ones((COUNT, WIDTH)))
  params = randomised(params)
  first, last = (params['level_mlp'][f'dense_{k}'] for k in '01')
  hidden = lambda h: nn.silu(h @ first['kernel'] + first['bias'][None])
  out = lambda h: 1 + hidden(h) @ last['kernel'] + last['bias'][None]
  got = model.apply(params, x, {'level': level})[1]
  np.testing.assert_allclose(got, out(waves(1000 * level - 1)), rtol=1e-4, atol=1e-4)
  drop = {'level': jnp.array([False, True, True])}
  dropped = model.apply(params, x, {'level': level}, drop)[1]
  np.testing.assert_array_equal(dropped[0], got[0])
  null = jnp.broadcast_to(params['null_level'], (COUNT, WIDTH))
  np.testing.assert_allclose(dropped[1:], out(null)[1:], rtol=1e-4, atol=1e-4)
  free = init(toy('level', level=Port(enters='vector', shape=(), level=True)))
  assert named_shapes(free) == shapes


def test_a_vector_that_begins_at_zero_changes_nothing_until_it_is_learned(x, values):
  model = toy('z', z=Port(enters='vector', shape=(3,), zero=True))
  params = init(model)
  shapes = {name: shape for name, shape in NAMES['z'].items() if name != 'null_z'}
  assert named_shapes(params) == shapes
  np.testing.assert_array_equal(model.apply(params, x, only(values, 'z'))[1], np.ones((COUNT, WIDTH)))
  gradients = jax.grad(lambda params: jnp.sum(model.apply(params, x, only(values, 'z'))[1]))(params)
  assert np.abs(gradients['z_mlp']['dense_1']['kernel']).min(axis=1).max() > 0  # and it is learned
  with pytest.raises(ValueError, match='concat port cannot have shape .* and begin at zero'):
    Port(enters='concat', shape=(SIDE, SIDE, 1), zero=True)


class Half(nn.Module):
  """Returns the embedding of z in a network that computes in bfloat16."""

  zero: bool

  @nn.compact
  def __call__(self, value):
    port = Port(enters='vector', shape=(3,), zero=self.zero)
    start = jnp.zeros((COUNT, WIDTH), jnp.bfloat16)
    return ports.embed(self, (('z', port),), start, {'z': value}, {}, waves, jnp.bfloat16)


def test_a_vector_that_begins_at_zero_is_projected_in_float32(values):
  value = 100 + values['z']  # bfloat16 has few digits for what differs
  errors = []
  for zero in (True, False):
    params = randomised(Half(zero=zero).init(jax.random.key(0), value)['params'])
    kernels = [(layer['kernel'], layer['bias'][None]) for layer in params['z_mlp'].values()]
    exact = nn.silu(value @ kernels[0][0] + kernels[0][1]) @ kernels[1][0] + kernels[1][1]
    found = Half(zero=zero).apply({'params': params}, value)
    assert found.dtype == jnp.bfloat16
    errors.append(np.abs(np.float32(found) - np.float32(exact.astype(jnp.bfloat16))).max())
  assert errors[0] == 0 < errors[1]


def test_all_kinds_beside_one_another_keep_their_names():
  expected = {key: shape for name in KINDS for key, shape in NAMES[name].items()}
  assert named_shapes(init(toy(*KINDS))) == expected


def test_at_first_stand_ins_and_the_number_are_zero_and_rows_of_the_table_are_small(x, values):
  many = Port(enters='vector', shape=(), classes=999, droppable=True)
  params = init(toy(*KINDS, label=many))
  assert not any(np.any(leaf) for name, leaf in params.items() if name.startswith('null_'))
  rows = params['label_table']['embedding']
  assert abs(float(np.std(rows)) / ports.TABLE_DEVIATION - 1) < 0.05 and abs(float(np.mean(rows))) < 0.001
  own = init(toy('weight'))
  np.testing.assert_array_equal(toy('weight').apply(own, x, only(values, 'weight'))[1], 1.0)


def test_structs_and_channels_are_those_of_the_ports():
  found = ports.structs(KINDS)
  assert {name: struct.shape for name, struct in found.items()} == {
    'low': (1, SIDE, SIDE, 2),
    'z': (1, 3),
    'weight': (1,),
    'label': (1,),
  }
  integers = {name for name, struct in found.items() if struct.dtype == jnp.int32}
  assert integers == {'label'} and found['z'].dtype == jnp.float32
  control = Port(enters='concat', shape=(SIDE, SIDE, 3))
  assert ports.channels((*KINDS.items(), ('control', control))) == 5
  assert ports.channels(()) == 0


# What the network makes of a value --------------------------------------------------------------------


def test_a_network_without_ports_reads_the_state_alone(x):
  model = toy()
  assert init(model) == {}
  state, emb = model.apply({}, x)
  np.testing.assert_array_equal(state, x)
  np.testing.assert_array_equal(emb, 1.0)


def test_maps_are_behind_the_state_in_the_order_of_the_ports(x, values):
  control = Port(enters='concat', shape=(SIDE, SIDE, 1))
  image = -x
  for names in (('low', 'control'), ('control', 'low')):
    known = {'low': KINDS['low'], 'control': control}
    module = Toy(ports=tuple((name, known[name]) for name in names))
    given = {'low': values['low'], 'control': image}
    params = {'null_low': jnp.zeros((SIDE, SIDE, 2))}
    state, emb = module.apply({'params': params}, x, given)
    np.testing.assert_array_equal(state, np.concatenate([x, *(given[name] for name in names)], axis=-1))
    np.testing.assert_array_equal(emb, 1.0)


def test_vectors_numbers_and_classes_add_up_in_the_embedding(x, values):
  """Against NumPy in float64: an MLP of z, the projected waves of the number, a row of the table."""
  params = params_of(*KINDS)
  state, emb = toy(*KINDS).apply(params, x, values)
  double = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  z, weight = np.asarray(values['z'], np.float64), np.asarray(values['weight'], np.float64)
  first, second = double['z_mlp']['dense_0'], double['z_mlp']['dense_1']
  h = z @ first['kernel'] + first['bias']
  expected = 1.0 + (h / (1 + np.exp(-h))) @ second['kernel'] + second['bias']
  expected += np.sin(250 * weight[:, None] * np.arange(1, WIDTH + 1) / 100) @ double['weight']['kernel']
  expected += double['label_table']['embedding'][np.asarray(values['label'])]
  np.testing.assert_allclose(emb, expected, rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(state, np.concatenate([x, values['low']], axis=-1))


# Drops ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', KINDS)
def test_dropped_is_the_null_bit_for_bit(name, x, values):
  """Row by row: what was dropped reads the stand-in whatever the value was, the rest its value."""
  model, params = toy(name), params_of(name)
  given, drop = only(values, name), {name: jnp.array([True, False, True])}
  dropped, kept = model.apply(params, x, given, drop), model.apply(params, x, given)
  null = model.apply(params, x, nulls_of(params, [name]))
  other = model.apply(params, x, {name: given[name][::-1]}, drop)
  rows = lambda outputs, index: [leaf[index] for leaf in outputs]
  for row in (0, 2):
    same(rows(dropped, row), rows(null, row))
    same(rows(dropped, row), rows(other, row))
    assert differ(dropped, kept, row)
  same(rows(dropped, 1), rows(kept, 1))
  assert differ(dropped, null, 1)


@pytest.mark.parametrize('name', KINDS)
def test_a_drop_of_no_example_is_none(name, x, values):
  model, params = toy(name), params_of(name)
  given = only(values, name)
  same(model.apply(params, x, given, {name: jnp.zeros(COUNT, bool)}), model.apply(params, x, given))


@pytest.mark.parametrize('dropped', KINDS)
def test_drops_are_per_value_and_those_not_named_are_kept(dropped, x, values):
  model, params = toy(*KINDS), params_of(*KINDS)
  mask = jnp.array([False, True, False])
  actual = model.apply(params, x, values, {dropped: mask})
  null = nulls_of(params, [dropped])[dropped]
  chosen = jnp.where(mask.reshape(-1, *[1] * (null.ndim - 1)), null, values[dropped])
  same(actual, model.apply(params, x, {**values, dropped: chosen}))
  others = {name: jnp.zeros(COUNT, bool) for name in KINDS if name != dropped}
  same(actual, model.apply(params, x, values, {dropped: mask, **others}))
  assert differ(actual, model.apply(params, x, values), 1)


def test_two_values_are_dropped_each_by_its_own_mask(x, values):
  model, params = toy(*KINDS), params_of(*KINDS)
  drop = {'low': jnp.array([True, False, False]), 'label': jnp.array([False, False, True])}
  actual = model.apply(params, x, values, drop)
  low, label = (model.apply(params, x, values, {name: drop[name]}) for name in ('low', 'label'))
  kept = model.apply(params, x, values)
  for row, expected in enumerate((low, kept, label)):
    same([leaf[row] for leaf in actual], [leaf[row] for leaf in expected])


# Gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', some_slow(['low', 'z', 'weight'], 'z'))
def test_the_gradient_reaches_the_value_where_it_is_kept_and_the_stand_in_where_not(name, x, values):
  model, params = toy(name), params_of(name)
  drop = {name: jnp.array([False, True, False])}

  def total(params, value):
    return sum(jnp.sum(jnp.square(leaf)) for leaf in model.apply(params, x, {name: value}, drop))

  of_params, of_value = jax.grad(total, argnums=(0, 1))(params, values[name])
  rows = np.abs(np.asarray(of_value)).reshape(COUNT, -1).max(axis=1)
  assert rows[0] > 0 and rows[2] > 0 and rows[1] == 0
  assert all(np.any(leaf) for leaf in jax.tree.leaves(of_params))
  of_params = jax.grad(lambda p: total(p, values[name]))({**params, f'null_{name}': values[name][1]})
  assert np.any(of_params[f'null_{name}'])


def test_the_gradient_reaches_the_rows_of_the_table_that_are_read(x, values):
  model, params = toy('label'), params_of('label')
  drop = {'label': jnp.array([False, True, False])}
  total = lambda params: jnp.sum(jnp.square(model.apply(params, x, only(values, 'label'), drop)[1]))
  rows = np.abs(jax.grad(total)(params)['label_table']['embedding']).max(axis=1)
  assert set(np.flatnonzero(rows)) == {4, 2, CLASSES}


# Mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (
      {'enters': 'bottom', 'shape': (3,)},
      "one of concat, vector, encoder, middle, decoder, text, not at 'bottom'",
    ),
    ({'enters': '', 'shape': ()}, "one of concat, vector, encoder, middle, decoder, text, not at ''"),
    ({'enters': 'concat', 'shape': (3,)}, r'A concat port cannot have shape \(3,\) with 0 classes'),
    ({'enters': 'concat', 'shape': ()}, r'A concat port cannot have shape \(\) with 0 classes'),
    ({'enters': 'vector', 'shape': (4, 4, 1)}, r'A vector port cannot have shape \(4, 4, 1\)'),
    ({'enters': 'vector', 'shape': (3,), 'level': True}, r'shape \(3,\) with 0 classes and be a level'),
    ({'enters': 'concat', 'shape': (4, 4, 1), 'level': True}, r'\(4, 4, 1\) with 0 classes and be a level'),
    ({'enters': 'vector', 'shape': (), 'classes': 3, 'level': True}, 'with 3 classes and be a level'),
    ({'enters': 'vector', 'shape': (3,), 'classes': 4}, r'cannot have shape \(3,\) with 4 classes'),
    ({'enters': 'concat', 'shape': (4, 4, 1), 'classes': 4}, r'shape \(4, 4, 1\) with 4 classes'),
  ],
)
def test_a_port_that_cannot_be_is_an_error(fields, message):
  with pytest.raises(ValueError, match=message):
    Port(**fields)


@pytest.mark.parametrize(
  ('change', 'drop', 'message'),
  [
    (lambda v: only(v, 'z'), (), r"reads the values \['low', 'z'\], got \['z'\]"),
    (lambda v: {}, (), r"reads the values \['low', 'z'\], got \[\]"),
    (lambda v: {**v, 'x': v['z']}, (), r"reads the values \['low', 'z'\], got \['low', 'x', 'z'\]"),
    (lambda v: {**v, 'z': v['z'][:, :2]}, (), r'reads z of shape \(3,\) per example, got \(2,\)'),
    (lambda v: {**v, 'z': v['z'][:, 0]}, (), r'reads z of shape \(3,\) per example, got \(\)'),
    (
      lambda v: {**v, 'low': v['low'][..., :1]},
      (),
      r'reads low of shape \(4, 4, 2\) per example, got \(4, 4, 1\)',
    ),
    (lambda v: v, ('z',), r"'z' cannot be dropped; values with a learned stand-in: \['low'\]"),
    (lambda v: v, ('label',), r"'label' cannot be dropped; values with a learned stand-in: \['low'\]"),
  ],
)
def test_values_and_drops_that_do_not_fit_are_errors(change, drop, message, x, values):
  model = toy('low', 'z', z=Port(enters='vector', shape=(3,)))
  params = init(model)
  with pytest.raises(ValueError, match=message):
    model.apply(params, x, change(only(values, 'low', 'z')), {name: jnp.ones(COUNT, bool) for name in drop})


# In the U-Net -----------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def unet():
  module = UNet(
    variant='openai',
    image_size=SIDE,
    image_channels=1,
    channels=8,
    channel_multipliers=(1,),
    num_res_blocks=1,
    attention_resolutions=(),
    num_heads=2,
    dropout=0.0,
    scale_shift_norm=False,
    remat=False,
    dtype='float32',
    ports=tuple(KINDS.items()),
  )
  state, time = (jax.ShapeDtypeStruct((1, *shape), jnp.float32) for shape in ((SIDE, SIDE, 1), ()))
  model = Model(module=module, inputs=(state, time, ports.structs(KINDS)))
  params = jax.tree.map(lambda leaf: 0.3 * leaf, randomised(jax.eval_shape(model.init, jax.random.key(0))))
  return params, jax.jit(model.apply)


T = jnp.float32([0.2, 0.5, 1.0])


def test_the_unet_has_the_parameters_of_its_ports_and_is_wider_by_their_channels(unet):
  params, _ = unet
  own = {'null_low', 'null_z', 'z_mlp', 'null_weight', 'weight', 'label_table'}
  body = {'time_mlp', 'conv_in', 'down_0', 'middle', 'up_0', 'norm_out', 'conv_out'}
  assert set(params) == own | body
  assert params['conv_in']['kernel'].shape == (3, 3, 1 + 2, 8)
  assert params['label_table']['embedding'].shape == (CLASSES + 1, 4 * 8)


@pytest.mark.parametrize('name', some_slow(KINDS, 'label'))
def test_the_unet_reads_the_null_of_a_dropped_value_bit_for_bit(name, unet, x, values):
  params, run = unet
  masks = {known: jnp.zeros(COUNT, bool) for known in KINDS}
  dropped = run(params, x, T, values, {**masks, name: jnp.ones(COUNT, bool)})
  null = run(params, x, T, {**values, **nulls_of(params, [name])}, masks)
  np.testing.assert_array_equal(dropped, null)
  assert np.abs(dropped - run(params, x, T, values, masks)).min(axis=0).max() > 1e-4


@pytest.mark.slow
def test_the_gradient_of_the_unet_reaches_every_value(unet, x, values):
  params, run = unet
  numbers = only(values, 'low', 'z', 'weight')
  total = lambda numbers: jnp.sum(jnp.square(run(params, x, T, {**values, **numbers})))
  for name, grad in jax.grad(total)(numbers).items():
    assert np.all(np.abs(np.asarray(grad)).reshape(COUNT, -1).max(axis=1) > 1e-6), name
