"""Neighbourhood figures on toy points, and against loops over all pairs."""

import numpy as np
import pytest

from vaediff.evaluation import precision_recall
from vaediff.evaluation.precision_recall import Nearest


def brute_force(real, fake, k):
  def radius(points, i):
    others = sorted(np.linalg.norm(points[i] - points[j]) for j in range(len(points)) if j != i)
    return others[k - 1]

  real_radii = [radius(real, i) for i in range(len(real))]
  fake_radii = [radius(fake, i) for i in range(len(fake))]
  inside = [
    [np.linalg.norm(f - r) <= radius for r, radius in zip(real, real_radii, strict=True)] for f in fake
  ]
  recalled = [any(np.linalg.norm(f - r) <= q for f, q in zip(fake, fake_radii, strict=True)) for r in real]
  return {
    'precision': np.mean([any(row) for row in inside]),
    'recall': np.mean(recalled),
    'density': np.sum(inside) / (k * len(fake)),
    'coverage': np.mean(np.any(inside, axis=0)),
  }


@pytest.mark.parametrize('k', [1, 3, 5])
def test_against_loops(k, monkeypatch):
  monkeypatch.setattr(precision_recall, 'CHUNK', 7)  # many chunks, the last one short
  rng = np.random.default_rng(k)
  real, fake = rng.standard_normal((30, 3)), 0.8 * rng.standard_normal((25, 3)) + 0.6
  assert precision_recall.precision_recall(real, fake, k) == pytest.approx(brute_force(real, fake, k))


def test_equal_sets_are_perfect():
  x = np.random.default_rng(0).standard_normal((50, 4))
  figures = precision_recall.precision_recall(x, x, 3)
  assert figures['precision'] == figures['recall'] == figures['coverage'] == 1
  assert figures['density'] >= 1


def test_sets_far_apart_have_nothing_in_common():
  x = np.random.default_rng(0).standard_normal((20, 4))
  figures = precision_recall.precision_recall(x, x + 100, 3)
  assert figures == {'precision': 0, 'recall': 0, 'density': 0, 'coverage': 0}


def test_one_mode_of_two_is_precise_and_recalls_half():
  rng = np.random.default_rng(0)
  left, right = rng.standard_normal((40, 2)), rng.standard_normal((40, 2)) + 50
  figures = precision_recall.precision_recall(np.concatenate([left, right]), left + 1e-6, 3)
  assert figures['precision'] == 1 and figures['recall'] == figures['coverage'] == 0.5


def test_copies_do_not_count_themselves_out():
  """Of four equal vectors each has three others at distance 0."""
  assert precision_recall.radii_squared(np.ones((4, 2)), 3).tolist() == [0, 0, 0, 0]


def test_too_few_vectors():
  with pytest.raises(ValueError, match='k = 3 neighbours need more than 3 vectors, got 3'):
    precision_recall.precision_recall(np.ones((3, 2)), np.ones((9, 2)), 3)


def test_nearest_in_parts(monkeypatch):
  monkeypatch.setattr(precision_recall, 'CHUNK', 4)
  rng = np.random.default_rng(0)
  queries, others = rng.standard_normal((6, 5)), rng.standard_normal((23, 5))
  nearest = Nearest(queries)
  for part in np.split(others, (10, 11)):
    nearest.add(part)
  distances = np.linalg.norm(queries[:, None] - others[None], axis=-1)
  np.testing.assert_array_equal(nearest.index, distances.argmin(axis=1))
  np.testing.assert_allclose(np.sqrt(nearest.squared), distances.min(axis=1), rtol=1e-9)


def test_a_copy_is_found():
  others = np.random.default_rng(0).standard_normal((30, 5))
  nearest = Nearest(others[7:8])
  nearest.add(others)
  assert nearest.index.tolist() == [7] and nearest.squared[0] < 1e-12
