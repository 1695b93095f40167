"""Losses of pairs: known values, equal captions, rows that are not there."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.experiments import contrastive

IMAGES = jnp.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
TEXTS = jnp.array([[0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])
OWN, ALL = jnp.eye(3, dtype=bool), jnp.ones(3, bool)


@pytest.mark.parametrize(
  ('loss', 'scale', 'bias', 'value'),
  [
    (contrastive.symmetric, 1 / 0.07, 0.0, 0.516871),
    (contrastive.symmetric, 1.0, 0.0, 0.923897),
    (contrastive.sigmoid, 10.0, -10.0, 1.438813),
  ],
)
def test_known_values(loss, scale, bias, value):
  logits = scale * IMAGES @ TEXTS.T + bias
  assert float(loss(logits, OWN, ALL).mean()) == pytest.approx(value, abs=2e-6)


def test_equal_captions():
  tokens = jnp.array([[2, 4, 3], [2, 4, 3], [2, 5, 3]])
  right = contrastive.same_captions(tokens)
  np.testing.assert_array_equal(right, [[1, 1, 0], [1, 1, 0], [0, 0, 1]])
  texts = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
  logits = 3 * IMAGES @ texts.T
  both, alone = (contrastive.symmetric(logits, one, ALL) for one in (right, OWN))
  assert float(both.mean()) == pytest.approx(float(alone.mean()), rel=1e-6)  # of equal texts, on average
  least = contrastive.floor(right, ALL)
  np.testing.assert_allclose(least, [math.log(2), math.log(2), 0], rtol=1e-6)
  np.testing.assert_allclose(contrastive.symmetric(100.0 * texts @ texts.T, right, ALL), least, atol=1e-5)
  # the sigmoids can say of both that they are right
  perfect = 40.0 * texts @ texts.T - 20.0
  assert float(contrastive.sigmoid(perfect, right, ALL).max()) < 1e-6
  assert float(contrastive.sigmoid(perfect, OWN, ALL).max()) > 19


def test_rows_that_are_not_there_change_nothing():
  logits = 5 * IMAGES @ TEXTS.T
  real = jnp.array([True, True, False])
  for loss in contrastive.BY_NAME.values():
    whole = loss(logits, OWN, real)
    assert np.isfinite(whole).all()
    np.testing.assert_allclose(whole[:2], loss(logits[:2, :2], OWN[:2, :2], ALL[:2]), rtol=1e-6)
  np.testing.assert_array_equal(contrastive.first_is_right(IMAGES @ TEXTS.T, OWN, real), [1, 1, 0])


def test_vectors_that_are_all_the_same_have_the_logarithm_of_the_batch():
  for right in (OWN, contrastive.same_captions(jnp.array([[1], [1], [2]]))):
    np.testing.assert_allclose(
      contrastive.symmetric(jnp.full((3, 3), 7.0), right, ALL), math.log(3), rtol=1e-6
    )
