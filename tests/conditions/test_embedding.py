"""The vectors between a caption's and a picture's: exact at both ends, straight between, and beyond 1."""

import jax
import jax.numpy as jnp
import numpy as np

from vaediff import reads
from vaediff.conditions.embedding import EMBEDDING, ETA, Embedding
from vaediff.conditions.text import Text
from vaediff.data.words import TOKENS
from vaediff.models import told_words
from vaediff.models.text_tower import TextTower, Tower

TEXT = Text(
  length=5, vocab_size=9, dropout=0.1, stage='refiner', tower=Tower(width=8, num_layers=1, num_heads=2),
  chosen=('a ring',),
)  # fmt: skip
CAPTION = jnp.array([[2, 4, 5, 3, 0]])
ONE = Embedding(text=TEXT, workdir='runs/one', network='denoiser', dtype='float32', etas=(0.0, 0.5, 1.0))


def read():
  tower = TextTower(vocabulary=9, tower=TEXT.tower, dtype=jnp.float32)
  params = tower.init(jax.random.key(0), CAPTION)['params']
  optimised = jax.random.normal(jax.random.key(1), (6, 8))
  return {
    'denoiser': {'tokens_tower': params},
    EMBEDDING: {told_words.TOKENS: optimised},
    reads.CAPTIONS: {TOKENS: CAPTION},
  }


def test_the_ends_are_exact_and_the_way_between_is_straight():
  known, etas = read(), jnp.array([0.0, 1.0, 0.25, 1.5])
  values = jax.jit(lambda known: ONE.values(known, {ETA: etas}))(known)
  target, optimised = np.asarray(ONE.target(known)), np.asarray(known[EMBEDDING][told_words.TOKENS])
  np.testing.assert_array_equal(values[EMBEDDING][0], optimised)
  np.testing.assert_allclose(values[EMBEDDING][1], target, atol=2e-6)  # of another program
  np.testing.assert_allclose(values[EMBEDDING][2], optimised + 0.25 * (target - optimised), atol=1e-6)
  np.testing.assert_allclose(values[EMBEDDING][3], optimised + 1.5 * (target - optimised), atol=1e-5)
  np.testing.assert_array_equal(values[TOKENS], np.repeat(CAPTION, 4, axis=0))
  assert np.abs(target - optimised).max() > 0.1


def test_what_is_learned_is_the_optimised_end_alone():
  def total(known):
    return jnp.sum(ONE.values(known, {ETA: jnp.array([0.25])})[EMBEDDING])

  known = read()
  numbers = {name: known[name] for name in ('denoiser', EMBEDDING)}
  grads = jax.jit(jax.grad(lambda numbers: total({**known, **numbers})))(numbers)
  np.testing.assert_array_equal(grads[EMBEDDING][told_words.TOKENS], np.full((6, 8), 0.75))
  assert not any(leaf.any() for leaf in jax.tree.leaves(grads['denoiser']))


def test_a_picture_is_at_zero_and_samples_have_the_etas_in_turn():
  x = jnp.zeros((2, 4, 4, 1))
  np.testing.assert_array_equal(ONE.observe({}, {}, x, None)[ETA], [0, 0])
  drawn = ONE.draw({}, jax.random.split(jax.random.key(0), 4), jnp.arange(4))
  np.testing.assert_array_equal(drawn[ETA], [0, 0.5, 1, 0])
  assert ONE.num_groups == 3 and ONE.for_training().etas == (0.0,)


def test_it_takes_the_place_of_the_captions_of_another_run():
  assert ONE.name == TEXT.name and ONE.dropout == TEXT.dropout and ONE.ports == TEXT.ports
  (source,) = ONE.frozen.values()
  assert (source.workdir, source.stage) == ('runs/one', 'refiner')
  assert set(ONE.inputs) == {ETA} and ONE.model.module.shape == (6, 8)
