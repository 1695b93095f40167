"""The transformer of a prior of vectors: who sees whom, what a dropped caption is, its published size."""

import as_trained
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import presets
from vaediff.errors import UserError
from vaediff.machine import cost
from vaediff.models import embedding_prior
from vaediff.models.functional import Model
from vaediff.models.transformer_blocks import Block

SIZE, WORDS, WIDTH = 4, 5, 6
NAMES = ('words', 'read', 'caption')


def build(size=SIZE, words=WORDS, inputs=WIDTH, **fields):
  fields = {'width': 8, 'num_layers': 2, 'num_heads': 2, **fields}
  struct = lambda *shape: jax.ShapeDtypeStruct((1, *shape), jnp.float32)
  values = {'words': struct(words, inputs), 'read': struct(words), 'caption': struct(size)}
  module = embedding_prior.EmbeddingPrior(size=size, texts=NAMES, **fields)
  return Model(module=module, inputs=(struct(size), struct(), values))


def random(shape, seed):
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(scope='module')
def network():
  """The network with parameters of which none is zero, and what it reads; the third has no words."""
  model = build()
  params = as_trained.params_of(model.init, deviation=0.3)
  values = {
    'words': random((3, WORDS, WIDTH), 2), 'caption': random((3, SIZE), 3),
    'read': jnp.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], jnp.float32),
  }  # fmt: skip
  return model, params, values, random((3, SIZE), 4), jnp.array([0.2, 0.5, 0.9])


@pytest.mark.slow
def test_the_query_sees_all_that_is_read(network):
  model, params, values, y, t = network

  @jax.jit
  def reach(values, y, t):
    """Returns how much each row of the output changes with each input of the same row."""
    out = lambda values, y, t: jnp.sum(model.apply(params, y, t, values)[:2] ** 2)
    return jax.grad(out, argnums=(0, 1, 2))(values, y, t)

  of_values, of_y, of_t = reach(values, y, t)
  moved = np.abs(of_values['words'][:2]).max(axis=2)
  assert (moved[np.array(values['read'][:2]) > 0] > 1e-6).all() and (moved[0, 3:] == 0).all()
  assert (np.abs(of_values['caption'][:2]).max(axis=1) > 1e-6).all()
  assert (np.abs(of_y[:2]).max(axis=1) > 1e-6).all() and (np.abs(of_t[:2]) > 1e-6).all()
  assert (np.abs(of_y[2]) == 0).all()  # row i is of row i alone


def test_no_token_sees_what_stands_behind_it(network):
  """By gradients of what the last block makes of each token: words, caption, time, image, query."""
  model, params, values, y, t = network

  @jax.jit
  def tokens(words, caption, t, y):
    seen = {**values, 'words': words, 'caption': caption}
    _, kept = model.module.apply(
      {'params': params}, y, t, seen, capture_intermediates=lambda module, name: isinstance(module, Block)
    )
    return kept['intermediates']['block_1']['__call__'][0][0][1]  # of the second example

  inputs = (values['words'], values['caption'], t, y)
  of_words, of_caption, of_t, of_y = (
    np.abs(x[:, :, 1]).max(axis=1) for x in jax.jit(jax.jacobian(tokens, argnums=(0, 1, 2, 3)))(*inputs)
  )
  of_words = of_words.max(axis=2)  # [tokens, words]
  whole = np.tril(np.ones((WORDS + 4, WORDS + 4), bool))
  np.testing.assert_array_equal(of_words > 1e-7, whole[:, :WORDS])
  for moved, place in ((of_caption.max(axis=1), 0), (of_t, 1), (of_y.max(axis=1), 2)):
    np.testing.assert_array_equal(moved > 1e-7, whole[:, WORDS + place])


@pytest.mark.slow
def test_a_dropped_caption_is_one_of_no_words(network):
  model, params, values, y, t = network
  run = jax.jit(lambda values, drop: model.apply(params, y, t, values, drop))
  known = run(values, {})
  empty = {**values, 'read': jnp.zeros_like(values['read'])}
  mask = jnp.array([True, False, False])
  for name in NAMES:
    dropped = run(values, {name: mask})
    np.testing.assert_array_equal(dropped[0], run(empty, {})[0])
    np.testing.assert_array_equal(dropped[1:], known[1:])
    assert np.abs(dropped[0] - known[0]).max() > 1e-3
  other = {**empty, 'words': values['words'] + 1, 'caption': values['caption'] + 1}
  np.testing.assert_array_equal(run(other, {}), run(empty, {}))


@pytest.mark.slow
def test_the_published_sizes():
  fields = presets.EMBEDDING_PRIOR
  params = jax.eval_shape(build(768, 77, 768, **fields['20x2048']).init, jax.random.key(0))
  assert cost.num_parameters(params) == 1_022_029_312  # 1,022 M
  params = jax.eval_shape(build(1024, 77, 1024, **fields['dalle2']).init, jax.random.key(0))
  assert cost.num_parameters(params['block_0']) == 12 * 2048**2 + 13 * 2048


def test_widths_that_do_not_fit_are_refused():
  with pytest.raises(UserError, match='model.num_heads is 3, which does not divide model.width 8'):
    build(num_heads=3)
  with pytest.raises(UserError, match='model.width must be even'):
    build(width=7, num_heads=1)
