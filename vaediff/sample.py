"""Checkpoint -> images: samples and reconstructions. Each writes its files and returns figures."""

import pathlib

import jax
import numpy as np

from vaediff import distributed, draw, images, log
from vaediff.errors import UserError
from vaediff.quality import mse
from vaediff.trained import Trained

MAX_IN_GRID = 256
"""Most images in a PNG grid; an npz holds them all."""
MAX_RECONSTRUCTIONS = 32
"""Most images in the grid of reconstructions; the figures are over all of them."""


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
      write_each(trained, first, {name: value[:fresh] for name, value in drawn.items()})
    for name, value in drawn.items():
      if first < MAX_IN_GRID:
        shown.setdefault(name, []).append(value[:fresh])
      if settings.save_npz:
        stored.setdefault(name, np.empty((count, *value.shape[1:]), np.uint8))[first : first + fresh] = value[
          :fresh
        ]
  columns = {name: np.concatenate(value)[:MAX_IN_GRID] for name, value in shown.items()}
  if 'x0' in columns and not settings.with_vae:
    columns.pop('x0_vae', None)
  groups = max(1, round(np.sqrt(len(columns[next(iter(columns))]))))
  write_grid(trained, 'samples', images.side_by_side(*columns.values()), groups * len(columns))
  if settings.save_npz:
    path = path_of(trained, 'samples', 'npz')
    if jax.process_index() == 0:
      images.write_npz(path, stored)
    log.say(f'wrote {path}')
  if settings.save_images:
    folder = folder_of(trained)
    if jax.process_index() == 0:
      drop_others(folder, count)
    distributed.wait_for_all(f'wrote {folder}')
    log.say(f'wrote {count} images to {folder}')
  return {'num_images': float(count)}


def reconstruct(trained: Trained) -> dict[str, float]:
  """Encodes images of the evaluation split and draws them again from z.

  Writes `reconstructions.png`: data, VAE reconstruction and, for a refiner, refined image.

  Returns:
    Mean squared error per pixel, pixels in [0, 1], of each kind of reconstruction.
  """
  if not trained.experiment.reads_image:
    need_latents(trained, 'reconstruct')
  settings = trained.config.reconstruct
  if settings.posterior not in ('mean', 'sample'):
    raise UserError(f"config.reconstruct.posterior must be 'mean' or 'sample', got {settings.posterior!r}")
  data, _ = eval_images(trained, settings.num_images)
  if trained.experiment.reads_image:
    result = draw_all(trained, {'image': data})
  elif settings.posterior == 'sample':
    result = draw_all(trained, {'z': trained.encode_sampled(data, trained.settings.seed)})
  else:
    result = draw_all(trained, {'z': trained.encode(data)[0]})
  shown = [value[:MAX_RECONSTRUCTIONS] for value in (data, *result.values())]
  write_grid(trained, 'reconstructions', images.side_by_side(*shown), len(shown) * 4)
  return {f'mse/{name}': mse(data, value) for name, value in result.items()}


# Shared with interpolate and restore -------------------------------------------------------------


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
    drawn: uint8 images by name. The last name is what the stage makes; 'x0_vae' before it goes into a folder
      of its own, with `with_vae`.
  """
  folder, (*before, made) = folder_of(trained), drawn
  folders = {made: folder}
  if 'x0_vae' in before and trained.settings.with_vae:
    folders['x0_vae'] = folder / 'x0_vae'
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


def eval_images(trained: Trained, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the first `count` images (uint8) and labels of the evaluation split."""
  batch = trained.eval_source.read(np.arange(min(count, len(trained.eval_source))))
  return batch['image'], batch['label']


def draw_all(trained: Trained, given: dict[str, np.ndarray], first: int = 0) -> dict[str, np.ndarray]:
  """Returns the images `first`, `first` + 1, ... drawn from one row of `given` each.

  In batches of the stage's sampling batch size.
  """
  count = len(next(iter(given.values())))
  size, parts = min(trained.settings.batch_size, count), {}
  for indices in draw.batches(count, size):
    fresh = min(size, count - int(indices[0]))
    chunk = {name: value[indices] for name, value in given.items()}
    for name, value in trained.draw(first + indices, chunk).items():
      parts.setdefault(name, []).append(value[:fresh])
  return {name: np.concatenate(part) for name, part in parts.items()}


def need_latents(trained: Trained, mode: str) -> None:
  """Raises UserError when the stage has no VAE to encode with."""
  if not trained.experiment.latent_dim:
    raise UserError(
      f'--mode={mode} needs a latent code; stage {trained.stage!r} was trained without a VAE '
      "(diffusion.condition = 'none'). Use --mode=sample, or another stage with --stages"
    )
