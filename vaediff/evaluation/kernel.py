"""Kernel distance and Inception Score: the other two figures of a feature network. NumPy, float64."""

import numpy as np
from jaxtyping import Float

from vaediff.evaluation.frechet import Features

SPLITS = 10
"""Of the images, for the Inception Score."""
LEAST_SCORED = 2 * SPLITS
"""Images: a split of a single one has the score 1, whatever it shows."""


def polynomial_kernel(x: Features, y: Features) -> Float[np.ndarray, 'rows columns']:
  """Returns (x . y / d + 1)^3 of every pair, the kernel of the KID (arXiv:1801.01401, section 4)."""
  values = np.asarray(x, np.float64) @ np.asarray(y, np.float64).T / x.shape[1] + 1
  return values * values * values  # a general power is many times slower


def within(x: Features) -> float:
  """Returns the mean of the kernel over pairs of different vectors of one set."""
  values = polynomial_kernel(x, x)
  return float((values.sum() - np.trace(values)) / (len(x) * (len(x) - 1)))


def kernel_distance(
  x: Features, y: Features, *, num_subsets: int, subset_size: int, seed: int = 0
) -> tuple[float, float]:
  """Returns mean and standard error of the squared MMD over random subsets of both sets.

  The KID of Bińkowski et al. 2018 (arXiv:1801.01401) with the Inception network: unbiased, so small N
  does not raise it, and it may be below 0 (Gretton et al. 2012, eq. 3: the diagonals of the two inner sums
  are left out). Subsets are drawn without replacement; their size is at most that of a set.

  Raises:
    ValueError: for subsets of fewer than 2 vectors, which have no such estimate.
  """
  size = min(subset_size, len(x), len(y))
  if size < 2:
    raise ValueError(f'the unbiased estimate needs at least 2 vectors a side, got {size}')
  if len(x) == len(y) == size:
    num_subsets = 1  # every subset is the whole
  rng, values = np.random.default_rng(seed), []
  # a set that is no larger than its subsets has one term of its own for all of them
  x_whole, y_whole = (within(part) if len(part) == size else None for part in (x, y))
  for _ in range(num_subsets):
    a, b = x[rng.choice(len(x), size, replace=False)], y[rng.choice(len(y), size, replace=False)]
    own = within(a) if x_whole is None else x_whole
    own += within(b) if y_whole is None else y_whole
    values.append(own - 2 * polynomial_kernel(a, b).mean())
  error = np.std(values, ddof=1) / np.sqrt(num_subsets) if num_subsets > 1 else 0.0
  return float(np.mean(values)), float(error)


def inception_score(logits: Features, num_splits: int = SPLITS) -> tuple[float, float]:
  """Returns mean and standard deviation over splits of exp E_x KL(p(y|x) || p(y)); from 1 to K classes.

  Salimans et al. 2016, arXiv:1606.03498, section 4. Consecutive splits of nearly equal size, as there.
  """
  logits = np.asarray(logits, np.float64)
  logits = logits - logits.max(axis=1, keepdims=True)
  log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  scores = []
  for part in np.array_split(log_p, min(num_splits, len(log_p))):
    p = np.exp(part)
    marginal = p.mean(axis=0)
    log_marginal = np.log(np.maximum(marginal, np.finfo(np.float64).tiny))
    scores.append(np.exp(np.mean(np.sum(p * (part - log_marginal), axis=1, where=p > 0))))
  return float(np.mean(scores)), float(np.std(scores))
