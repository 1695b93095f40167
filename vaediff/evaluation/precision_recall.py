"""Precision, recall, density and coverage by nearest neighbours; nearest training images. NumPy, float64."""

import numpy as np
from jaxtyping import Float

from vaediff.evaluation.frechet import Features

CHUNK = 1024
"""Rows of a distance matrix that are held at a time."""


def squared_distances(x: Features, y: Features) -> Float[np.ndarray, 'rows columns']:
  """Returns |x_i - y_j|^2 of every pair, >= 0."""
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  x, y = x - y[0], y - y[0]  # of vectors that are all the same it is 0, not what rounding leaves
  squares = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1)[None] - 2 * x @ y.T
  return np.maximum(squares, 0)


def radii_squared(x: Features, k: int) -> Float[np.ndarray, ' examples']:
  """Returns the squared distance of every vector to its k-th nearest other one."""
  if len(x) <= k:
    raise ValueError(f'k = {k} neighbours need more than {k} vectors, got {len(x)}')
  parts = []
  for start in range(0, len(x), CHUNK):
    distances = squared_distances(x[start : start + CHUNK], x)
    rows = np.arange(len(distances))
    distances[rows, start + rows] = -1  # itself comes first, whatever rounding and copies say
    parts.append(np.partition(distances, k, axis=1)[:, k])
  return np.concatenate(parts)


def precision_recall(
  real: Features, fake: Features, k: int = 3, real_radii: Float[np.ndarray, ' examples'] | None = None
) -> dict[str, float]:
  """Returns precision, recall, density and coverage.

  With a ball around every vector that reaches to its k-th neighbour in its own set:

    precision  share of fake vectors inside a real ball      (Kynkäänniemi et al. 2019, arXiv:1904.06991)
    recall     share of real vectors inside a fake ball
    density    mean number of real balls around a fake vector, over k  (Naeem et al. 2020, arXiv:2002.09797)
    coverage   share of real balls that hold a fake vector

  All but density are in [0, 1]; density may exceed 1.

  Args:
    real: feature vectors [n, d] of real images.
    fake: feature vectors [m, d].
    k: which neighbour the balls reach to; there are more vectors than that on either side.
    real_radii: `radii_squared(real, k)`, where it is known; None = it is computed.

  Raises:
    ValueError: for sets of at most k vectors.
  """
  if real_radii is None:
    real_radii = radii_squared(real, k)
  fake_radii = radii_squared(fake, k)
  inside_real = np.zeros(len(fake), np.int64)
  covered, recalled = np.zeros(len(real), bool), np.zeros(len(real), bool)
  for start in range(0, len(fake), CHUNK):
    rows = slice(start, start + CHUNK)
    distances = squared_distances(fake[rows], real)
    within = distances <= real_radii[None]
    inside_real[rows] = within.sum(axis=1)
    covered |= within.any(axis=0)
    recalled |= (distances <= fake_radii[rows, None]).any(axis=0)
  return {
    'precision': float(np.mean(inside_real > 0)),
    'recall': float(np.mean(recalled)),
    'density': float(inside_real.mean() / k),
    'coverage': float(np.mean(covered)),
  }


class Nearest:
  """The nearest of many vectors, seen in parts, to each of a few.

  Args:
    queries: [n, d].
  """

  def __init__(self, queries: Features):
    self._queries = np.asarray(queries, np.float64)
    self.squared = np.full(len(queries), np.inf)
    """Squared distance to the nearest so far."""
    self.index = np.full(len(queries), -1)
    """Which one that is, by the order in which they were added."""
    self._seen = 0

  def add(self, others: Features) -> None:
    """Looks at more vectors [m, d]."""
    for start in range(0, len(others), CHUNK):
      distances = squared_distances(self._queries, others[start : start + CHUNK])
      best = distances.argmin(axis=1)
      values = distances[np.arange(len(distances)), best]
      nearer = values < self.squared
      self.squared = np.where(nearer, values, self.squared)
      self.index = np.where(nearer, self._seen + start + best, self.index)
    self._seen += len(others)
