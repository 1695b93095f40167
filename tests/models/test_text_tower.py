"""Words in a U-Net: which of them are read, what stands in for them, latent diffusion's block, counts."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.errors import UserError
from vaediff.models import layers, ports, text_attention, text_tower
from vaediff.models.functional import Model, laid_over
from vaediff.models.ports import Port
from vaediff.models.text_tower import Tower
from vaediff.models.unet import UNet

SMALL = {
  'variant': 'openai', 'channels': 8, 'channel_multipliers': (1,), 'num_res_blocks': 1,
  'attention_resolutions': (4,), 'num_heads': 2, 'dropout': 0.0, 'scale_shift_norm': True,
}  # fmt: skip
WORDS, LENGTH = 9, 5
TOWER = Tower(width=8, num_layers=1, num_heads=2)
CAPTIONS = jnp.array([[2, 4, 5, 3, 0], [2, 6, 3, 0, 0], [2, 7, 8, 5, 3]])


def port(how='attention', **changes):
  fields = {'shape': (LENGTH,), 'classes': WORDS, 'tower': TOWER, 'droppable': True, **changes}
  return Port(enters='text', how=how, **fields)


def build(*named, **changes):
  state = jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32)
  module = UNet(
    **{'remat': False, 'dtype': 'float32', **SMALL, **changes}, image_size=4, image_channels=1,
    ports=tuple(named),
  )  # fmt: skip
  inputs = (state, jax.ShapeDtypeStruct((1,), jnp.float32), ports.structs(dict(named)))
  return Model(module=module, inputs=inputs)


def random_of(model, seed=0):
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return jax.tree.map(lambda leaf: jnp.float32(0.3 * rng.normal(size=leaf.shape)), shapes)


def images(count=3):
  return jax.random.normal(jax.random.key(1), (count, 4, 4, 1)), jnp.full(count, 0.4)


@functools.cache
def made(how='attention'):
  """A network with random parameters, as if it had been trained, and its compiled forward pass."""
  model = build(('tokens', port(how)))
  x, t = images()

  @jax.jit
  def run(params, tokens, dropped):
    return model.apply(params, x, t, {'tokens': tokens}, {'tokens': dropped})

  return random_of(model), lambda params, tokens, dropped=(0, 0, 0): run(params, tokens, jnp.bool_(dropped))


WAYS = [pytest.param('attention'), pytest.param('transformer', marks=pytest.mark.slow)]


@pytest.mark.parametrize('how', WAYS)
def test_padding_is_read_nowhere(how):
  """Whatever stands in the table for padding: weights of 0 are exactly 0."""
  params, run = made(how)
  table = params['tokens_tower']['words']['embedding']

  def with_row(number):
    words = {'embedding': table.at[number].multiply(-2.0)}
    return {**params, 'tokens_tower': {**params['tokens_tower'], 'words': words}}

  known = run(params, CAPTIONS)
  np.testing.assert_array_equal(run(with_row(text_tower.PAD), CAPTIONS), known)
  changed = np.abs(run(with_row(6), CAPTIONS) - known).max(axis=(1, 2, 3))
  assert changed[1] > 1e-4 and changed[0] == changed[2] == 0


@pytest.mark.parametrize('how', WAYS)
def test_a_dropped_caption_is_one_of_no_words_bit_for_bit(how):
  params, run = made(how)
  known = run(params, CAPTIONS)
  dropped = run(params, CAPTIONS, (1, 0, 1))
  null = run(params, jnp.zeros_like(CAPTIONS))
  np.testing.assert_array_equal(dropped[np.array([0, 2])], null[np.array([0, 2])])
  np.testing.assert_array_equal(dropped[1], known[1])
  assert np.abs(dropped - known).max() > 1e-3 and np.all(np.isfinite(null))


def test_an_image_reads_its_own_caption_in_its_order():
  params, run = made()
  known = run(params, CAPTIONS)
  other = run(params, CAPTIONS.at[1].set(CAPTIONS[2]))
  np.testing.assert_array_equal(np.delete(known, 1, 0), np.delete(other, 1, 0))
  assert np.abs(known[1] - other[1]).max() > 1e-3
  turned = run(params, CAPTIONS.at[0, 1:3].set(jnp.array([5, 4])))
  assert np.abs(known[0] - turned[0]).max() > 1e-4
  np.testing.assert_array_equal(known[1:], turned[1:])


@pytest.mark.slow
def test_a_trained_network_that_is_given_words_is_the_same_at_first():
  plain = build()
  trained, (x, t) = random_of(plain), images()
  fresh = jax.jit(build(('tokens', port())).init)(jax.random.key(0))
  both = laid_over(fresh, trained)
  _, run = made()
  np.testing.assert_array_equal(run(both, CAPTIONS), jax.jit(plain.apply)(trained, x, t))
  np.testing.assert_array_equal(both['tokens_tower']['place'], fresh['tokens_tower']['place'])
  with pytest.raises(ValueError, match=r'conv_in/kernel: \(3, 3, 1, 9\) there, \(3, 3, 1, 8\) here'):
    laid_over(fresh, {'conv_in': {'kernel': jnp.zeros((3, 3, 1, 9))}})
  with pytest.raises(ValueError, match='conv_up: it is not here'):
    laid_over(fresh, {'conv_up': jnp.zeros(3)})


@pytest.mark.slow
def test_the_gradient_reaches_the_words_that_are_read():
  model, (params, _), (x, t) = build(('tokens', port())), made(), images()

  def loss(params):
    drop = {'tokens': jnp.bool_([0, 0, 1])}
    return jnp.square(model.apply(params, x, t, {'tokens': CAPTIONS}, drop)).sum()

  tower = jax.jit(jax.grad(loss))(params)['tokens_tower']
  reached = np.flatnonzero(np.abs(tower['words']['embedding']).max(axis=1))
  assert reached.tolist() == [2, 3, 4, 5, 6]
  assert np.abs(tower['null']).max() > 0
  assert np.flatnonzero(np.abs(tower['place']).max(axis=1)).tolist() == [0, 1, 2, 3, 4]


def test_the_sum_is_of_what_is_read():
  tokens = jnp.arange(12.0).reshape(1, 4, 3)
  words = text_tower.Words(tokens, jnp.bool_([[1, 0, 1, 0]]))
  np.testing.assert_allclose(text_tower.pooled(words), np.array([[6.0, 8.0, 10.0]]) / np.sqrt(2), rtol=1e-6)


@pytest.mark.slow
def test_memory_saving_and_bfloat16_compute_the_same():
  x, t = images()
  for how in text_attention.WAYS:
    params, run = made(how)
    known, read = run(params, CAPTIONS), {'tokens': CAPTIONS}
    remat = jax.jit(build(('tokens', port(how)), remat=True).apply)(params, x, t, read)
    np.testing.assert_allclose(remat, known, atol=1e-5)
    short = jax.jit(build(('tokens', port(how)), dtype='bfloat16').apply)(params, x, t, read)
    assert short.dtype == jnp.float32
    assert np.abs(short - known).max() < 0.1 * np.abs(known).max()


# Latent diffusion's block ---------------------------------------------------------------------------


def count(shapes):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(('channels', 'width'), [(320, 768), (64, 32)])
def test_parameters_of_the_blocks_are_the_published_ones(channels, width):
  shapes = [(1, 2, 2, channels), (1, 3, width)]
  args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes] + [jax.ShapeDtypeStruct((1, 3), bool)]
  block = text_attention.SpatialTransformer(heads=8, dtype=jnp.float32)
  found = count(jax.eval_shape(block.init, jax.random.key(0), *args))
  assert found == 20 * channels**2 + 2 * width * channels + 21 * channels
  assert channels != 320 or found == 2_546_240
  own = text_attention.TextAttention(heads=8, norm_epsilon=1e-5, dtype=jnp.float32)
  found = count(jax.eval_shape(own.init, jax.random.key(0), *args))
  assert found == 2 * channels**2 + 2 * width * channels + 6 * channels


def reference(p, x, tokens, allowed, heads):
  """The block of latent diffusion for one example, x [positions, channels], by NumPy alone."""
  channels = x.shape[-1]

  def linear(layer, x):
    return x @ layer['kernel'] + layer.get('bias', 0)

  def norm(layer, x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * layer[
      'scale'
    ] + layer['bias']

  def attention(p, x, source, seen):
    size, out = channels // heads, []
    query, key, value = linear(p['query'], x), linear(p['key'], source), linear(p['value'], source)
    for head in range(heads):
      own = slice(head * size, (head + 1) * size)
      weights = np.exp(query[:, own] @ key[:, own].T / np.sqrt(size)) * seen
      out.append(weights / weights.sum(-1, keepdims=True) @ value[:, own])
    return linear(p['out'], np.concatenate(out, -1))

  def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2

  groups = layers.num_groups(channels)
  g = x.reshape(len(x), groups, -1)
  g = (g - g.mean((0, 2), keepdims=True)) / np.sqrt(g.var((0, 2), keepdims=True) + 1e-6)
  h = linear(p['proj_in'], g.reshape(x.shape) * p['norm']['scale'] + p['norm']['bias'])
  normed = norm(p['norm_self'], h)
  h = h + attention(p['self'], normed, normed, np.ones(len(x)))
  h = h + attention(p['cross'], norm(p['norm_cross'], h), tokens, allowed)
  value, gate = np.split(linear(p['mlp_in'], norm(p['norm_mlp'], h)), 2, axis=-1)
  return x + linear(p['proj_out'], h + linear(p['mlp_out'], value * gelu(gate)))


def test_latent_diffusions_block_is_what_its_paper_says():
  block = text_attention.SpatialTransformer(heads=2, dtype=jnp.float32)
  rng = np.random.default_rng(0)
  x, tokens = rng.normal(size=(2, 2, 3, 8)), rng.normal(size=(2, 4, 6))
  allowed = np.array([[1, 1, 0, 1], [1, 0, 0, 0]], bool)
  args = (jnp.float32(x), jnp.float32(tokens), jnp.asarray(allowed))
  params = jax.eval_shape(block.init, jax.random.key(0), *args)['params']
  params = jax.tree.map(lambda leaf: 0.5 * rng.normal(size=leaf.shape), params)
  got = jax.jit(block.apply)({'params': jax.tree.map(jnp.float32, params)}, *args)
  for row in range(2):
    wanted = reference(params, x[row].reshape(6, 8), tokens[row], allowed[row], 2)
    np.testing.assert_allclose(got[row].reshape(6, 8), wanted, atol=2e-4)


# Words that are vectors -----------------------------------------------------------------------------


@pytest.mark.slow
def test_vectors_in_place_of_ids_have_a_null_of_their_own():
  vectors = jax.random.normal(jax.random.key(3), (2, 3, 6))
  model = build(('tokens', Port(enters='text', how='attention', shape=(3, 6), droppable=True)))
  params, (x, t) = random_of(model), images(2)
  assert params['null_tokens'].shape == (6,) and 'tokens_tower' not in params
  run = jax.jit(lambda vectors, drop: model.apply(params, x, t, {'tokens': vectors}, {'tokens': drop}))
  dropped = run(vectors, jnp.bool_([1, 0]))
  np.testing.assert_array_equal(dropped[0], run(vectors + 1, jnp.bool_([1, 1]))[0])
  kept = run(vectors, jnp.bool_([0, 0]))
  np.testing.assert_array_equal(dropped[1], kept[1])
  assert np.abs(dropped[0] - kept[0]).max() > 1e-3


@pytest.mark.parametrize(
  'fields',
  [
    {'shape': (5,)},  # ids of no vocabulary
    {'shape': (5,), 'classes': 9},  # ids without a tower
    {'shape': (5, 4), 'classes': 9, 'tower': TOWER},
    {'shape': (5, 4), 'tower': TOWER},
    {'shape': (5,), 'classes': 9, 'tower': TOWER, 'how': 'concat'},
  ],
)
def test_texts_are_ids_with_a_tower_or_vectors(fields):
  with pytest.raises(ValueError, match='A text port cannot'):
    Port(enters='text', **{'how': 'attention', **fields})


def test_one_text_alone_takes_the_place_of_attention():
  with pytest.raises(UserError, match=r"one and two have how = 'transformer'.*'attention' for the others"):
    build(('one', port('transformer')), ('two', port('transformer')))
