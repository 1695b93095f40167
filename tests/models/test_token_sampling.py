"""Golden tables of guidance, temperature, top-k and top-p; draws of their own key and number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.models import token_sampling
from vaediff.models.token_sampling import Rule, limited

LOGITS = jnp.asarray([[2.0, 1, 1, 0, -1]])


def kept(rule, legal=None):
  return np.flatnonzero(np.isfinite(limited(LOGITS, rule, legal)[0])).tolist()


def test_probabilities():
  np.testing.assert_allclose(
    jax.nn.softmax(limited(LOGITS, Rule()))[0], [0.520594, 0.191516, 0.191516, 0.070455, 0.025919], atol=1e-6
  )


@pytest.mark.parametrize(
  ('rule', 'wanted'),
  [
    (Rule(), [0, 1, 2, 3, 4]),
    (Rule(top_k=1), [0]),
    (Rule(top_k=2), [0, 1, 2]),  # ties stay
    (Rule(top_k=3), [0, 1, 2]),
    (Rule(top_k=5), [0, 1, 2, 3, 4]),
    (Rule(top_p=0.52), [0]),
    (Rule(top_p=1e-6), [0]),
    (Rule(top_p=0.7), [0, 1]),
    (Rule(top_p=0.75), [0, 1, 2]),
    (Rule(top_k=2, top_p=0.5), [0]),
    (Rule(top_k=2, top_p=0.6), [0, 1]),  # of what top-k leaves: .576 .212 .212
    (Rule(temperature=0), [0]),
    (Rule(temperature=1e-2, top_p=0.9), [0]),
  ],
)
def test_what_is_kept(rule, wanted):
  assert kept(rule) == wanted


def test_what_is_illegal_is_never_drawn_and_counts_for_nothing():
  legal = jnp.asarray([False, True, True, True, True])
  assert kept(Rule(temperature=0), legal) == [1]
  assert kept(Rule(top_k=1), legal) == [1, 2]
  assert kept(Rule(top_p=0.3), legal) == [1]
  assert kept(Rule(), legal) == [1, 2, 3, 4]


def test_temperature_comes_before_top_p():
  """At temperature 2 the first has .362: at .4 it is not enough."""
  assert kept(Rule(top_p=0.4)) == [0]
  assert kept(Rule(top_p=0.4, temperature=2.0)) == [0, 1]


def test_order_does_not_matter_to_top_p():
  shuffled = LOGITS[:, jnp.asarray([4, 1, 0, 3, 2])]
  assert np.isfinite(limited(shuffled, Rule(top_p=0.7))[0]).tolist() == [False, True, True, False, False]


def test_guidance():
  l_c, l_u = jnp.asarray([1.0, 0, -1]), jnp.asarray([0.5, 0.5, -1])
  np.testing.assert_allclose(token_sampling.guided(l_c, l_u, 1.0), [1.5, -0.5, -1])
  np.testing.assert_array_equal(token_sampling.guided(l_c, l_u, 0.0), l_c)


def test_draws_follow_the_probabilities_and_their_own_key():
  keys = jax.random.split(jax.random.key(0), 4000)
  logits = jnp.broadcast_to(LOGITS, (4000, 5))
  drawn = token_sampling.categorical(keys, jnp.int32(2), logits)
  share = np.bincount(drawn, minlength=5) / 4000
  np.testing.assert_allclose(share, jax.nn.softmax(LOGITS[0]), atol=0.03)
  alone = token_sampling.categorical(keys[7:8], jnp.int32(2), logits[:1])
  assert alone[0] == drawn[7]
  assert np.mean(np.asarray(token_sampling.categorical(keys, jnp.int32(3), logits) == drawn)) < 0.6


def test_pairs_are_beside_each_other():
  np.testing.assert_array_equal(token_sampling.paired(jnp.asarray([1, 2]), jnp.asarray([7, 8])), [1, 7, 2, 8])
