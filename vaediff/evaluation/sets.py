"""Rows of sets of samples: drawn in batches, turned into feature vectors, and let go.

Only features and the first images of a seed are held. Samples are compared with the training split.
"""

import dataclasses
import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vaediff.data import sources
from vaediff.evaluation import measures, plots, precision_recall
from vaediff.evaluation.measures import Figure
from vaediff.evaluation.networks import Networks
from vaediff.evaluation.references import Reference, reference
from vaediff.run import draw, log
from vaediff.run.trained import Trained

FOLDER = 'evaluation'
SHOWN = 8
"""Samples that are shown beside their nearest training images."""
DATA = 'evaluation images'


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
    train={name: reference(config, 'train', network) for name, network in opened.features.items()},
    held_out={name: reference(config, 'eval', network) for name, network in opened.features.items()},
  )


def name_of(trained: Trained) -> str:
  """Returns `evaluate.name`, or one made of stage, sampler and number of steps."""
  if trained.config.evaluate.name:
    return trained.config.evaluate.name
  settings = trained.settings
  parts = [trained.stage]
  if 'sampler' in settings:
    parts += [settings.sampler, str(settings.num_steps)]
  if settings.checkpoint != 'latest':
    parts.append(settings.checkpoint)
  return '-'.join(parts)


def draw_sets(trained: Trained, opened: Networks, seed: int, count: int, keep: int) -> dict[str, Drawn]:
  """Returns the sets of samples of one seed by name: what a stage draws, such as 'x0_vae' and 'x0'."""
  size = min(trained.settings.batch_size, count)
  streams, first, seconds, timed = {}, {}, 0.0, 0
  batches = list(draw.batches(count, size))
  for indices in batches[:1] if len(batches) == 1 else []:
    trained.draw(indices, seed=seed)  # compiles, so that the one batch can be timed
  for number, indices in enumerate(batches):
    started = time.monotonic()
    images = trained.draw(indices, seed=seed)
    if number or len(batches) == 1:
      seconds, timed = seconds + time.monotonic() - started, timed + size
    fresh = min(size, count - int(indices[0]))
    for name, value in images.items():
      if name not in streams:
        streams[name] = {network: features.stream() for network, features in opened.features.items()}
        first[name] = []
      for stream in streams[name].values():
        stream.add(value[:fresh])
      if sum(map(len, first[name])) < keep:
        first[name].append(value[:fresh])
  return {
    name: Drawn(
      seen={network: stream.finish() for network, stream in by_network.items()},
      first=np.concatenate(first[name])[:keep],
      seconds_per_image=seconds / timed,
    )
    for name, by_network in streams.items()
  }


def sample_rows(trained: Trained, opened: Networks, real: Real) -> list[dict[str, Any]]:
  """Returns one row per kind of sample, with the spread over seeds, and one of the evaluation images.

  A stage whose samples need an image, as an autoencoder's do, has none of its own, only reconstructions.
  """
  settings, count = trained.config.evaluate, trained.config.evaluate.num_images
  keep = min(count, max(settings.num_memorisation, 2 * settings.num_diversity_pairs, SHOWN))
  by_seed = []
  for k in range(settings.num_seeds if trained.draws_alone else 0):
    log.say(f'drawing {count} samples with seed {trained.settings.seed + k}')
    by_seed.append(draw_sets(trained, opened, trained.settings.seed + k, count, keep))
  floors = floors_at(count, real, settings)
  rows = []
  for name, first in (by_seed[0] if by_seed else {}).items():
    figures = figures_of([sets[name] for sets in by_seed], opened, real.train, settings)
    label = title_of(trained, name)
    shown_before = name != list(by_seed[0])[-1]
    rows.append(
      {
        'set': f'{label} samples',
        'N': count,
        'seeds': settings.num_seeds,
        'sampler': trained.settings.sampler if 'sampler' in trained.settings and not shown_before else '',
        'NFE': 0 if shown_before else trained.experiment.num_function_evaluations,
        'seconds per image': Figure(missing='drawn together with the refined samples')
        if shown_before
        else over(by_seed, name),
        **with_floors(figures, floors),
        **of_images(trained, opened, first.first),
      }
    )
  rows.append(data_row(trained, opened, real, count, keep))
  if by_seed:
    add_memorisation(trained, rows, {name: sets.first for name, sets in by_seed[0].items()}, keep)
  return rows


def title_of(trained: Trained, name: str) -> str:
  """Returns what the images of a name are called in a table."""
  titles = trained.experiment.titles
  return titles[name] if name in titles else trained.stage


def over(by_seed: list[dict[str, Drawn]], name: str) -> Figure:
  """Returns the median over seeds of the seconds per image."""
  return Figure(value=float(np.median([sets[name].seconds_per_image for sets in by_seed])))


def figures_of(
  sets: list[Drawn], opened: Networks, references: dict[str, Reference], settings: ConfigDict
) -> dict[str, Figure]:
  """Returns the figures of one kind of sample over seeds, and why the others are missing."""
  figures = {}
  for network in settings.extractors:
    if network in opened.missing:
      figures |= {name: Figure(missing=opened.missing[network]) for name in measures.names_of(network)}
      continue
    values = [
      measures.of_features(network, drawn.seen[network], references[network], settings) for drawn in sets
    ]
    figures |= measures.over_seeds(values)
  return figures


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
  """Returns the row of the evaluation images: what a perfect sampler would get at that N."""
  settings = trained.config.evaluate
  figures = {}
  for network, held_out in real.held_out.items():
    seen = {'features': held_out.features[:count]}
    if network == 'inception':
      limit = min(count, len(trained.eval_source))
      parts = opened.features[network].of_source(trained.eval_source, limit)
      seen['logits'] = np.concatenate([part['logits'] for part in parts])
    values = measures.of_features(network, seen, real.train[network], settings)
    figures |= {name: Figure(value=value) for name, value in values.items()}
  available = min(count, len(trained.eval_source))
  image = trained.eval_source.read(np.arange(min(keep, available)))['image']
  return {'set': DATA, 'N': available, **figures, **of_images(trained, opened, image)}


def of_images(trained: Trained, opened: Networks, image: np.ndarray) -> dict[str, Figure]:
  """Returns the LPIPS diversity: the mean LPIPS of disjoint pairs of images of the set."""
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
  return {name: Figure(value=float(distances.mean()))}


def add_memorisation(
  trained: Trained, rows: list[dict[str, Any]], first: dict[str, np.ndarray], keep: int
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
    row['nearest_training_rmse'] = Figure(value=float(rmse[part].mean()))
  shown = parts[-2][:SHOWN]
  path = trained.workdir / FOLDER / f'{name_of(trained)}-nearest.png'
  if jax.process_index() == 0:
    plots.pairs(path, sets[-2][: len(shown)], train.read(nearest.index[shown])['image'])
    log.say(f'wrote {path}: samples, and under each the nearest training image')


def flat(image: np.ndarray) -> np.ndarray:
  """Returns uint8 images as rows of pixels in [0, 1]."""
  return image.reshape(len(image), -1).astype(np.float64) / 255
