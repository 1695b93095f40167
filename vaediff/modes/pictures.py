"""Where a mode's pictures go: grids beside the run's stages, single images in a folder of their own."""

import contextlib
import os
import pathlib
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from vaediff.errors import UserError
from vaediff.machine import distributed
from vaediff.run import config as configs
from vaediff.run import images, log
from vaediff.run.config import Run
from vaediff.run.trained import Trained
from vaediff.storage import buckets, files

MAX_IN_GRID = 256
"""Most images in a PNG grid; an npz holds them all."""
MAX_RECONSTRUCTIONS = 32
"""Most images in the grid of reconstructions; the figures are over all of them."""
DIGITS = 6
"""Least, of the number that names an image's file."""


def out_of(run: Run, below: str = '') -> pathlib.Path:
  """Returns the folder that a mode writes to, which was seen to be writable: called before any work.

  Args:
    run: with `out`, or without, where it is the run's own.
    below: a folder in it that is written to.

  Raises:
    UserError: names the folder, the system's reason, and what to do.
  """
  out = run.out or run.workdir
  folder = out / below
  try:
    if not run.out and not out.exists():
      return out  # no run, which is said when it is opened; nothing is made for it
    if isinstance(folder, buckets.BucketPath):
      probe = folder / f'.probe-{secrets.token_hex(4)}.tmp'
      probe.put(b'vaediff')
      probe.unlink()
      return out
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix='.probe-', suffix='.tmp') as probe:
      probe.write(b'vaediff')
  except OSError as error:
    raise UserError(
      f'{folder} cannot be written: {files.reason(error)}. Nothing was done; name a folder that can be '
      'written with --out=FOLDER'
    ) from error
  return out


def path_of(
  trained: Trained, name: str, suffix: str = 'png', out: pathlib.Path | None = None
) -> pathlib.Path:
  """Returns `<out>/<name>.<suffix>`, with the stage in the name unless it is the run's last.

  Without `out` it is in the run's folder.
  """
  stage = '' if trained.stage == configs.stages_of(trained.config)[-1] else f'-{trained.stage}'
  return (out or trained.workdir) / f'{name}{stage}.{suffix}'


def folder_of(trained: Trained, out: pathlib.Path | None = None) -> pathlib.Path:
  """Returns `<out>/samples`, with the stage in the name unless it is the run's last."""
  return path_of(trained, 'samples', out=out).with_suffix('')


@contextlib.contextmanager
def whole_set(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a folder to write images into, which takes the place of `folder` once all are there.

  So `folder` holds the images of one call and no others, and those of the call before as long as this one is
  not done, however it ends. Every process calls it and writes its share; process 0 does the rest. What else a
  user has put into the folder stays there.

  In a bucket nothing is renamed: once all are drawn those of the call before are removed, and the new ones
  sent one by one. A kill in between leaves fewer images, never some of both calls.

  Raises:
    UserError: when another process draws into it, or it cannot be written.
  """
  if isinstance(folder, buckets.BucketPath):
    with _whole_set_in_bucket(folder) as fresh:
      yield fresh
    return
  folder = pathlib.Path(os.path.realpath(folder))  # a link to another disk stays one
  work, first = folder.with_name(f'.{folder.name}.tmp'), jax.process_index() == 0
  fresh, before = work / 'new', work / 'old'
  with files.lock(work, f'draws {folder}') if first else contextlib.nullcontext():
    if first:
      with _said(folder):
        _begin(folder, fresh, before)
    distributed.wait_for_all(f'cleared {fresh}')
    try:
      yield fresh
      distributed.wait_for_all(f'wrote {fresh}')
      if first:
        with _said(folder):
          _swap(folder, fresh, before)
    finally:
      if first:  # where it failed the old images are where they were, or are put back by the next call
        shutil.rmtree(fresh, ignore_errors=True)
        with contextlib.suppress(OSError):
          (work / files.LOCK).unlink()
          work.rmdir()
    distributed.wait_for_all(f'wrote {folder}')


@contextlib.contextmanager
def _whole_set_in_bucket(folder: buckets.BucketPath) -> Iterator[pathlib.Path]:
  first = jax.process_index() == 0
  lock = folder.with_name(f'.{folder.name}.tmp')
  with files.lock(lock, f'draws {folder}') if first else contextlib.nullcontext():
    beside = buckets.Beside(folder)
    shutil.rmtree(beside.here)
    yield beside.here
    distributed.wait_for_all(f'drew {folder}')
    with _said(folder):
      for path in folder.objects() if first else ():
        if _is_numbered(path.relative_to(folder)):
          path.unlink(missing_ok=True)
      distributed.wait_for_all(f'cleared {folder}')
      beside.push()
    distributed.wait_for_all(f'wrote {folder}')


def _is_numbered(relative: pathlib.PurePath) -> bool:
  """Returns whether a file is an image of a call, and not a user's own."""
  number = relative.stem if relative.suffix == '.png' and len(relative.parts) <= 2 else ''
  return number.isdigit() and len(number) >= DIGITS


@contextlib.contextmanager
def _said(folder: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise UserError(f'{folder} cannot be written: {files.reason(error)}') from error


def _begin(folder: pathlib.Path, fresh: pathlib.Path, before: pathlib.Path) -> None:
  """Ends what a call that was killed has begun, and makes the folder for the new images."""
  if folder.exists() and not folder.is_dir():
    raise UserError(f'{folder} is no folder, and the images are to be written into one: move it away')
  _retire(before, folder)
  if fresh.exists():
    shutil.rmtree(fresh)
  fresh.mkdir()


def _swap(folder: pathlib.Path, fresh: pathlib.Path, before: pathlib.Path) -> None:
  """Puts the new images in the place of the old ones."""
  if folder.exists():
    os.rename(folder, before)
  os.rename(fresh, folder)
  _retire(before, folder)


def _retire(before: pathlib.Path, folder: pathlib.Path) -> None:
  """Removes the old images where the new ones are in place, else puts them back."""
  if not before.exists():
    return
  if not folder.exists():
    os.rename(before, folder)
    return
  for path in sorted(before.rglob('*')):
    relative = path.relative_to(before)
    if _is_numbered(relative) or path.is_dir() and not path.is_symlink():
      continue
    if not os.path.lexists(folder / relative):  # a user's own file
      (folder / relative).parent.mkdir(parents=True, exist_ok=True)
      os.rename(path, folder / relative)
  shutil.rmtree(before)


def write_each(
  folder: pathlib.Path,
  first: int,
  drawn: dict[str, np.ndarray],
  with_vae: bool,
  made_of: Mapping[str, str],
) -> None:
  """Writes one PNG per image, named by its index; each process those whose turn it is.

  Args:
    folder: for them.
    first: index of the first image.
    drawn: uint8 images by name. The last name is what the stage makes; what is shown before it goes into a
      folder of its own, with `with_vae`.
    with_vae: see there.
    made_of: what the images were made of.
  """
  *before, made = drawn
  folders = {made: folder}
  if with_vae:
    folders |= {name: folder / name for name in before}
  for name, where in folders.items():
    for index, image in enumerate(drawn[name], first):
      if index % jax.process_count() == jax.process_index():
        images.write_png(where / f'{index:0{DIGITS}d}.png', image, made_of)


def write_grid(
  trained: Trained, name: str, value: np.ndarray, columns: int, out: pathlib.Path | None = None
) -> None:
  """Writes a PNG grid of uint8 images, row by row, and says so."""
  write_picture(trained, name, images.grid(value, min(columns, len(value))), out)


def write_captioned(
  trained: Trained,
  name: str,
  value: np.ndarray,
  columns: int,
  texts: Sequence[str],
  out: pathlib.Path | None = None,
) -> None:
  """Writes such a grid with the text of each image above it; without texts as `write_grid`."""
  if not texts:
    return write_grid(trained, name, value, columns, out)
  return write_picture(trained, name, images.captioned(value, min(columns, len(value)), texts), out)


def write_picture(trained: Trained, name: str, picture: np.ndarray, out: pathlib.Path | None = None) -> None:
  """Writes a uint8 picture [height, width, channels] as PNG, and says so."""
  path = path_of(trained, name, out=out)
  if jax.process_index() == 0:
    images.write_png(path, picture, trained.made_of)
  log.say(f'wrote {path}')
