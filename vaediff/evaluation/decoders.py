"""Rows of decoders: the same codes of evaluation images, drawn again by every decoder that a run has.

What a decoder is judged by beside its distances:

  mse of the mean   of the mean of n samples of the same codes. A sample x' of the posterior p(x | codes) has
                    E|x - x'|^2 = 2 v, with v that of the posterior's mean, and the mean of n has (1 + 1/n) v:
                    'by the law' is what follows for it from the error of one sample. A decoder whose samples
                    are all alike has an error of the mean above it, one that strays from the posterior below.
  sharpness         variance of the Laplacian of drawn images over that of the real ones
  diversity         mean squared difference of two samples of the same codes, over that of the first decoder
                    that draws with noise
  same class        share of images of which two samples of the same codes are of one class, says the data
                    set's own classifier

Samples are drawn without `sample.rerank`: the best of several by a CLIP stage is no sample of the posterior.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vaediff.data import pixels
from vaediff.evaluation import against_teacher, measures, quality, timing
from vaediff.evaluation.measures import Figure
from vaediff.evaluation.networks import Networks
from vaediff.evaluation.reconstructions import (
  mean_of,
  missing_pair_figures,
  of_first,
  pair_figures,
  ratio_figure,
)
from vaediff.evaluation.sets import Real, distance_figures, title_of
from vaediff.run import checkpoint, draw, log, scoring
from vaediff.run.trained import Trained
from vaediff.storage import identity

Sets = np.ndarray
"""uint8 [samples, images, height, width, channels]: of each image several samples."""
Decoder = tuple[str, Sets, dict[str, Any]]
"""What it is called, what it draws, and what it costs."""


def decoder_rows(trained: Trained, opened: Networks, real: Real) -> list[dict[str, Any]]:
  """Returns one row per decoder of the codes that a stage reads; [] where it reads none, or none is wanted.

  First what is shown beside a sample, such as what the tokenizer's own decoder makes; then the first teacher
  of the stage by each of `evaluate.decoders.samplers`; then those of its students that are trained.
  """
  settings = trained.config.evaluate
  if not trained.experiment.reads_codes or not settings.decoders.num_images:
    return []  # the teachers of a student are opened where they decode, and nowhere else
  root = against_teacher.chain(trained)[0]
  count, total = settings.decoders.num_images, len(root.eval_source)
  if count < total:
    count = min(count, settings.max_features)  # of so many images the features are kept
  image, label = root.eval_images(count)
  given = root.observe(image, label)
  rows, spread = [], 0.0
  for title, sets, cost in decoders(root, trained, given, settings.decoders):
    found = {**cost, **figures_of(image, sets, opened)}
    if len(sets) > 1:
      own = float(np.mean((sets[0].astype(np.float64) - sets[1]) ** 2))
      spread = spread or own
      found['diversity'] = Figure(value=own / spread if spread else float('nan'))
      found |= same_class(sets, opened)
    found |= missing_pair_figures(settings, opened, root.eval_source)
    found |= distances(sets[0], opened, real, settings, total)
    rows.append({'decoder': title, 'N': len(image), **found})
  return rows


def decoders(
  root: Trained, trained: Trained, given: draw.HostArrays, settings: ConfigDict
) -> Iterator[Decoder]:
  """Yields the decoders of the codes `given`, one after the other."""
  yield from shown(root, given)
  runs = [root.with_settings(sampler=name, num_steps=steps) for name, steps in settings.samplers]
  for run in map(scoring.unranked, [*runs, *students(root, trained)]):
    columns = run.experiment.columns()
    log.say(f'decoding with {run.stage}, {columns.sampler} in {columns.steps} steps')
    sets, seconds = [], []
    for k in range(settings.num_samples):
      seed = (run.settings.seed + k * against_teacher.SECOND_SEED) % 2**31
      images, each = in_batches(
        run.settings.batch_size, given, functools.partial(drawn, run, seed), compiled=k > 0
      )
      sets.append(draw.own_image(images))
      seconds.append(each)
    cost = {'NFE': run.experiment.num_function_evaluations, 'seconds per 100 images': 100 * min(seconds)}
    yield f'{run.stage}, {columns.sampler} {columns.steps}', np.stack(sets), cost


def students(root: Trained, trained: Trained) -> list[Trained]:
  """Returns the trained students of a stage that the run of `trained` has, in their order.

  One that does not belong to the stage as it is now is said, and left out.
  """
  found = []
  for stage in trained.config.stages:
    taught = 'teacher' in trained.config[stage]
    if taught and checkpoint.latest_step(trained.workdir / stage) is not None:
      try:
        student = Trained(trained.config, trained.workdir, stage, trained.mesh)
        first = against_teacher.chain(student)[0]
      except identity.Stale as error:
        log.say(f'without the student {stage!r}: {error}')
        continue
      if (first.stage, first.opened.id) == (root.stage, root.opened.id):
        found.append(student)
  return found


def shown(root: Trained, given: draw.HostArrays) -> Iterator[Decoder]:
  """Yields what is made of the codes without the stage's network, and shown beside its samples."""
  conditions = root.experiment.conditions

  @jax.jit
  def show(read: Any, given: Any) -> dict[str, jax.Array]:
    images = conditions.shown(conditions.complete(read, given))
    return {name: pixels.to_bytes(image) for name, image in images.items()}

  make = lambda indices, rows: jax.device_get(show(root.read, rows))
  parts, each = in_batches(root.settings.batch_size, given, make, compiled=False)
  for name, images in parts.items():
    yield title_of(root, name), images[None], {'NFE': 0, 'seconds per 100 images': 100 * each}


def drawn(run: Trained, seed: int, indices: np.ndarray, rows: draw.HostArrays) -> draw.HostArrays:
  """Returns one sample for each row of codes."""
  return run.draw(indices, rows, seed)


def in_batches(
  size: int, given: draw.HostArrays, make: Callable[..., draw.HostArrays], *, compiled: bool
) -> tuple[draw.HostArrays, float]:
  """Returns what is made of all rows, by name, and the seconds per image; see `timing.timed_batches`."""
  count = len(next(iter(given.values())))
  parts, seconds = {}, []
  make_of = lambda indices: make(indices, {name: value[indices] for name, value in given.items()})
  for made, num_real, each in timing.timed_batches(count, min(size, count), make_of, compiled=compiled):
    seconds += [] if each is None else [each]
    for name, value in made.items():
      parts.setdefault(name, []).append(np.asarray(value)[:num_real])
  return {name: np.concatenate(part) for name, part in parts.items()}, float(np.median(seconds))


def figures_of(image: np.ndarray, sets: Sets, opened: Networks) -> dict[str, Figure]:
  """Returns the figures of images beside the real ones: errors of a sample, those of the mean, sharpness."""
  figures = {name: mean_of([values]) for name, values in pair_figures(opened, image, sets[0]).items()}
  if len(sets) > 1:
    # one set at a time: in float64 all are as large as 32 of them
    one = float(np.mean([np.mean((each.astype(np.float64) - image) ** 2) for each in sets])) / 255**2
    mean = float(np.mean((sets.mean(axis=0, dtype=np.float64) - image) ** 2)) / 255**2
    figures['mse'] = Figure(value=one)  # over all samples
    figures['mse of the mean'] = Figure(value=mean, n=len(sets))
    figures['by the law'] = Figure(value=one * (1 + 1 / len(sets)) / 2)
  edges = [mean_of([quality.sharpness_of_each(each)]) for each in (sets[0], image)]
  return {**figures, 'sharpness': ratio_figure(*edges)}


def same_class(sets: Sets, opened: Networks) -> dict[str, Figure]:
  """Returns how often two samples of the same codes are of one class; {} without the own classifier."""
  if measures.CLASSIFIER not in opened.features:
    return {}
  classify = opened.features[measures.CLASSIFIER]
  one, another = (np.argmax(classify(images)['logits'], axis=1) for images in sets[:2])
  return {'same class': Figure(value=float(np.mean(one == another)))}


def distances(
  images: np.ndarray, opened: Networks, real: Real, settings: ConfigDict, total: int
) -> dict[str, Figure]:
  """Returns the distances to the first images of the evaluation split, and why others are missing.

  Args:
    images: what is made of the codes of these.
    opened: the feature networks.
    real: the real images, as they see them.
    settings: the section `evaluate`.
    total: how many images the split has.
  """
  figures = {}
  for network in settings.extractors:
    if network in opened.missing:
      names = measures.distance_names(network)
      figures |= {f'r{name}': Figure(missing=opened.missing[network]) for name in names}
      continue
    stream = opened.features[network].stream()
    stream.add(images)
    held_out = of_first(real.held_out[network], len(images), total)
    found = distance_figures(network, [stream.finish()['features']], held_out, settings)
    figures |= {f'r{name}': figure for name, figure in found.items()}
  return figures
