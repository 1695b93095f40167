"""Fréchet distance of two sets of feature vectors, from mergeable moments. NumPy, float64, on the host.

  d(a, b)^2 = |mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 tr (S_a S_b)^(1/2)

(Dowson & Landau 1982; as the FID: Heusel et al. 2017, arXiv:1706.08500, eq. 6). What is called the distance
is the square, as everywhere in the field. It is biased upwards at small N: compare at equal N only.
"""

import dataclasses
import functools
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float

from vaediff.errors import UserError

Features = Float[np.ndarray, '_ features']
"""Feature vectors; the sets of one call may have different sizes."""
MAX_SVD = 4096
"""Most examples per side for the singular value form; its cost grows with their cube."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moments:
  """Count, mean and scatter of feature vectors; what two processes saw can be merged.

  Attributes:
    count: number of vectors N.
    mean: float64 [d].
    scatter: float64 [d, d], sum of outer products of the deviations from the mean.
  """

  count: int
  mean: Float[np.ndarray, ' features']
  scatter: Float[np.ndarray, 'features features']

  @classmethod
  def of(cls, features: Features) -> 'Moments':
    """Returns the moments of feature vectors [n, d], n >= 1."""
    features = np.asarray(features, np.float64)
    mean = features.mean(axis=0)
    deviations = features - mean
    return cls(count=len(features), mean=mean, scatter=deviations.T @ deviations)

  def merge(self, other: 'Moments') -> 'Moments':
    """Returns the moments of both sets together (Chan, Golub & LeVeque 1979)."""
    count = self.count + other.count
    delta = other.mean - self.mean
    return Moments(
      count=count,
      mean=self.mean + delta * (other.count / count),
      scatter=self.scatter + other.scatter + np.outer(delta, delta) * (self.count * other.count / count),
    )

  @property
  def covariance(self) -> Float[np.ndarray, 'features features']:
    """The unbiased covariance, float64 [d, d]; needs two vectors, one for each image."""
    if self.count < 2:
      raise UserError(f'a covariance needs at least 2 vectors, got {self.count}: use more images')
    return self.scatter / (self.count - 1)

  @functools.cached_property
  def root(self) -> Float[np.ndarray, 'features features']:
    """The symmetric square root of the covariance; kept, since one reference is compared with many sets."""
    values, vectors = np.linalg.eigh(self.covariance)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def merge_all(parts: Iterable[Moments]) -> Moments:
  """Returns the moments of all parts together; there is at least one."""
  parts = iter(parts)
  total = next(parts)
  for part in parts:
    total = total.merge(part)
  return total


def frechet_distance(a: Moments, b: Moments) -> float:
  """Returns the (squared) Fréchet distance of the two Gaussians with these moments, >= 0.

  tr (S_a S_b)^(1/2) is the sum of the square roots of the eigenvalues of the symmetric R S_a R, with
  R = S_b^(1/2): always real, no regularisation. Rounding leaves about 1e-7 of the traces.
  """
  trace_root = np.sqrt(np.clip(np.linalg.eigvalsh(b.root @ a.covariance @ b.root), 0, None)).sum()
  return _distance(a, b, trace_root)


def frechet_distance_of(x: Features, y: Features) -> float:
  """Returns the (squared) Fréchet distance of two sets of feature vectors [n, d] and [m, d].

  Where either has no more vectors than features, S is singular and the exact form is
  tr (S_x S_y)^(1/2) = |X Y^T|_* / sqrt((n - 1)(m - 1)), with X and Y centred and |.|_* the nuclear norm.
  """
  a, b = Moments.of(x), Moments.of(y)
  dimensions = x.shape[1]
  if min(len(x), len(y)) > dimensions or max(len(x), len(y)) > MAX_SVD:
    return frechet_distance(a, b)
  if min(len(x), len(y)) < 2:
    raise UserError(f'a covariance needs at least 2 vectors, got {len(x)} and {len(y)}: use more images')
  product = (np.asarray(x, np.float64) - a.mean) @ (np.asarray(y, np.float64) - b.mean).T
  singular = np.linalg.svd(product, compute_uv=False)
  return _distance(a, b, singular.sum() / np.sqrt((len(x) - 1) * (len(y) - 1)))


def _distance(a: Moments, b: Moments, trace_root: float) -> float:
  traces = (np.trace(a.scatter) / (a.count - 1)) + (np.trace(b.scatter) / (b.count - 1))
  return max(0.0, float(np.sum((a.mean - b.mean) ** 2) + traces - 2 * trace_root))
