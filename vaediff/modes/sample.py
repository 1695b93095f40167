"""`--mode=sample`: draws images and writes them as a grid, an npz, or one file each."""

import contextlib
import json
import pathlib

import jax
import numpy as np

from vaediff import files
from vaediff.modes import pictures
from vaediff.run import draw, images, log
from vaediff.run.config import Run
from vaediff.run.trained import Trained, open_last, say_figures


def mode(run: Run) -> None:
  """Samples the last stage."""
  out = pictures.out_of(run)
  say_figures(sample(open_last(run), out))


def sample(trained: Trained, out: pathlib.Path | None = None) -> dict[str, float]:
  """Draws `sample.num_images` images; writes `samples.png` and, with `save_npz`, `samples.npz` (uint8).

  With `save_images` also one PNG per image, `samples/<index>.png`, which take the place of those of an
  earlier call once all are drawn. All say what they were made of. Holds one batch of noise at a time. Image i
  depends on `sample.seed` and i alone. Samples that come in kinds, such as classes, have a row each.
  A stage that can only repeat images, as an autoencoder does, draws those of the evaluation split.

  Args:
    trained: the stage.
    out: folder to write to; None = the run's.
  """
  settings, count, made_of = trained.settings, trained.settings.num_images, trained.made_of
  shown, stored, folder = {}, {}, pictures.folder_of(trained, out)
  with_vae = 'with_vae' not in settings or settings.with_vae
  with pictures.whole_set(folder) if settings.save_images else contextlib.nullcontext() as each:
    for indices in draw.batches(count, min(settings.batch_size, count)):
      first = int(indices[0])
      fresh = min(len(indices), count - first)
      drawn = {name: value[:fresh] for name, value in trained.draw(indices).items()}
      if each:
        pictures.write_each(each, first, drawn, with_vae, made_of)
      for name, value in drawn.items():
        if first < pictures.MAX_IN_GRID:
          shown.setdefault(name, []).append(value)
        if settings.save_npz:
          whole = stored.setdefault(name, np.empty((count, *value.shape[1:]), np.uint8))
          whole[first : first + fresh] = value
  columns = {name: np.concatenate(value)[: pictures.MAX_IN_GRID] for name, value in shown.items()}
  if not with_vae:
    columns = dict([columns.popitem()])  # the stage's own
  kinds = trained.experiment.num_groups
  order = images.in_groups(len(next(iter(columns.values()))), kinds)
  groups = len(order) // kinds if 0 < kinds <= len(order) else max(1, round(np.sqrt(len(order))))
  picture = images.side_by_side(*(value[order] for value in columns.values()))
  pictures.write_grid(trained, 'samples', picture, groups * len(columns), out)
  if settings.save_npz:
    path = pictures.path_of(trained, 'samples', 'npz', out)
    if jax.process_index() == 0:
      files.write_npz(path, {**stored, 'provenance': json.dumps(made_of, sort_keys=True)})
    log.say(f'wrote {path}')
  if settings.save_images:
    log.say(f'wrote {count} images to {folder}')
  return {'num_images': float(count)}
