"""Kernel distance against sums written out, and the Inception Score where it is known."""

import numpy as np
import pytest

from vaediff.evaluation import kernel


def brute_force(x, y):
  def k(a, b):
    return (float(a @ b) / len(a) + 1) ** 3

  n, m = len(x), len(y)
  xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
  yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
  return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def mmd_squared(x, y):
  """Returns the unbiased squared MMD of two whole sets, of whatever sizes."""
  return kernel.within(x) + kernel.within(y) - 2 * kernel.polynomial_kernel(x, y).mean()


def test_mmd_against_sums_written_out():
  rng = np.random.default_rng(0)
  x, y = rng.standard_normal((7, 5)), rng.standard_normal((9, 5)) + 0.5
  assert mmd_squared(x, y) == pytest.approx(brute_force(x, y), rel=1e-12)


def test_subsets_of_everything_give_the_whole():
  rng = np.random.default_rng(1)
  x, y = rng.standard_normal((20, 4)), rng.standard_normal((20, 4)) + 1
  value, error = kernel.kernel_distance(x, y, num_subsets=5, subset_size=1000)
  assert value == pytest.approx(mmd_squared(x, y), rel=1e-12) and error < 1e-12


def test_it_is_unbiased():
  """Equal distributions: zero on average already at 20 images, where a Fréchet distance is far from it."""
  rng = np.random.default_rng(2)
  values = [mmd_squared(*rng.standard_normal((2, 20, 4))) for _ in range(2000)]
  assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(2000)


def test_subsets_average_to_the_whole():
  rng = np.random.default_rng(3)
  x, y = rng.standard_normal((60, 4)), rng.standard_normal((60, 4)) + 0.7
  value, error = kernel.kernel_distance(x, y, num_subsets=400, subset_size=30)
  assert abs(value - mmd_squared(x, y)) < 4 * error
  again, _ = kernel.kernel_distance(x, y, num_subsets=400, subset_size=30)
  assert again == value


def test_inception_score_of_one_hot_logits_is_the_number_of_classes():
  logits = np.tile(1e4 * np.eye(7), (30, 1))  # every split of 21 holds each class three times
  score, spread = kernel.inception_score(logits)
  assert score == pytest.approx(7, rel=1e-9) and spread < 1e-6


def test_inception_score_of_equal_logits_is_one():
  score, _ = kernel.inception_score(np.tile(np.random.default_rng(0).standard_normal(9), (40, 1)))
  assert score == pytest.approx(1, rel=1e-9)


def test_inception_score_against_its_definition():
  logits = np.random.default_rng(4).standard_normal((50, 6)) * 3
  p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  parts = [p[i : i + 5] for i in range(0, 50, 5)]
  scores = [np.exp(np.mean([np.sum(q * np.log(q / part.mean(axis=0))) for q in part])) for part in parts]
  score, spread = kernel.inception_score(logits)
  assert score == pytest.approx(np.mean(scores), rel=1e-12)
  assert spread == pytest.approx(np.std(scores), rel=1e-9)


def test_too_few():
  with pytest.raises(ValueError, match='at least 2 vectors a side, got 1'):
    kernel.kernel_distance(np.ones((1, 3)), np.ones((2, 3)), num_subsets=1, subset_size=10)
