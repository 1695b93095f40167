"""Vectors in the place of those of a network's tower: the same ones change nothing, and the null stays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.models import ports, told_words
from vaediff.models.functional import Model
from vaediff.models.ports import Port
from vaediff.models.text_tower import Tower
from vaediff.models.unet import UNet

LENGTH = 5
PORT = Port(
  enters='text', how='attention', shape=(LENGTH,), classes=9, droppable=True,
  tower=Tower(width=8, num_layers=1, num_heads=2),
)
CAPTIONS = jnp.array([[2, 4, 5, 3, 0], [2, 6, 3, 0, 0], [2, 7, 8, 5, 3]])


@functools.cache
def network():
  """A U-Net with random parameters, and (vectors or None, dropped or None) -> its output."""
  state = jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32)
  module = UNet(
    variant='openai', image_size=4, image_channels=1, channels=8, channel_multipliers=(1,), num_res_blocks=1,
    attention_resolutions=(4,), num_heads=2, dropout=0.0, scale_shift_norm=True, remat=False, dtype='float32',
    ports=(('tokens', PORT),),
  )  # fmt: skip
  inputs = (state, jax.ShapeDtypeStruct((1,), jnp.float32), ports.structs({'tokens': PORT}))
  model, rng = Model(module=module, inputs=inputs), np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  params = jax.tree.map(lambda leaf: jnp.float32(0.3 * rng.normal(size=leaf.shape)), shapes)
  x, t = jax.random.normal(jax.random.key(1), (3, 4, 4, 1)), jnp.full(3, 0.4)

  @jax.jit
  def trained(dropped):
    return model.apply(params, x, t, {'tokens': CAPTIONS}, {'tokens': dropped})

  @jax.jit
  def told(vectors, dropped):
    with told_words.given(vectors):
      return model.apply(params, x, t, {'tokens': CAPTIONS}, {'tokens': dropped})

  return params, trained, told


@jax.jit
def own_vectors(params):
  return told_words.of_words(params, 'tokens', PORT, 'float32', CAPTIONS)


@pytest.mark.slow
def test_the_tower_s_own_vectors_change_nothing():
  params, trained, told = network()
  own = own_vectors(params)
  assert own.shape == (3, LENGTH + 1, 8) == (3, *told_words.vectors(PORT).module.shape)
  for dropped in (jnp.zeros(3, bool), jnp.array([False, True, False])):
    np.testing.assert_allclose(told(own, dropped), trained(dropped), rtol=0, atol=2e-6)


def test_other_vectors_are_read_where_nothing_is_dropped_and_the_caption_has_words():
  params, trained, told = network()
  own = own_vectors(params)
  none, one = jnp.zeros(3, bool), jnp.array([False, True, False])
  moved = np.abs(told(own + 1.0, none) - trained(none)).max(axis=(1, 2, 3))
  assert moved.min() > 1e-3
  np.testing.assert_array_equal(told(own + 1.0, one)[1], told(own, one)[1])  # the null stays the null
  padding = own.at[1, 4:].add(9.0)  # the null's vector and three words are before it
  np.testing.assert_array_equal(told(padding, none), told(own, none))
  moved = np.abs(told(own.at[1, 3].add(1.0), none) - told(own, none)).max(axis=(1, 2, 3))
  assert moved[1] > 1e-3 and moved[0] == moved[2] == 0


def test_vectors_are_a_network_of_their_own():
  model = told_words.vectors(PORT)
  params = model.init(jax.random.key(0))
  assert set(params) == {told_words.TOKENS}
  np.testing.assert_array_equal(model.apply({told_words.TOKENS: params['tokens'] + 2}), np.full((6, 8), 2.0))
