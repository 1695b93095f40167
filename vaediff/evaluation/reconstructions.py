"""Rows of reconstructions: the evaluation split encoded and drawn again, compared with itself.

So their distances have no floor: they are 0 where every image is its reconstruction.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vaediff.data import sources
from vaediff.evaluation import measures, quality
from vaediff.evaluation.frechet import Moments
from vaediff.evaluation.measures import Figure
from vaediff.evaluation.networks import Networks
from vaediff.evaluation.references import Reference
from vaediff.evaluation.sets import Real, distances_of, taken_for, title_of
from vaediff.run import log
from vaediff.run.trained import Trained


def reconstruction_rows(trained: Trained, opened: Networks, real: Real) -> list[dict[str, Any]]:
  """Returns one row per kind of reconstruction of the evaluation split; [] without any."""
  if not trained.experiment.reconstructs:
    return []
  settings, source = trained.config.evaluate, trained.eval_source
  count = min(settings.num_reconstructions, len(source))
  if count < len(source):
    count = min(count, settings.max_features)  # of so many images the features are kept
  log.say(f'reconstructing {count} evaluation images')
  parts, streams, edges, of_data, labels = {}, {}, {}, [], []
  for indices, image, label in in_chunks(source, count, settings.batch_size):
    given = trained.observe(image, label)
    of_data.append(quality.sharpness_of_each(image))
    labels.append(label)
    for name, value in trained.draw_all(given, first=int(indices[0])).items():
      if name not in streams:
        streams[name] = {network: features.stream() for network, features in opened.features.items()}
      for stream in streams[name].values():
        stream.add(value)
      edges.setdefault(name, []).append(quality.sharpness_of_each(value))
      for measure, figures in pair_figures(opened, image, value).items():
        parts.setdefault(name, {}).setdefault(measure, []).append(figures)
  rows = []
  for name, by_measure in parts.items():
    figures = {measure: mean_of(values) for measure, values in by_measure.items()}
    figures['sharpness'] = over(mean_of(edges[name]), mean_of(of_data))
    figures |= missing_pair_figures(settings, opened, source)
    seen = {network: stream.finish() for network, stream in streams[name].items()}
    if source.num_classes and measures.CLASSIFIER in settings.extractors:
      figures |= taken_for(np.concatenate(labels), opened, [seen], len(source))
    for network in settings.extractors:
      if network in opened.missing:
        names = measures.distance_names(network)
        figures |= {f'r{key}': Figure(missing=opened.missing[network]) for key in names}
        continue
      held_out = of_first(real.held_out[network], count, len(source))
      found = distances_of(network, [seen[network]['features']], held_out, settings)
      figures |= {f'r{key}': figure for key, figure in found.items()}
    label = title_of(trained, name)
    rows.append({'set': f'{label} reconstructions', 'N': count, **figures})
  return rows


def of_first(held_out: Reference, count: int, total: int) -> Reference:
  """Returns the statistics of the first `count` of the `total` images of a split, whose features are kept."""
  if count == total:
    return held_out
  kept = held_out.features[:count]
  return dataclasses.replace(held_out, moments=Moments.of(kept), features=kept)


def in_chunks(source: sources.Source, count: int, size: int) -> Iterator[tuple[np.ndarray, ...]]:
  """Yields indices, uint8 images and labels of the first `count` images."""
  for start in range(0, count, size):
    indices = np.arange(start, min(start + size, count))
    batch = source.read(indices)
    yield indices, batch[sources.IMAGE], batch[sources.LABEL]


def pair_figures(opened: Networks, image: np.ndarray, value: np.ndarray) -> dict[str, np.ndarray]:
  """Returns the figures of every pair of image and reconstruction."""
  figures = {'mse': np.mean((image.astype(np.float64) - value) ** 2, axis=(1, 2, 3)) / 255**2}
  figures['psnr'] = quality.psnr_of_each(image, value)
  if min(image.shape[1:3]) >= quality.SSIM_SIDE:
    figures['ssim'] = quality.ssim_of_each(image, value)
  if opened.lpips:
    figures[opened.lpips.lpips.name] = opened.lpips(image, value)
  return figures


def missing_pair_figures(settings: ConfigDict, opened: Networks, source: sources.Source) -> dict[str, Figure]:
  """Returns the figures of pairs that cannot be computed, and why."""
  figures = {}
  side = min(source.image_shape[:2])
  if side < quality.SSIM_SIDE:
    figures['ssim'] = Figure(
      missing=f'its window has {quality.SSIM_SIDE} pixels a side, the images have {side}'
    )
  if settings.lpips and opened.lpips is None:
    figures[settings.lpips] = Figure(missing=opened.missing[settings.lpips])
  return figures


def over(drawn: Figure, real: Figure) -> Figure:
  """Returns the ratio of two means; none where that of the real images is 0."""
  if not real.value:
    return Figure(missing='the real images have no edges')
  return Figure(value=drawn.value / real.value)


def mean_of(parts: list[np.ndarray]) -> Figure:
  """Returns the mean over images."""
  return Figure(value=float(np.concatenate(parts).mean()))
