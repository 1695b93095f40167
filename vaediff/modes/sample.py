"""`--mode=sample`: draws images and writes them as a grid, an npz, or one file each."""

import contextlib
import json
import pathlib

import jax
import numpy as np

from vaediff.data import sources
from vaediff.errors import UserError
from vaediff.evaluation import report
from vaediff.modes import pictures
from vaediff.run import chain, classes, draw, images, log
from vaediff.run.config import Run
from vaediff.run.trained import Trained, open_last, say_figures
from vaediff.storage import files


def mode(run: Run) -> None:
  """Draws samples of the last stage and prints their figures."""
  out = pictures.out_of(run)
  say_figures(sample(open_last(run), out))


def sample(trained: Trained, out: pathlib.Path | None = None) -> dict[str, float]:
  """Draws `sample.num_images` images; writes `samples.png` and, with `save_npz`, `samples.npz` (uint8).

  With `save_images` also one PNG per image, `samples/<index>.png`, which take the place of those of an
  earlier call once all are drawn. All say what they were made of. Holds one batch of noise at a time. Image i
  depends on `sample.seed` and i alone. Samples that come in kinds, such as classes, have a row each. Which
  classes those are is said, and `samples.npz` holds the class of each image beside it. The captions that they
  have stand above them, and are in `samples.npz` too.
  Where other stages are sampled before it, the network evaluations and the seconds of each are said.
  A stage that can only repeat images, as an autoencoder does, draws those of the evaluation split.

  Args:
    trained: the stage.
    out: folder to write to; None = the run's.
  """
  settings, count, made_of = trained.settings, trained.settings.num_images, trained.made_of
  shown, stored, folder = {}, {}, pictures.folder_of(trained, out)
  with_vae = 'with_vae' not in settings or settings.with_vae
  with pictures.whole_set(folder) if settings.save_images else contextlib.nullcontext() as each:
    for indices, num_real in draw.padded_batches(count, min(settings.batch_size, count)):
      first = int(indices[0])
      drawn = {name: value[:num_real] for name, value in trained.draw(indices).items()}
      if each:
        pictures.write_each(each, first, drawn, with_vae, made_of)
      for name, value in drawn.items():
        if first < pictures.MAX_IN_GRID:
          shown.setdefault(name, []).append(value)
        if settings.save_npz:
          whole = stored.setdefault(name, np.empty((count, *value.shape[1:]), np.uint8))
          whole[first : first + num_real] = value
  columns = {name: np.concatenate(value)[: pictures.MAX_IN_GRID] for name, value in shown.items()}
  if not with_vae:
    columns = dict([columns.popitem()])  # the stage's own
  kinds = trained.class_source.num_groups
  order = images.in_groups(len(next(iter(columns.values()))), kinds)
  groups = len(order) // kinds if 0 < kinds <= len(order) else max(1, round(np.sqrt(len(order))))
  picture = images.side_by_side(*(value[order] for value in columns.values()))
  texts = captions_of(trained, np.repeat(order, len(columns)))
  pictures.write_captioned(trained, 'samples', picture, groups * len(columns), texts, out)
  asked = trained.class_source.classes_of(np.arange(count))
  if asked is not None:
    say_classes(trained, order)
  if settings.save_npz:
    path = pictures.path_of(trained, 'samples', 'npz', out)
    beside = {} if asked is None else {sources.LABEL: asked}
    if texts:
      beside['captions'] = np.array(captions_of(trained, np.arange(count)))
    if jax.process_index() == 0:
      files.write_npz(path, {**stored, **beside, 'provenance': json.dumps(made_of, sort_keys=True)})
    log.say(f'wrote {path}')
  if settings.save_images:
    log.say(f'wrote {count} images to {folder}')
  if trained.experiment.makers:
    log.say(report.table(chain.cost_rows(trained)))
  return {'num_images': float(count)}


def captions_of(trained: Trained, indices: np.ndarray) -> list[str]:
  """Returns the captions of samples with these indices; [] where the stage reads none."""
  known = trained.captions
  return [known[i % len(known)] for i in indices.tolist()] if known else []


def say_classes(trained: Trained, order: np.ndarray) -> None:
  """Prints number and name of the classes that are shown, row by row; without the data there are no names.

  Args:
    trained: the stage.
    order: the images of the grid, as they are shown.
  """
  numbers = tuple(dict.fromkeys(trained.class_source.classes_of(order).tolist()))
  try:
    names = sources.open_source(trained.config.data, 'eval').label_names
  except UserError as error:
    log.say(f'the names of the classes are those of the data set, which cannot be opened: {error}')
    names = ()
  a_row_each = len(order) >= trained.class_source.num_groups > 0
  log.say(f'{"rows" if a_row_each else "classes"}: {classes.listed(names, numbers)}')
