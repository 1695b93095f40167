"""The distribution z is drawn from: N(0, I), or a Gaussian mixture fitted to encoded latents.

Ex-post density estimation (Ghosh et al. 2020, arXiv:1903.12436; used by DiffuseVAE): z is sampled from
q(z | x) of training images, a mixture is fitted with scikit-learn, and the number of components is the one
with the best log-likelihood on held-out latents. Draws are per image, so they come in no particular order.
"""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vaediff.errors import UserError
from vaediff.types import Keys, Latent

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


def check(config: ConfigDict) -> None:
  """Raises UserError where a stage's `prior` section holds a value that is not allowed."""
  for field, names in (('kind', KINDS), ('covariance', COVARIANCES)):
    if config[field] not in names:
      raise UserError(f'prior.{field} is {config[field]!r}; valid: {", ".join(names)}')
  if not config.num_components or min(config.num_components) < 1:
    raise UserError(f'prior.num_components must name counts >= 1, got {config.num_components}')
  if not 0 < config.holdout_fraction < 1:
    raise UserError(f'prior.holdout_fraction must be in (0, 1), got {config.holdout_fraction}')


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


def save(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
  """Writes the arrays as npz."""
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  with open(temporary, 'wb') as file:
    np.savez(file, **arrays)
  os.replace(temporary, path)


def load(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the arrays that `save` wrote."""
  with np.load(path) as file:
    return {name: file[name] for name in file.files}
