"""Rows of sets of samples: drawn in batches, turned into feature vectors, and let go.

Only features and the first images of a seed are held. Samples are compared with the training split.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vaediff.data import sources
from vaediff.errors import UserError
from vaediff.evaluation import measures, plots, precision_recall, timing
from vaediff.evaluation.asked_classes import class_accuracy
from vaediff.evaluation.frechet import Features, Moments
from vaediff.evaluation.measures import Figure
from vaediff.evaluation.networks import FeatureNetwork, Networks
from vaediff.evaluation.references import Reference, reference
from vaediff.run import log, scoring
from vaediff.run.trained import Trained

FOLDER = 'evaluation'
SHOWN = 8
"""Samples that are shown beside their nearest training images."""
DATA = 'evaluation images'
LONGEST = 200
"""Bytes of `evaluate.name`: files whose names it begins must have one that a disk takes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Real:
  """The real images as the feature networks see them, by network."""

  train: dict[str, Reference]
  held_out: dict[str, Reference]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
  """One set of samples of one seed.

  Attributes:
    seen: what each network saw, by its name.
    first: the first images, uint8.
    seconds_per_image: of drawing, compilation left out.
  """

  seen: dict[str, dict[str, np.ndarray]]
  first: np.ndarray
  seconds_per_image: float


def real_images(config: ConfigDict, opened: Networks) -> Real:
  """Returns the statistics of both splits for every network, from the cache where they are there."""
  return Real(
    train={name: statistics(config, 'train', network) for name, network in opened.features.items()},
    held_out={name: statistics(config, 'eval', network) for name, network in opened.features.items()},
  )


def statistics(config: ConfigDict, split: str, network: FeatureNetwork) -> Reference:
  """Returns the statistics of a split; of a single image, which has no covariance to keep, its features."""
  source = sources.open_source(config.data, split)
  if len(source) > 1:
    return reference(config, split, network)
  (seen,) = network.of_source(source, 1)
  features = seen['features']
  return Reference(moments=Moments.of(features), features=features, split=split, provenance={'n': 1})


def name_of(trained: Trained) -> str:
  """Returns `evaluate.name`, or one made of stage, sampler and number of steps.

  Raises:
    UserError: for a name that is no name of a file in the folder.
  """
  name = trained.config.evaluate.name
  if name in ('.', '..') or any(sign in name for sign in '/\\\0\n') or len(name.encode()) > LONGEST:
    raise UserError(
      f'config.evaluate.name is {name!r}: it must be the name of a file, without a folder, of at most '
      f'{LONGEST} bytes'
    )
  if name:
    return name
  settings = trained.settings
  parts = [trained.stage]
  if 'sampler' in settings:
    parts += [settings.sampler, str(settings.num_steps)]
  if settings.checkpoint != 'latest':
    parts.append(settings.checkpoint)
  return '-'.join(parts)


def draw_sets(
  trained: Trained, opened: Networks, seed: int, count: int, keep: int, *, compiled: bool
) -> dict[str, Drawn]:
  """Returns the sets of samples of one seed by name: what a stage draws, such as 'x0_vae' and 'x0'.

  Args:
    trained: the stage.
    opened: the networks that see the samples.
    seed: of the samples.
    count: of samples.
    keep: how many images of each set are kept, the first.
    compiled: whether as many were drawn before, with any seed: then every batch is timed.
  """
  size = min(trained.settings.batch_size, count)
  streams, first, seconds = {}, {}, []
  make = lambda indices: trained.draw(indices, seed=seed)
  for images, num_real, each in timing.timed_batches(count, size, make, compiled=compiled):
    seconds += [] if each is None else [each]
    for name, value in images.items():
      if name not in streams:
        streams[name] = {network: features.stream() for network, features in opened.features.items()}
        first[name] = []
      for stream in streams[name].values():
        stream.add(value[:num_real])
      if sum(map(len, first[name])) < keep:
        first[name].append(value[:num_real])
  return {
    name: Drawn(
      seen={network: stream.finish() for network, stream in by_network.items()},
      first=np.concatenate(first[name])[:keep],
      seconds_per_image=float(np.mean(seconds)),
    )
    for name, by_network in streams.items()
  }


def sample_rows(trained: Trained, opened: Networks, real: Real, folder: pathlib.Path) -> list[dict[str, Any]]:
  """Returns one row per kind of sample, with the spread over seeds, and one of the evaluation images.

  A stage whose samples need an image, as an autoencoder's do, has none of its own, only reconstructions.
  `folder` is where pictures go.
  """
  settings, count = trained.config.evaluate, trained.config.evaluate.num_images
  keep = min(count, max(settings.num_memorisation, 2 * settings.num_diversity_pairs, SHOWN))
  by_seed = []
  for k in range(settings.num_seeds if trained.draws_alone else 0):
    seed = trained.settings.seed + k
    log.say(f'drawing {count} samples with seed {seed}')
    by_seed.append(draw_sets(trained, opened, seed, count, keep, compiled=k > 0))
  floors = floors_at(count, real, settings)
  rows = []
  for name, first in (by_seed[0] if by_seed else {}).items():
    figures = figures_of([sets[name] for sets in by_seed], opened, real.train, settings)
    seconds = [sets[name].seconds_per_image for sets in by_seed]
    label = title_of(trained, name)
    shown_before = name != list(by_seed[0])[-1]
    seen = [] if shown_before else [sets[name].seen for sets in by_seed]
    rows.append(
      {
        'set': f'{label} samples',
        'N': count,
        'seeds': settings.num_seeds,
        'sampler': trained.settings.sampler if 'sampler' in trained.settings and not shown_before else '',
        'NFE': 0 if shown_before else function_evaluations(trained),
        'seconds per image': Figure(missing='drawn together with the refined samples')
        if shown_before
        else Figure(value=timing.median_seconds_per_image(seconds)),
        **class_accuracy(trained, opened, seen, count),
        **with_floors(figures, floors),
        **lpips_diversity(trained, opened, first.first, count),
      }
    )
  rows.append(data_row(trained, opened, real, count, keep))
  if by_seed:
    add_memorisation(trained, rows, {name: sets.first for name, sets in by_seed[0].items()}, keep, folder)
  return rows


def function_evaluations(trained: Trained) -> int:
  """Returns the forward passes of the denoiser for an image that is kept, those of its candidates too."""
  return trained.experiment.num_function_evaluations * scoring.candidates_of(trained.settings)


def title_of(trained: Trained, name: str) -> str:
  """Returns what the images of a name are called in a table."""
  titles = trained.experiment.titles
  return titles[name] if name in titles else trained.stage


def figures_of(
  sets: list[Drawn], opened: Networks, references: dict[str, Reference], settings: ConfigDict
) -> dict[str, Figure]:
  """Returns the figures of one kind of sample over seeds, and why the others are missing."""
  figures = {}
  for network in settings.extractors:
    if network in opened.missing:
      figures |= {name: Figure(missing=opened.missing[network]) for name in measures.names_of(network)}
      continue
    seen = [drawn.seen[network] for drawn in sets]
    figures |= network_figures(network, seen, references[network], settings)
  return figures


def network_figures(
  network: str, seen: list[dict[str, np.ndarray]], reference: Reference, settings: ConfigDict
) -> dict[str, Figure]:
  """Returns all figures of a network over sets of one size, in the order of the table.

  Args:
    network: its name.
    seen: by set, what it saw: see `measures.of_features`.
    reference: the real images.
    settings: `config.evaluate`.
  """
  features, names = [each['features'] for each in seen], measures.names_of(network)
  absent = [measures.missing(network, each, reference.features, settings) for each in features]
  values = [
    measures.of_features(network, each, reference, settings, reasons)
    for each, reasons in zip(seen, absent, strict=True)
  ]
  return aggregate_figures(network, values, absent, len(features[0]), settings, names)


def distance_figures(
  network: str, features: list[Features], reference: Reference, settings: ConfigDict
) -> dict[str, Figure]:
  """Returns the distances of a network over sets of one size; see `network_figures`."""
  absent = [measures.missing(network, each, reference.features, settings) for each in features]
  values = [
    measures.distances(network, each, reference, settings, reasons)
    for each, reasons in zip(features, absent, strict=True)
  ]
  names = measures.distance_names(network)
  return aggregate_figures(network, values, absent, len(features[0]), settings, names)


def aggregate_figures(
  network: str,
  values: list[dict[str, float]],
  absent: list[dict[str, str]],
  count: int,
  settings: ConfigDict,
  names: Sequence[str],
) -> dict[str, Figure]:
  """Returns figures over sets; one that cannot be computed says why, one of fewer images of how many.

  Args:
    network: its name.
    values: by set, its figures.
    absent: by set, why it has no others: see `measures.missing`.
    count: of the images of a set.
    settings: `config.evaluate`.
    names: of the figures that are returned, in their order.
  """
  missing = {name: reason for reasons in absent for name, reason in reasons.items()}
  kept = [{name: value[name] for name in value if name not in missing} for value in values]
  figures = measures.over_seeds(kept) | {name: Figure(missing=reason) for name, reason in missing.items()}
  counts = measures.counts_of(network, count, settings)
  return {name: with_image_count(figures[name], counts[name], count) for name in names}


def with_image_count(figure: Figure, n: int, row_n: int) -> Figure:
  """Returns a figure that says of how many images it is, where those are not as many as its row says."""
  return figure if n == row_n or figure.value is None else dataclasses.replace(figure, n=n)


def floors_at(count: int, real: Real, settings: ConfigDict) -> dict[str, tuple[float, int]]:
  """Returns what real images get at `count` images, and at how many that was taken, by figure."""
  floors = {}
  for network, held_out in real.held_out.items():
    values, n = measures.floor(network, count, held_out.features, real.train[network], settings)
    floors |= {name: (value, n) for name, value in values.items()}
  return floors


def with_floors(figures: dict[str, Figure], floors: dict[str, tuple[float, int]]) -> dict[str, Figure]:
  """Returns the figures with their floors."""
  return {
    name: dataclasses.replace(figure, floor=floors[name][0], floor_n=floors[name][1])
    if name in floors and figure.value is not None
    else figure
    for name, figure in figures.items()
  }


def data_row(trained: Trained, opened: Networks, real: Real, count: int, keep: int) -> dict[str, Any]:
  """Returns the row of the evaluation images: what a perfect sampler would get at that N.

  Where features of fewer of them are kept, its N is their number.
  """
  settings = trained.config.evaluate
  count = min(count, len(trained.eval_source))
  count = min([count, *(len(held_out.features) for held_out in real.held_out.values())])
  figures = {}
  if trained.class_source.classes and measures.CLASSIFIER in opened.features:
    accuracy = Figure(value=opened.features[measures.CLASSIFIER].accuracy)
    figures[measures.CLASS_ACCURACY] = with_image_count(accuracy, len(trained.eval_source), count)
  for network, held_out in real.held_out.items():
    seen = {'features': held_out.features[:count]}
    if network == 'inception':
      parts = opened.features[network].of_source(trained.eval_source, count)
      seen['logits'] = np.concatenate([part['logits'] for part in parts])
    figures |= network_figures(network, [seen], real.train[network], settings)
  image = trained.eval_source.read(np.arange(min(keep, count)))['image']
  return {'set': DATA, 'N': count, **figures, **lpips_diversity(trained, opened, image, count)}


def lpips_diversity(trained: Trained, opened: Networks, image: np.ndarray, count: int) -> dict[str, Figure]:
  """Returns the LPIPS diversity: the mean LPIPS of disjoint pairs of the first images of a set of `count`."""
  settings = trained.config.evaluate
  if not settings.lpips:
    return {}
  name = f'diversity_{settings.lpips}'
  pairs = min(settings.num_diversity_pairs, len(image) // 2)
  if opened.lpips is None:
    return {name: Figure(missing=opened.missing[settings.lpips])}
  if pairs < 1:
    return {name: Figure(missing='needs at least two images')}
  distances = opened.lpips(image[: 2 * pairs : 2], image[1 : 2 * pairs : 2])
  return {name: with_image_count(Figure(value=float(distances.mean())), 2 * pairs, count)}


def add_memorisation(
  trained: Trained,
  rows: list[dict[str, Any]],
  first: dict[str, np.ndarray],
  keep: int,
  folder: pathlib.Path,
) -> None:
  """Adds 'nearest_training_rmse' (pixels in [0, 1]) to the rows; writes the nearest images of the last set.

  Samples that lie nearer to the training images than the evaluation images do are copies.
  """
  count = min(trained.config.evaluate.num_memorisation, keep)
  if not count:
    return
  available = min(count, len(trained.eval_source))
  sets = [value[:count] for value in first.values()]
  sets.append(trained.eval_source.read(np.arange(available))['image'])
  train = sources.open_source(trained.config.data, 'train')
  log.say(f'looking for the nearest of the {len(train)} training images')
  nearest = precision_recall.Nearest(np.concatenate([flat(value) for value in sets]))
  for start in range(0, len(train), precision_recall.CHUNK):
    chunk = np.arange(start, min(start + precision_recall.CHUNK, len(train)))
    nearest.add(flat(train.read(chunk)['image']))
  rmse = np.sqrt(nearest.squared / flat(sets[0]).shape[1])
  parts = np.split(np.arange(len(rmse)), np.cumsum([len(value) for value in sets])[:-1])
  for row, part in zip(rows, parts, strict=True):
    mean = Figure(value=float(rmse[part].mean()))
    row['nearest_training_rmse'] = with_image_count(mean, len(part), row['N'])
  shown = parts[-2][:SHOWN]
  path = folder / f'{name_of(trained)}-nearest.png'
  if jax.process_index() == 0:
    below = train.read(nearest.index[shown])['image']
    plots.pairs(path, sets[-2][: len(shown)], below, trained.made_of)
    log.say(f'wrote {path}: samples, and under each the nearest training image')


def flat(image: np.ndarray) -> np.ndarray:
  """Returns uint8 images as rows of pixels in [0, 1]."""
  return image.reshape(len(image), -1).astype(np.float64) / 255
