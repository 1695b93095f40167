"""Rows of reconstructions: the evaluation split encoded and drawn again, compared with itself.

So their distances have no floor: they are 0 where every image is its reconstruction.
"""

import dataclasses
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vaediff.data import sources
from vaediff.evaluation import measures, quality
from vaediff.evaluation.asked_classes import classifier_accuracy
from vaediff.evaluation.frechet import Moments
from vaediff.evaluation.measures import Figure
from vaediff.evaluation.networks import Networks
from vaediff.evaluation.references import Reference
from vaediff.evaluation.sets import Real, distance_figures, title_of
from vaediff.run import draw, log
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
  collected, of_data, labels = {}, [], []
  for indices, num_real in draw.padded_batches(count, min(trained.settings.batch_size, count)):
    batch = source.read(indices)
    image, label = batch[sources.IMAGE], batch[sources.LABEL]
    drawn = trained.draw(indices, trained.observe(image, label))
    image = image[:num_real]
    of_data.append(quality.sharpness_of_each(image))
    labels.append(label[:num_real])
    for name, value in drawn.items():
      if name not in collected:
        collected[name] = Reconstructions(opened)
      collected[name].add(image, value[:num_real])
  rows = []
  for name, found in collected.items():
    figures = found.pair_figures()
    figures['sharpness'] = ratio_figure(mean_of(found.edges), mean_of(of_data))
    figures |= missing_pair_figures(settings, opened, source)
    seen = found.seen()
    if source.num_classes and measures.CLASSIFIER in settings.extractors:
      figures |= classifier_accuracy(np.concatenate(labels), opened, [seen], len(source))
    for network in settings.extractors:
      if network in opened.missing:
        names = measures.distance_names(network)
        figures |= {f'r{key}': Figure(missing=opened.missing[network]) for key in names}
        continue
      held_out = of_first(real.held_out[network], count, len(source))
      distances = distance_figures(network, [seen[network]['features']], held_out, settings)
      figures |= {f'r{key}': figure for key, figure in distances.items()}
    label = title_of(trained, name)
    rows.append({'set': f'{label} reconstructions', 'N': count, **figures})
  return rows


class Reconstructions:
  """What is measured of reconstructions of one kind that come in batches; few of the images are held.

  Args:
    opened: the networks that see them.
  """

  def __init__(self, opened: Networks):
    self._streams = {name: features.stream() for name, features in opened.features.items()}
    self._lpips = opened.lpips.lpips.name if opened.lpips else ''
    self._pairs = opened.lpips.stream() if opened.lpips else None
    self._figures = {}
    self.edges = []
    """The sharpness of each image, a part for each batch."""

  def add(self, image: np.ndarray, value: np.ndarray) -> None:
    """Takes images and their reconstructions, uint8 [n, h, w, c]."""
    for stream in self._streams.values():
      stream.add(value)
    if self._pairs:
      self._pairs.add(np.stack([image, value], axis=1))
    self.edges.append(quality.sharpness_of_each(value))
    for measure, figures in pixel_figures(image, value).items():
      self._figures.setdefault(measure, []).append(figures)

  def pair_figures(self) -> dict[str, Figure]:
    """Returns the means of the figures of `pair_figures` over all pairs; to be called once."""
    figures = {measure: mean_of(parts) for measure, parts in self._figures.items()}
    if self._pairs:
      figures[self._lpips] = mean_of([self._pairs.finish()['distance']])
    return figures

  def seen(self) -> dict[str, dict[str, np.ndarray]]:
    """Returns what each network saw in all reconstructions, by its name; to be called once."""
    return {name: stream.finish() for name, stream in self._streams.items()}


def of_first(held_out: Reference, count: int, total: int) -> Reference:
  """Returns the statistics of the first `count` of the `total` images of a split, whose features are kept."""
  if count == total:
    return held_out
  kept = held_out.features[:count]
  return dataclasses.replace(held_out, moments=Moments.of(kept), features=kept)


def pair_figures(opened: Networks, image: np.ndarray, value: np.ndarray) -> dict[str, np.ndarray]:
  """Returns the figures of every pair of image and reconstruction, uint8 [n, h, w, c]: by name, each [n]."""
  figures = pixel_figures(image, value)
  if opened.lpips:
    figures[opened.lpips.lpips.name] = opened.lpips(image, value)
  return figures


def pixel_figures(image: np.ndarray, value: np.ndarray) -> dict[str, np.ndarray]:
  """Returns those of `pair_figures` that no network is needed for; 'ssim' of images that hold its window."""
  figures = {'mse': np.mean((image.astype(np.float64) - value) ** 2, axis=(1, 2, 3)) / 255**2}
  figures['psnr'] = quality.psnr_of_each(image, value)
  if min(image.shape[1:3]) >= quality.SSIM_SIDE:
    figures['ssim'] = quality.ssim_of_each(image, value)
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


def ratio_figure(drawn: Figure, real: Figure) -> Figure:
  """Returns the ratio of two means; none where that of the real images is 0."""
  if not real.value:
    return Figure(missing='the real images have no edges')
  return Figure(value=drawn.value / real.value)


def mean_of(parts: list[np.ndarray]) -> Figure:
  """Returns the mean over images."""
  return Figure(value=float(np.concatenate(parts).mean()))
