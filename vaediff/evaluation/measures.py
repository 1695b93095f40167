"""Figures of one set of images, by name. A name says which network it is of; none stands in for another.

fid, kid, is                    Inception-v3 of 2015 and no other
fd_<network>, kd_<network>      Fréchet and kernel distance on another network
precision_<network>, recall_..., density_..., coverage_...
class_accuracy                  share that the data set's own classifier takes for the class that was asked
                                for, or that their image is of
"""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np
from ml_collections import ConfigDict

from vaediff.errors import UserError
from vaediff.evaluation import frechet, kernel, precision_recall
from vaediff.evaluation.frechet import Features, Moments
from vaediff.evaluation.networks import NAMES, PUBLISHED
from vaediff.evaluation.references import Reference

CLASS_ACCURACY = 'class_accuracy'
CLASSIFIER = 'classifier'
"""The network that it is of."""
NEIGHBOURHOODS = ('precision', 'recall', 'density', 'coverage')
FIELDS = 'config.evaluate.num_neighbours and max_features'
"""What says how many images those are of, and how many they need."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
  """One cell of a table.

  Attributes:
    value: None where it could not be computed; then `missing` says why.
    spread: standard deviation over seeds (ddof 1); None for a single one.
    floor: what real images get at `floor_n` images; None where there is no such thing.
    floor_n: how many real images that was.
    n: of how many images it is, where that is not the N of its row.
    missing: why there is no value.
  """

  value: float | None = None
  spread: float | None = None
  floor: float | None = None
  floor_n: int | None = None
  n: int | None = None
  missing: str = ''


def names_of(network: str) -> tuple[str, ...]:
  """Returns the names of all figures of a feature network, in the order of the table."""
  neighbourhoods = tuple(f'{name}_{network}' for name in NEIGHBOURHOODS)
  if network == 'inception':
    return ('fid', 'kid', 'is', *neighbourhoods)
  return (f'fd_{network}', f'kd_{network}', *neighbourhoods)


def distance_names(network: str) -> tuple[str, str]:
  """Returns the names of the Fréchet and the kernel distance of a network."""
  fd, kd = names_of(network)[:2]
  return fd, kd


def network_of(measure: str) -> str:
  """Returns the feature network that a figure is of.

  Raises:
    UserError: for a name that is no figure of any network.
  """
  for network in NAMES:
    if measure in names_of(network):
      return network
  valid = ', '.join(name for network in NAMES for name in names_of(network)[:2])
  raise UserError(f'train.best_measure is {measure!r}; valid: val/<metric of the stage>, {valid}, ...')


def weights_of_best(config: ConfigDict, stages: Iterable[str]) -> tuple[str, ...]:
  """Returns the names of the published weights by which stages are to be kept at their best."""
  found = [config[stage].train.best_measure for stage in stages if 'train' in config[stage]]
  named = [network_of(measure) for measure in found if measure and not measure.startswith('val/')]
  return tuple(PUBLISHED[name] for name in dict.fromkeys(named) if name in PUBLISHED)


def least_of(network: str, settings: ConfigDict) -> dict[str, int]:
  """Returns how many images a figure needs at least, by figure of a network."""
  least = dict.fromkeys(names_of(network), settings.num_neighbours + 1)
  least |= dict.fromkeys(distance_names(network), 2)
  return {name: kernel.LEAST_SCORED if name == 'is' else count for name, count in least.items()}


def counts_of(network: str, count: int, settings: ConfigDict) -> dict[str, int]:
  """Returns of how many of `count` images a figure is, by figure of a network."""
  whole = (distance_names(network)[0], 'is')
  return {name: count if name in whole else min(count, settings.max_features) for name in names_of(network)}


def missing(network: str, features: Features, others: Features, settings: ConfigDict) -> dict[str, str]:
  """Returns why figures of a network cannot be computed, by figure; {} where all can.

  Args:
    network: its name.
    features: of the images.
    others: of the real ones.
    settings: `config.evaluate`.
  """
  if not (np.isfinite(features).all() and np.isfinite(others).all()):
    return dict.fromkeys(names_of(network), f'what {network} sees in the images is not finite')
  counts, counts_real = (counts_of(network, len(x), settings) for x in (features, others))
  reasons = {}
  for name, least in least_of(network, settings).items():
    have, real = counts[name], least if name == 'is' else counts_real[name]
    if min(have, real) < least:
      why = f' ({FIELDS})' if name.split('_')[0] in NEIGHBOURHOODS else ''
      compared = '' if name == 'is' else f', compared with {real}'
      reasons[name] = f'needs at least {least} images{why}, there are {have}{compared}'
  return reasons


def of_features(
  network: str,
  seen: dict[str, np.ndarray],
  reference: Reference,
  settings: ConfigDict,
  absent: Mapping[str, str],
) -> dict[str, float]:
  """Returns the figures of a set of images from what a network saw in them, but for those that are absent.

  Args:
    network: its name.
    seen: 'features' [n, d] and, of Inception, 'logits' [n, 1008].
    reference: the real images.
    settings: `config.evaluate`.
    absent: what `missing` returns of these features.
  """
  features, most = seen['features'], settings.max_features
  values = distances(network, features, reference, settings, absent)
  names = set(names_of(network)) - absent.keys()
  if 'is' in names:
    values['is'], _ = kernel.inception_score(seen['logits'])
  if f'precision_{network}' in names:
    near = precision_recall.precision_recall(
      reference.features[:most],
      features[:most],
      settings.num_neighbours,
      reference.radii_squared(most, settings.num_neighbours),
    )
    values |= {f'{name}_{network}': value for name, value in near.items()}
  return values


def distances(
  network: str, features: Features, reference: Reference, settings: ConfigDict, absent: Mapping[str, str]
) -> dict[str, float]:
  """Returns Fréchet and kernel distance of feature vectors [n, d] to the reference; {} where they are absent.

  Args:
    network: its name.
    features: of the images.
    reference: the real images.
    settings: `config.evaluate`.
    absent: what `missing` returns of these features.
  """
  fd, kd = distance_names(network)
  if fd in absent:
    return {}
  return {
    fd: frechet_to(features, reference),
    kd: kernel_to(features, reference.features, settings),
  }


def frechet_to(features: Features, reference: Reference) -> float:
  """Returns the Fréchet distance to the reference; exact also where there are few images."""
  whole = len(reference.features) == reference.moments.count
  if whole and min(len(features), reference.moments.count) <= features.shape[1]:
    return frechet.frechet_distance_of(features, reference.features)
  return frechet.frechet_distance(Moments.of(features), reference.moments)


def kernel_to(features: Features, others: Features, settings: ConfigDict) -> float:
  """Returns the mean kernel distance over random subsets."""
  most = settings.max_features
  value, _ = kernel.kernel_distance(
    features[:most],
    others[:most],
    num_subsets=settings.kernel_subsets,
    subset_size=settings.kernel_subset_size,
  )
  return value


def floor(
  network: str, count: int, held_out: Features, reference: Reference, settings: ConfigDict
) -> tuple[dict[str, float], int]:
  """Returns the distances that real images get at `count` images, and at how many they were taken.

  `count` held-out images against the training split. Where there are fewer, both are pooled, and `count`
  images (at most half) drawn at random are compared with the others. {} where that is too few.
  """

  def compared(features: Features, others: Reference) -> dict[str, float]:
    absent = missing(network, features, others.features, settings)
    return distances(network, features, others, settings, absent)

  if len(held_out) >= count:
    return compared(held_out[:count], reference), count
  pool = np.concatenate([reference.features, held_out])
  pool = pool[np.random.default_rng(0).permutation(len(pool))]
  count = min(count, len(pool) // 2)
  rest = dataclasses.replace(reference, moments=Moments.of(pool[count:]), features=pool[count:])
  return compared(pool[:count], rest), count


def class_accuracy(logits: np.ndarray, asked: np.ndarray) -> float:
  """Returns the share of samples whose largest logit [n, classes] is that of the class asked for [n]."""
  return float(np.mean(np.argmax(logits, axis=1) == asked))


def over_seeds(values: list[dict[str, float]]) -> dict[str, Figure]:
  """Returns mean and spread of every figure over seeds."""
  figures = {}
  for name in values[0]:
    column = np.array([value[name] for value in values])
    spread = float(column.std(ddof=1)) if len(column) > 1 else None
    figures[name] = Figure(value=float(column.mean()), spread=spread)
  return figures


def mean_with_error(values: np.ndarray) -> Figure:
  """Returns the mean over images and its standard error (ddof 1), none of a single image.

  Args:
    values: [n], one of each image, n >= 1.

  Returns:
    A figure of n images; where values are not finite one that says of how many images, and has no value.
  """
  bad = int(np.sum(~np.isfinite(values)))
  if bad:
    return Figure(missing=f'it is not finite for {bad} of {len(values)} evaluation images')
  error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
  return Figure(value=float(values.mean()), spread=error, n=len(values))
