"""`--mode=sample`: draws images and writes them as a grid, an npz, or one file each."""

import jax
import numpy as np

from vaediff import files
from vaediff.machine import distributed
from vaediff.modes import pictures
from vaediff.run import draw, images, log
from vaediff.run.config import Run
from vaediff.run.trained import Trained, open_last, say_figures


def mode(run: Run) -> None:
  """Samples the last stage."""
  say_figures(sample(open_last(run)))


def sample(trained: Trained) -> dict[str, float]:
  """Draws `sample.num_images` images; writes `samples.png` and, with `save_npz`, `samples.npz` (uint8).

  With `save_images` also one PNG per image, `samples/<index>.png`. Holds one batch of noise at a time. Image
  i depends on `sample.seed` and i alone. Samples that come in kinds, such as classes, have a row each.
  A stage that can only repeat images, as an autoencoder does, draws those of the evaluation split.
  """
  settings, count = trained.settings, trained.settings.num_images
  shown, stored = {}, {}
  for indices in draw.batches(count, min(settings.batch_size, count)):
    first = int(indices[0])
    fresh = min(len(indices), count - first)
    drawn = trained.draw(indices)
    if settings.save_images:
      pictures.write_each(trained, first, {name: value[:fresh] for name, value in drawn.items()})
    for name, value in drawn.items():
      if first < pictures.MAX_IN_GRID:
        shown.setdefault(name, []).append(value[:fresh])
      if settings.save_npz:
        stored.setdefault(name, np.empty((count, *value.shape[1:]), np.uint8))[first : first + fresh] = value[
          :fresh
        ]
  columns = {name: np.concatenate(value)[: pictures.MAX_IN_GRID] for name, value in shown.items()}
  if 'with_vae' in settings and not settings.with_vae:
    columns = dict([columns.popitem()])  # the stage's own
  kinds = trained.experiment.num_groups
  order = images.in_groups(len(next(iter(columns.values()))), kinds)
  groups = len(order) // kinds if 0 < kinds <= len(order) else max(1, round(np.sqrt(len(order))))
  picture = images.side_by_side(*(value[order] for value in columns.values()))
  pictures.write_grid(trained, 'samples', picture, groups * len(columns))
  if settings.save_npz:
    path = pictures.path_of(trained, 'samples', 'npz')
    if jax.process_index() == 0:
      files.write_npz(path, stored)
    log.say(f'wrote {path}')
  if settings.save_images:
    folder = pictures.folder_of(trained)
    if jax.process_index() == 0:
      pictures.drop_others(folder, count)
    distributed.wait_for_all(f'wrote {folder}')
    log.say(f'wrote {count} images to {folder}')
  return {'num_images': float(count)}
