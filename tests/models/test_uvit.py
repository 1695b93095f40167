import jax
import jax.numpy as jnp
import numpy as np
import pytest
from some_slow import some_slow

from vaediff.errors import UserError
from vaediff.machine import cost
from vaediff.models.functional import Model
from vaediff.models.uvit import SIZES, Block, BlockOptions, ModulatedLayerNorm, UVit

TINY = {
  'patch_size': 2,
  'dim': 16,
  'depth': 2,
  'num_heads': 2,
  'mlp_ratio': 2.0,
  'latent_dim': 5,
  'num_mapping_layers': 1,
  'out_channels': 3,
  'bounded': True,
  'remat': False,
  'dtype': 'float32',
  'mapping_dim': 8,
}


def build(size: int = 8, channels: int = 3, condition: int = 0, **changes) -> Model:
  module = UVit(**{**TINY, **changes})
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
  inputs = (shape(1, size, size, channels), shape(1), shape(1, module.latent_dim))
  return Model(module=module, inputs=(*inputs, shape(1, size, size, condition) if condition else None))


def shapes(model: Model):
  return jax.eval_shape(model.init, jax.random.key(0))


def random_params(model: Model, rng):
  # Not the module's own initialisation, under which z has no effect.
  return jax.tree.map(lambda leaf: jnp.float32(0.2 * rng.normal(size=leaf.shape)), shapes(model))


def random_inputs(rng):
  return (
    jnp.float32(rng.normal(size=(2, 8, 8, 3))),
    jnp.float32([0.0, 3.0]),
    jnp.float32(rng.normal(size=(2, 5))),
  )


@pytest.fixture
def rng():
  return np.random.default_rng(0)


@pytest.mark.parametrize(
  ('name', 'published_millions', 'parameters', 'gmacs'),
  some_slow(
    [('tiny', 19.4, 18_695_908, 0.98), ('mid', 34.7, 34_321_252, 1.90), ('large', 47.5, 46_611_684, 2.60)],
    'tiny',
  ),
)
def test_sizes_are_near_the_published_ones(name, published_millions, parameters, gmacs):
  fields = {'mlp_ratio': 4.0, 'latent_dim': 50, 'num_mapping_layers': 4, 'out_channels': 4}
  model = build(16, 4, **{**fields, 'mapping_dim': 256, **SIZES[name]})
  params = shapes(model)
  assert cost.num_parameters(params) == parameters
  assert abs(parameters / 1e6 / published_millions - 1) < 0.05
  assert round(cost.macs(model.apply, params, *model.inputs) / 1e9, 2) == gmacs


def test_parameters_are_plain_dicts_with_stable_names():
  params = shapes(build(depth=4, remat=True))
  assert type(params) is dict
  assert set(params) == {
    'mapping', 'patches', 'time_mlp', 'position', 'in_0', 'in_1', 'middle', 'out_0', 'out_1', 'norm_out',
    'pixels', 'conv_out',
  }  # fmt: skip
  block = {'norm_1', 'qkv', 'out', 'norm_2', 'mlp_0', 'mlp_1'}
  assert set(params['in_1']) == set(params['middle']) == block
  assert set(params['out_0']) == block | {'join'}
  assert params['position'].shape == (1 + 16, 16)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}


@pytest.mark.parametrize(('patch_size', 'out_channels', 'condition'), [(1, 3, 0), (2, 4, 2), (4, 1, 0)])
def test_shapes_and_types(patch_size, out_channels, condition):
  model = build(8, patch_size=patch_size, out_channels=out_channels, condition=condition)
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
  inputs = shape(3, 8, 8, 3), jax.ShapeDtypeStruct((3,), jnp.int32), shape(3, 5)
  image = shape(3, 8, 8, condition) if condition else None
  x0_hat = jax.eval_shape(model.apply, shapes(model), *inputs, image)
  assert x0_hat.shape == (3, 8, 8, out_channels) and x0_hat.dtype == jnp.float32


def test_modulations_are_the_identity_at_initialisation(key, rng):
  x, style = jnp.float32(rng.normal(2.0, 3.0, size=(2, 4, 16))), jnp.float32(rng.normal(size=(2, 8)))
  norm = ModulatedLayerNorm()
  variables = norm.init(key, x, style)
  double = np.asarray(x, np.float64)
  expected = (double - double.mean(-1, keepdims=True)) / double.std(-1, keepdims=True)
  np.testing.assert_allclose(norm.apply(variables, x, style), expected, atol=1e-5)

  # And linear in the style once they are not.
  kernel, bias = rng.normal(size=(8, 32)), rng.normal(size=32)
  gain, shift = np.split((np.asarray(style) @ kernel + bias)[:, None], 2, axis=-1)
  params = {'modulation': {'kernel': jnp.float32(kernel), 'bias': jnp.float32(bias)}}
  actual = norm.apply({'params': params}, x, style)
  np.testing.assert_allclose(actual, (1 + gain) * expected + shift, atol=1e-4)


def test_block_is_the_formula(rng):
  options = BlockOptions(num_heads=2, mlp_ratio=2.0, remat=False, dtype=jnp.float32)
  x, style, skip = (jnp.float32(rng.normal(size=s)) for s in ((2, 3, 4), (2, 8), (2, 3, 4)))
  block = Block(options=options)
  shape = jax.eval_shape(lambda: block.init(jax.random.key(0), x, style, skip))['params']
  params = jax.tree.map(lambda leaf: jnp.float32(0.5 * rng.normal(size=leaf.shape)), shape)
  actual = block.apply({'params': params}, x, style, skip)

  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  linear = lambda name, h: h @ p[name]['kernel'] + p[name].get('bias', 0.0)

  def norm(name, h):
    q = p[name]['modulation']
    gain, bias = np.split((np.asarray(style) @ q['kernel'] + q['bias'])[:, None], 2, axis=-1)
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
    return (1 + gain) * h + bias

  h = linear('join', np.concatenate([x, skip], axis=-1))
  query, key, value = np.split(linear('qkv', norm('norm_1', h)), 3, axis=-1)
  heads = []
  for part in (slice(0, 2), slice(2, 4)):
    logits = query[..., part] @ key[..., part].swapaxes(1, 2) / np.sqrt(2)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    heads.append(weights @ value[..., part])
  h = h + linear('out', np.concatenate(heads, axis=-1))
  hidden = np.asarray(jax.nn.gelu(jnp.float32(linear('mlp_0', norm('norm_2', h)))), np.float64)
  np.testing.assert_allclose(actual, h + linear('mlp_1', hidden), atol=1e-4)


def test_output_depends_on_every_input(rng):
  model = build(condition=2)
  params, (x_t, t, z) = random_params(model, rng), random_inputs(rng)
  condition = jnp.float32(rng.normal(size=(2, 8, 8, 2)))
  run = jax.jit(model.apply)
  x0_hat = run(params, x_t, t, z, condition)
  assert 0.1 < np.abs(x0_hat).max() < 1.0
  for changed in (
    (x_t + 1.0, t, z, condition),
    (x_t, t + 1.0, z, condition),
    (x_t, t, -z, condition),
    (x_t, t, z, condition + 1.0),
  ):
    assert np.abs(run(params, *changed) - x0_hat).max() > 1e-3
  # Pixel norm: only the direction of z matters.
  np.testing.assert_allclose(run(params, x_t, t, 3.0 * z, condition), x0_hat, atol=1e-4)
  unbounded = build(condition=2, bounded=False)
  np.testing.assert_allclose(
    np.tanh(jax.jit(unbounded.apply)(params, x_t, t, z, condition)), x0_hat, atol=1e-5
  )


def test_the_second_half_reads_the_first_in_reverse(rng):
  model = build(depth=4)
  params, inputs = random_params(model, rng), random_inputs(rng)
  dim, run = TINY['dim'], jax.jit(model.apply)

  def matters(block, only_skip_of):
    """Whether the output depends on the block when one `join` reads its skip alone and the others none."""

    def output(bias):
      p = jax.tree.map(lambda leaf: leaf, params)
      for name in ('out_0', 'out_1'):
        closed = slice(0, dim) if name == only_skip_of else slice(dim, 2 * dim)
        p[name]['join']['kernel'] = p[name]['join']['kernel'].at[closed].set(0.0)
      p[block]['out']['bias'] = p[block]['out']['bias'] + bias
      return run(p, *inputs)

    change = jnp.linspace(-1.0, 1.0, dim)
    return bool(np.abs(output(change) - output(0.0)).max() > 1e-3)

  # The last block reads in_0, which ran before in_1; the one before it reads in_1.
  blocks = ('in_0', 'in_1', 'middle')
  assert [matters(block, 'out_1') for block in blocks] == [True, False, False]
  assert [matters(block, 'out_0') for block in blocks] == [True, True, False]


@pytest.mark.slow
def test_remat_and_bfloat16_are_the_same_network(rng):
  exact, remat, rough = build(), build(remat=True), build(dtype='bfloat16')
  params, inputs = random_params(exact, rng), random_inputs(rng)
  assert shapes(exact) == shapes(remat) == shapes(rough)
  x0_hat = jax.jit(exact.apply)(params, *inputs)
  np.testing.assert_allclose(jax.jit(remat.apply)(params, *inputs), x0_hat, atol=1e-5)
  near = jax.jit(rough.apply)(params, *inputs)
  assert near.dtype == jnp.float32
  assert 0.0 < np.abs(near - x0_hat).max() < 0.1 * np.abs(x0_hat).max()
  primitives = str(jax.make_jaxpr(jax.grad(lambda p: remat.apply(p, *inputs).sum()))(params))
  assert 'checkpoint' in primitives or 'remat' in primitives


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'patch_size': 0}, 'model.patch_size is 0; it must be at least 1'),
    ({'dim': 15}, 'model.dim is 15; it must be even and at least 4'),
    ({'depth': 3}, 'model.depth is 3; it must be even'),
    ({'num_heads': 3}, 'model.num_heads is 3, which does not divide model.dim 16'),
    ({'num_heads': 0}, 'model.num_heads is 0; it must be at least 1'),
    ({'mlp_ratio': 0.0}, 'model.mlp_ratio is 0.0'),
    ({'latent_dim': 0}, 'model.latent_dim is 0; it must be at least 1'),
    ({'num_mapping_layers': -1}, 'model.num_mapping_layers is -1; it must be at least 0'),
    ({'out_channels': 0}, 'model.out_channels is 0; it must be at least 1'),
    ({'dtype': 'float16'}, "model.dtype is 'float16'"),
  ],
)
def test_mistakes_are_user_errors(changes, message):
  with pytest.raises(UserError, match=message):
    UVit(**{**TINY, **changes})


@pytest.mark.parametrize(
  ('x_t', 'z', 'condition', 'message'),
  [
    ((1, 7, 8, 3), (1, 5), None, 'x_t is 7 x 8, which model.patch_size 2 does not divide'),
    ((1, 8, 8, 3), (1, 6), None, 'z has 6 numbers, but model.latent_dim is 5'),
  ],
)
def test_inputs_that_do_not_fit_are_user_errors(x_t, z, condition, message):
  with pytest.raises(UserError, match=message):
    UVit(**TINY).init(jax.random.key(0), jnp.zeros(x_t), jnp.zeros(1), jnp.zeros(z), condition)
