"""Tables of counts of ids: nats per token that can be worked out by hand."""

import math

import numpy as np
import pytest

from vaediff.evaluation import id_counts
from vaediff.evaluation.id_counts import TABLES, of_images, of_tables

UNIGRAM, POSITION, BIGRAM, OF_CLASS = TABLES


def nats(hits, total, size):
  return -math.log((hits + 0.1) / (total + 0.1 * size))


def test_each_table_by_hand():
  """Two images of 1x2 ids, of class 0 and 1: (0, 1) and (0, 2); held out (0, 1) of class 1."""
  train = np.array([[[0, 1]], [[0, 2]]], np.int32)
  found = of_tables(train, np.array([0, 1]), np.array([[[0, 1]]], np.int32), np.array([1]), 2, 5)
  assert list(found) == list(TABLES)
  wanted = {
    UNIGRAM: [nats(2, 4, 5), nats(1, 4, 5)],
    POSITION: [nats(2, 2, 5), nats(1, 2, 5)],
    BIGRAM: [nats(2, 2, 5), nats(1, 2, 5)],  # after the edge; after 0
    OF_CLASS: [nats(1, 1, 5), nats(0, 1, 5)],
  }
  for name, both in wanted.items():
    assert found[name] == pytest.approx(np.mean(both))


def test_what_is_left_of_a_row_is_its_edge_and_not_the_row_before():
  train = np.array([[[0, 1], [2, 3]]], np.int32)
  found = of_tables(train, np.array([0]), train, np.array([0]), 0, 4)
  assert list(found) == list(TABLES[:-1])  # without classes
  edge, after = nats(1, 2, 4), nats(1, 1, 4)
  assert found[BIGRAM] == pytest.approx(np.mean([edge, after, edge, after]))


def test_what_was_never_seen_is_as_likely_as_every_other():
  train, held_out = np.zeros((3, 1, 1), np.int32), np.full((1, 1, 1), 4, np.int32)
  found = of_tables(train, np.zeros(3, int), held_out, np.array([7]), 8, 5)
  assert found[UNIGRAM] == pytest.approx(nats(0, 3, 5))
  assert found[OF_CLASS] == pytest.approx(math.log(5))  # of its class there is nothing


def test_tables_order_ids_that_have_what_they_count():
  """Ids that are their place and class: one class tells less than both."""
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, 600)
  ids = (labels[:, None, None] + np.arange(4).reshape(1, 2, 2)).astype(np.int32)
  found = of_tables(ids[:500], labels[:500], ids[500:], labels[500:], 3, 6)
  assert found[OF_CLASS] < 0.02 < found[POSITION] < found[UNIGRAM] < math.log(6)


def test_means_over_images():
  figure = of_images(np.array([1.0, 3.0]))
  assert (figure.value, figure.n) == (2.0, 2) and figure.spread == pytest.approx(1.0)
  assert of_images(np.array([1.0, np.nan])).missing == 'it is not finite for 1 of 2 evaluation images'
  assert of_images(np.array([1.0])).spread is None
  assert id_counts.SMOOTHING == 0.1
