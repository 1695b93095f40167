"""Where a mode's pictures go: grids beside the run's stages, single images in a folder of their own."""

import pathlib

import jax
import numpy as np

from vaediff.run import images, log
from vaediff.run.trained import Trained

MAX_IN_GRID = 256
"""Most images in a PNG grid; an npz holds them all."""
MAX_RECONSTRUCTIONS = 32
"""Most images in the grid of reconstructions; the figures are over all of them."""


def path_of(trained: Trained, name: str, suffix: str = 'png') -> pathlib.Path:
  """Returns `<workdir>/<name>.<suffix>`, with the stage in the name unless it is the run's last."""
  stage = '' if trained.stage == trained.config.stages[-1] else f'-{trained.stage}'
  return trained.workdir / f'{name}{stage}.{suffix}'


def folder_of(trained: Trained) -> pathlib.Path:
  """Returns `<workdir>/samples`, with the stage in the name unless it is the run's last."""
  return path_of(trained, 'samples').with_suffix('')


def write_each(trained: Trained, first: int, drawn: dict[str, np.ndarray]) -> None:
  """Writes one PNG per image, named by its index; each process those whose turn it is.

  Args:
    trained: the stage.
    first: index of the first image.
    drawn: uint8 images by name. The last name is what the stage makes; what is shown before it goes into a
      folder of its own, with `with_vae`.
  """
  folder, (*before, made) = folder_of(trained), drawn
  folders = {made: folder}
  if before and trained.settings.with_vae:
    folders |= {name: folder / name for name in before}
  for name, where in folders.items():
    for index, image in enumerate(drawn[name], first):
      if index % jax.process_count() == jax.process_index():
        images.write_png(where / f'{index:06d}.png', image)


def drop_others(folder: pathlib.Path, count: int) -> None:
  """Removes the images of an earlier, longer call, so that a folder never holds two sets."""
  for path in folder.rglob('*.png'):
    if path.stem.isdigit() and int(path.stem) >= count:
      path.unlink()


def write_grid(trained: Trained, name: str, value: np.ndarray, columns: int) -> None:
  """Writes a PNG grid of uint8 images, row by row, and says so."""
  path = path_of(trained, name)
  if jax.process_index() == 0:
    images.write_png(path, images.grid(value, min(columns, len(value))))
  log.say(f'wrote {path}')
