"""`--mode=sample`: draws images and writes them as a grid, an npz, or one file each."""

import jax
import numpy as np

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
  i depends on `sample.seed` and i alone.
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
  columns = {name: np.concatenate(value)[:pictures.MAX_IN_GRID] for name, value in shown.items()}
  if 'x0' in columns and not settings.with_vae:
    columns.pop('x0_vae', None)
  groups = max(1, round(np.sqrt(len(columns[next(iter(columns))]))))
  pictures.write_grid(trained, 'samples', images.side_by_side(*columns.values()), groups * len(columns))
  if settings.save_npz:
    path = pictures.path_of(trained, 'samples', 'npz')
    if jax.process_index() == 0:
      images.write_npz(path, stored)
    log.say(f'wrote {path}')
  if settings.save_images:
    folder = pictures.folder_of(trained)
    if jax.process_index() == 0:
      pictures.drop_others(folder, count)
    distributed.wait_for_all(f'wrote {folder}')
    log.say(f'wrote {count} images to {folder}')
  return {'num_images': float(count)}
