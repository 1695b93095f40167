"""The Fréchet distance against closed forms, and its moments under any split and order."""

import numpy as np
import pytest
from scipy import linalg

from vaediff.evaluation import frechet
from vaediff.evaluation.frechet import Moments


def gaussian(mean, cov, count=1000):
  """Moments with exactly this mean and covariance."""
  return Moments(count=count, mean=np.asarray(mean, float), scatter=np.asarray(cov, float) * (count - 1))


def samples(seed, count, dimensions):
  rng = np.random.default_rng(seed)
  return rng.standard_normal((count, dimensions)) @ rng.standard_normal((dimensions, dimensions)) + seed


def test_two_diagonal_gaussians():
  a, b = np.array([4.0, 1.0, 0.25]), np.array([1.0, 9.0, 0.25])
  expected = 3 * 2.0**2 + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
  got = frechet.frechet_distance(gaussian([0, 0, 0], np.diag(a)), gaussian([2, 2, 2], np.diag(b)))
  assert got == pytest.approx(expected, rel=1e-12)


def test_two_gaussians_that_do_not_commute():
  """Against the matrix square root of SciPy, another algorithm."""
  rng = np.random.default_rng(0)
  a, b = (m @ m.T for m in rng.standard_normal((2, 64, 64)))
  mean = rng.standard_normal(64)
  expected = mean @ mean + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
  assert frechet.frechet_distance(gaussian(0 * mean, a), gaussian(mean, b)) == pytest.approx(
    expected, rel=1e-9
  )


def test_one_dimension_in_closed_form():
  got = frechet.frechet_distance(gaussian([1.0], [[4.0]]), gaussian([3.0], [[25.0]]))
  assert got == pytest.approx(2**2 + 3**2, rel=1e-12)


def test_distance_to_itself_is_zero_and_it_is_symmetric():
  x, y = samples(1, 200, 20), samples(2, 150, 20)
  a, b = Moments.of(x), Moments.of(y)
  scale = np.trace(a.covariance)
  assert 0 <= frechet.frechet_distance(a, a) < 1e-7 * scale
  assert frechet.frechet_distance(a, b) == pytest.approx(frechet.frechet_distance(b, a), rel=1e-9)


@pytest.mark.parametrize(('n', 'm'), [(10, 30), (10, 200), (200, 10), (8, 8)])
def test_the_two_forms_agree_where_there_are_few_vectors(n, m):
  x, y = samples(3, n, 40), samples(4, m, 40)
  whole = frechet.frechet_distance(Moments.of(x), Moments.of(y))
  assert frechet.frechet_distance_of(x, y) == pytest.approx(whole, rel=1e-6)


def test_few_equal_vectors_are_at_distance_zero():
  x = samples(5, 10, 40)
  assert frechet.frechet_distance_of(x, x[::-1]) < 1e-9 * np.trace(Moments.of(x).covariance)


@pytest.mark.parametrize('cuts', [(1,), (50,), (1, 2, 99), (33, 34, 60)])
def test_moments_are_the_same_under_any_split_and_order(cuts):
  x = samples(6, 100, 12) + 1e4  # a mean far from zero: sums of squares would lose digits
  whole = Moments.of(x)
  shuffled = x[np.random.default_rng(0).permutation(100)]
  parts = [Moments.of(part) for part in np.split(shuffled, cuts)]
  for order in (parts, parts[::-1]):
    merged = frechet.merge_all(order)
    assert merged.count == 100
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-13)
    np.testing.assert_allclose(merged.covariance, np.cov(x.T), rtol=1e-8, atol=1e-8)
  left = parts[0].merge(frechet.merge_all(parts[1:]))
  np.testing.assert_allclose(left.scatter, frechet.merge_all(parts).scatter, rtol=1e-8, atol=1e-7)


def test_float32_features_are_summed_in_float64():
  x = (np.random.default_rng(0).standard_normal((4000, 3)) + 1e3).astype(np.float32)
  np.testing.assert_allclose(Moments.of(x).covariance, np.cov(x.astype(np.float64).T), rtol=1e-9)


def test_a_single_vector_has_no_covariance():
  with pytest.raises(ValueError, match='at least 2 vectors, got 1'):
    _ = Moments.of(np.ones((1, 3))).covariance
  with pytest.raises(ValueError, match='at least 2'):
    frechet.frechet_distance_of(np.ones((1, 3)), np.ones((2, 3)))
