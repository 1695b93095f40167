"""The distribution z is drawn from: N(0, I), or a Gaussian mixture fitted to encoded latents.

Ex-post density estimation (Ghosh et al. 2020, arXiv:1903.12436; used by DiffuseVAE): z is sampled from
q(z | x) of training images, a mixture is fitted with scikit-learn, and the number of components is the one
with the best log-likelihood on held-out latents. Draws are per image, so they come in no particular order.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vaediff import checks, reads
from vaediff.checks import Bound
from vaediff.errors import UserError
from vaediff.types import Keys, Latent

PRIOR = 'prior'
"""The measurement of a VAE's latents, and the name that it is read by."""
KINDS = ('normal', 'gmm')
COVARIANCES = ('full', 'diag', 'tied')
Prior = dict[str, jax.Array | np.ndarray]
"""{} for N(0, I); else `weights` [k], `means` [k, d] and one of `full` [k, d, d], `diag` [k, d] or `tied`
[d, d]: factors L with covariance L L^T (standard deviations for `diag`)."""


def draw(prior: Prior, keys: Keys, latent_dim: int) -> Latent:
  """Returns one z per key, from the mixture, or from N(0, I) when `prior` is empty."""
  prior = jax.tree.map(jnp.asarray, prior)

  def one(key):
    key_component, key_noise = jax.random.split(key)
    noise = jax.random.normal(key_noise, (latent_dim,))
    if not prior:
      return noise
    k = jax.random.categorical(key_component, jnp.log(prior['weights']))
    if 'diag' in prior:
      return prior['means'][k] + prior['diag'][k] * noise
    factor = prior['full'][k] if 'full' in prior else prior['tied']
    return prior['means'][k] + factor @ noise

  return jax.vmap(one)(keys)


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


def fit(z: np.ndarray, config: ConfigDict, seed: int) -> tuple[dict[str, np.ndarray], dict[int, float]]:
  """Fits the mixture to latents [n, d].

  Returns:
    The prior's arrays, and the mean held-out log-likelihood (nats per latent) by number of components.

  Raises:
    UserError: when there are fewer latents than the smallest candidate needs.
  """
  from sklearn.mixture import GaussianMixture  # imported late: a second that N(0, I) does not need

  def mixture(k):
    return GaussianMixture(k, covariance_type=config.covariance, reg_covar=1e-6, random_state=seed)

  order = np.random.default_rng(seed).permutation(len(z))
  num_held_out = max(1, round(len(z) * config.holdout_fraction))
  held_out, rest = z[order[:num_held_out]], z[order[num_held_out:]]
  candidates = [k for k in config.num_components if k <= len(rest)]
  if not candidates:
    raise UserError(
      f'prior.num_components {config.num_components} are all more than the {len(rest)} latents to fit to'
    )
  scores = {k: float(mixture(k).fit(rest).score(held_out)) for k in candidates}
  best = mixture(max(scores, key=scores.get)).fit(z)
  if config.covariance == 'diag':
    factors = np.sqrt(best.covariances_)
  else:
    factors = np.linalg.cholesky(best.covariances_)
  arrays = {'weights': best.weights_, 'means': best.means_, config.covariance: factors}
  return {name: value.astype(np.float32) for name, value in arrays.items()}, scores
