"""The distribution z is drawn from: N(0, I), or a Gaussian mixture fitted to encoded latents.

Ex-post density estimation (Ghosh et al. 2020, arXiv:1903.12436; used by DiffuseVAE): z is sampled from
q(z | x) of training images, a mixture is fitted with scikit-learn, and the number of components is the one
with the best log-likelihood on held-out latents. Draws are per image, so they come in no particular order.

Where samples are asked to be of a class, z is drawn from a mixture fitted to the codes of that class alone. A
class with too few of them has the components of the mixture of all, each as often as it holds codes of the
class: p(z | class) = sum_k p(k | class) N_k(z).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from vaediff import checks, reads
from vaediff.checks import Bound
from vaediff.errors import UserError
from vaediff.types import Keys, Latent

PRIOR = 'prior'
"""The measurement of a VAE's latents, and the name that it is read by."""
OF_CLASSES, CLASS_WEIGHTS = 'prior_of_classes', 'class_weights'
"""The measurement of the mixtures of all classes, one after the other, and the name of its array [classes, k]
of the weights that each class gives to the components; {} with N(0, I)."""
RANGE = 'numbers; see the prior of the stage'
"""What those of z are, in words."""
FEWEST = 20
"""Codes of a class that has a mixture of its own; at least two for each of its components."""
FEWEST_TO_FIT = 2
"""Latents that a mixture is fitted to, however few components it has."""
KINDS = ('normal', 'gmm')
COVARIANCES = ('full', 'diag', 'tied')
Prior = dict[str, jax.Array | np.ndarray]
"""{} for N(0, I); else `weights` [k], `means` [k, d] and one of `full` [k, d, d], `diag` [k, d] or `tied`
[d, d]: factors L with covariance L L^T (standard deviations for `diag`)."""


def draw(prior: Prior, keys: Keys, latent_dim: int, weights: Array | None = None) -> Latent:
  """Returns one z per key, from the mixture, or from N(0, I) when `prior` is empty.

  With `weights` [n, k] each z has its own weights of the components.
  """
  prior = jax.tree.map(jnp.asarray, prior)

  def one(key, own):
    key_component, key_noise = jax.random.split(key)
    noise = jax.random.normal(key_noise, (latent_dim,))
    if not prior:
      return noise
    k = jax.random.categorical(key_component, jnp.log(prior['weights'] if own is None else own))
    if 'diag' in prior:
      return prior['means'][k] + prior['diag'][k] * noise
    factor = prior['full'][k] if 'full' in prior else prior['tied']
    return prior['means'][k] + factor @ noise

  return jax.vmap(one)(keys, weights)


def fit_classes(
  prior: Prior, z: np.ndarray, labels: np.ndarray, num_classes: int, config: ConfigDict, seed: int
) -> dict[str, np.ndarray]:
  """Returns a mixture with the components of all classes, and `CLASS_WEIGHTS`.

  The components of a class are fitted to its codes as those of all are to all, `num_components` divided by
  the number of classes. A class has the components of the mixture of all instead where it has fewer than
  `FEWEST` codes, fewer than two for each component, or too few besides those that are held out.

  Args:
    prior: the mixture of all codes.
    z: codes of images [n, d].
    labels: their classes [n].
    num_classes: all there are.
    config: the section `prior`.
    seed: of the fits.
  """
  config = ConfigDict(config.to_dict())
  config.num_components = tuple(sorted({max(1, k // num_classes) for k in config.num_components}))
  counts, smallest = np.bincount(labels, minlength=num_classes), min(config.num_components)

  def enough(count: int) -> bool:
    left = count - num_held_out(count, config)
    return count >= max(FEWEST, 2 * smallest) and left >= max(FEWEST_TO_FIT, smallest)

  own = {k: fit(z[labels == k], config, seed)[0] for k in range(num_classes) if enough(int(counts[k]))}
  rare = [k for k in range(num_classes) if k not in own]
  mixtures = [with_own_factors(one) for one in (*own.values(), *([prior] if rare else []))]
  starts = np.cumsum([0, *(len(one['weights']) for one in mixtures)])
  weights = np.zeros((num_classes, starts[-1]), np.float32)
  for number, k in enumerate(own):
    weights[k, starts[number] : starts[number + 1]] = mixtures[number]['weights']
  if rare:
    weights[rare, starts[len(own)] :] = of_classes(prior, z, labels, num_classes)[rare]
  joined = {name: np.concatenate([one[name] for one in mixtures]) for name in mixtures[0]}
  return {**joined, 'weights': weights.mean(axis=0), CLASS_WEIGHTS: weights}


def with_own_factors(mixture: Prior) -> dict[str, np.ndarray]:
  """Returns a mixture whose components have each a factor of its own: for `tied` that of all."""
  arrays = {name: np.asarray(value) for name, value in mixture.items()}
  if 'tied' in arrays:
    tied = arrays.pop('tied')
    arrays['full'] = np.broadcast_to(tied, (len(arrays['weights']), *tied.shape))
  return arrays


def of_classes(prior: Prior, z: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
  """Returns p(component | class) [classes, k]: the mean share of each component in the codes of a class.

  A class that no code is of has the weights of the mixture.

  Args:
    prior: a mixture.
    z: codes of images [n, d].
    labels: their classes [n].
    num_classes: all there are.
  """
  shares, counts = shares_of(prior, z), np.bincount(labels, minlength=num_classes)
  sums = np.zeros((num_classes, shares.shape[1]))
  np.add.at(sums, labels, shares)
  means = sums / np.maximum(counts, 1)[:, None]
  return np.where(counts[:, None] > 0, means, np.asarray(prior['weights'])).astype(np.float32)


def shares_of(prior: Prior, z: np.ndarray) -> np.ndarray:
  """Returns p(component | z) [n, k] of codes [n, d]."""
  logs = []
  for k, mean in enumerate(np.asarray(prior['means'], np.float64)):
    if 'diag' in prior:
      scale = np.asarray(prior['diag'][k], np.float64)
      white = (z - mean) / scale
    else:
      factor = np.asarray(prior['full'][k] if 'full' in prior else prior['tied'], np.float64)
      white, scale = np.linalg.solve(factor, (z - mean).T).T, np.diagonal(factor)
    logs.append(np.log(prior['weights'][k]) - np.log(scale).sum() - 0.5 * np.square(white).sum(axis=1))
  logs = np.stack(logs, axis=1)
  shares = np.exp(logs - logs.max(axis=1, keepdims=True))
  return shares / shares.sum(axis=1, keepdims=True)


def measured_of_classes(stage: str, workdir: str) -> reads.Measured:
  """Returns the declaration of what `fit_classes` measures; nothing, where it has no meaning."""
  return reads.Measured(stage=stage, workdir=workdir, measurement=OF_CLASSES, neutral=dict)


def measured(stage: str, workdir: str) -> reads.Measured:
  """Returns the declaration of a VAE stage's prior; N(0, I), where it has no meaning."""
  return reads.Measured(stage=stage, workdir=workdir, measurement=PRIOR, neutral=dict)


MAX_COMPONENTS = 100_000
"""Of a mixture: more than there are latents to fit to."""


def _is_count(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_COMPONENTS


BOUNDS = {
  'prior.num_components': Bound(
    lambda counts: isinstance(counts, tuple | list) and len(counts) > 0 and all(map(_is_count, counts)),
    lambda field, counts: (
      f'{field} must name counts >= 1, whole and at most {MAX_COMPONENTS}, got {counts!r}'
    ),
  ),
  'prior.kind': checks.one_of(KINDS),
  'prior.covariance': checks.one_of(COVARIANCES),
  'prior.holdout_fraction': checks.inside(0, 1),
  'prior.num_encoded': checks.at_least(1),
}


def check(section: ConfigDict) -> None:
  """Raises UserError where a VAE's section `prior` holds a value that is not allowed."""
  checks.check(section, BOUNDS)


def arrays_of(section: ConfigDict) -> tuple[str, ...]:
  """Returns the names of the arrays of the prior that a section describes."""
  return () if section.kind == 'normal' else ('weights', 'means', section.covariance)


def arrays_of_classes(section: ConfigDict) -> tuple[str, ...]:
  """Returns the names of the arrays of `fit_classes`."""
  return 'weights', 'means', 'full' if section.covariance == 'tied' else section.covariance, CLASS_WEIGHTS


def num_held_out(count: int, config: ConfigDict) -> int:
  """Returns how many of `count` latents the number of components is chosen by, and not fitted to: >= 1."""
  return max(1, round(count * config.holdout_fraction))


def fit(z: np.ndarray, config: ConfigDict, seed: int) -> tuple[dict[str, np.ndarray], dict[int, float]]:
  """Fits the mixture to latents [n, d].

  Returns:
    The prior's arrays, and the mean held-out log-likelihood (nats per latent) by number of components.

  Raises:
    UserError: when fewer latents are left beside those that are held out than the fewest components need.
  """
  from sklearn.mixture import GaussianMixture  # imported late: a second that N(0, I) does not need

  def mixture(k):
    return GaussianMixture(k, covariance_type=config.covariance, reg_covar=1e-6, random_state=seed)

  order = np.random.default_rng(seed).permutation(len(z))
  first = num_held_out(len(z), config)
  held_out, rest = z[order[:first]], z[order[first:]]
  candidates = [k for k in config.num_components if k <= len(rest)]
  if not candidates:
    raise UserError(
      f'prior.num_components {config.num_components} are all more than the {len(rest)} latents to fit to'
    )
  if len(rest) < FEWEST_TO_FIT:
    raise UserError(
      f'{len(rest)} of {len(z)} latents is left to fit a mixture to, and at least {FEWEST_TO_FIT} are '
      'needed: lower prior.holdout_fraction, or raise prior.num_encoded'
    )
  scores = {k: float(mixture(k).fit(rest).score(held_out)) for k in candidates}
  best = mixture(max(scores, key=scores.get)).fit(z)
  if config.covariance == 'diag':
    factors = np.sqrt(best.covariances_)
  else:
    factors = np.linalg.cholesky(best.covariances_)
  arrays = {'weights': best.weights_, 'means': best.means_, config.covariance: factors}
  return {name: value.astype(np.float32) for name, value in arrays.items()}, scores
