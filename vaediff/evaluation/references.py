"""Statistics of real images: computed once, cached in pytorch-fid's npz layout with their provenance."""

import dataclasses
import functools
import hashlib
import json
import pathlib

import jax
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from vaediff.data import cache, sources
from vaediff.errors import UserError
from vaediff.evaluation import frechet, precision_recall
from vaediff.evaluation.frechet import Features, Moments
from vaediff.evaluation.networks import FeatureNetwork
from vaediff.machine import distributed
from vaediff.run import log
from vaediff.storage import files

VERSION = 1
"""Raise it when the same settings come to mean other numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
  """One split of a data set, seen through one feature network.

  Attributes:
    moments: of all images.
    features: of the first images, at most `max_features`.
    split: 'train' or 'eval'.
    provenance: extractor, fingerprint of its weights, resize, data set, split, N, version.
  """

  moments: Moments
  features: Features
  split: str
  provenance: dict[str, str | int]

  def radii_squared(self, most: int, k: int) -> Float[np.ndarray, ' examples']:
    """Returns the squared distance of each of the first `most` vectors to its k-th nearest other, float64.

    It is kept, since one reference is compared with many sets.

    Raises:
      ValueError: where there are at most k vectors.
    """
    if (most, k) not in self._radii:
      self._radii[most, k] = precision_recall.radii_squared(self.features[:most], k)
    return self._radii[most, k]

  @functools.cached_property
  def _radii(self) -> dict[tuple[int, int], Float[np.ndarray, ' examples']]:
    return {}


def reference(config: ConfigDict, split: str, network: FeatureNetwork) -> Reference:
  """Returns the statistics of a split; from the cache if they are of these very images and weights.

  The file has `mu` and `sigma` (ddof 1) as pytorch-fid has them, `features`, and `provenance` as JSON.
  """
  source = sources.open_source(config.data, split)
  most = config.evaluate.max_features
  provenance = {
    'extractor': network.name,
    'weights_sha256': network.extractor.fingerprint,
    'resize': network.extractor.resize,
    'dataset': f'{config.data.name or config.data.source} {config.data.image_size}px',
    'images_sha256': source.fingerprint,
    'split': config.data[f'{split}_split'],
    'n': len(source),
    'max_features': most,
    'version': VERSION,
  }
  path = path_of(config, split, network.name, provenance)
  if not distributed.agree(path.exists()):
    log.say(f'features ({network.name}) of the {len(source)} images of the {split} split')
    parts, kept = [], []
    for batch in network.of_source(source, len(source)):
      parts.append(Moments.of(batch['features']))
      if sum(map(len, kept)) < most:
        kept.append(batch['features'])
    moments, features = frechet.merge_all(parts), np.concatenate(kept)[:most].astype(np.float32)
    if not np.all(np.isfinite(features)):  # of broken weights: a reason in the table, and nothing to keep
      return Reference(moments=moments, features=features, split=split, provenance=provenance)
    if jax.process_index() == 0:
      try:
        write(path, moments, features, provenance)
      except UserError as error:
        log.say(f'{error}; the statistics are used and not stored')
    distributed.wait_for_all(f'wrote {path}')
    if not distributed.agree(path.exists()):
      return Reference(moments=moments, features=features, split=split, provenance=provenance)
  return read(path, split, provenance)


def path_of(config: ConfigDict, split: str, extractor: str, provenance: dict[str, str | int]) -> pathlib.Path:
  """Returns the file of these statistics; other provenance is another file."""
  digest = hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()[:12]
  name = (config.data.name or config.data.source).replace('/', '_').replace(':', '_')
  folder = cache.data_root(config.data) / 'vaediff' / 'statistics'
  return folder / f'{name}-{config.data.image_size}px-{split}-{extractor}-{digest}.npz'


def write(path: pathlib.Path, moments: Moments, features: Features, provenance: dict[str, str | int]) -> None:
  """Writes a file of statistics at once."""
  arrays = {'mu': moments.mean, 'sigma': moments.covariance, 'features': features.astype(np.float32)}
  files.write_npz(path, {**arrays, 'provenance': json.dumps(provenance)})


def read(path: pathlib.Path, split: str, wanted: dict[str, str | int]) -> Reference:
  """Returns the statistics of a file.

  Raises:
    UserError: when the file cannot be read, is damaged, or is of other images, weights or another resize than
      wanted.
  """
  stored = files.read_npz(path)
  with files.reading(path):
    provenance = json.loads(str(stored['provenance']))
    mu, sigma, features = stored['mu'], stored['sigma'], stored['features']
    size = len(mu)
    if (mu.shape, sigma.shape, features.shape[1:]) != ((size,), (size, size), (size,)):
      raise ValueError(f'mu {mu.shape}, sigma {sigma.shape}, features {features.shape} do not fit together')
    if not all(np.all(np.isfinite(value)) for value in (mu, sigma, features)):
      raise ValueError('it holds numbers that are not finite')
    if not isinstance(provenance, dict):
      raise ValueError('it does not say what it was made of')
  for field, value in wanted.items():
    if provenance.get(field) != value:
      raise UserError(
        f'{path} has {field} = {provenance.get(field)!r}, this evaluation {value!r}: figures of the two must '
        'not be mixed. Remove the file to compute it anew'
      )
  moments = Moments(count=provenance['n'], mean=mu, scatter=sigma * (provenance['n'] - 1))
  return Reference(moments=moments, features=features, split=split, provenance=provenance)
