"""Statistics of an autoencoder's latents over the training images: measured once, stored with its stage.

A stage that models the latents scales them by these figures and refuses to start without them.
"""

import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vaediff.data import sources
from vaediff.errors import UserError
from vaediff.experiments.base import HasLatents
from vaediff.machine import distributed, sharding
from vaediff.run import checkpoint, draw, log
from vaediff.types import Params

Statistics = dict[str, np.ndarray]
"""`mean`, `std`, `min`, `max`: float32 [channels], over images and positions; `count`: images."""
NAMES = ('mean', 'std', 'min', 'max')


def path_of(stage_folder: pathlib.Path) -> pathlib.Path:
  """Returns the file of the statistics of a stage's latest checkpoint."""
  return stage_folder / f'latents-step-{checkpoint.latest_step(stage_folder)}.npz'


def load(stage_folder: pathlib.Path) -> Statistics:
  """Returns the stored statistics.

  Raises:
    UserError: when they were not measured, or the file is damaged.
  """
  path = path_of(stage_folder)
  try:
    with np.load(path) as stored:
      return {name: stored[name] for name in NAMES}
  except FileNotFoundError as error:
    raise UserError(
      f'{path} does not exist: the latents of that stage were not measured. Run it again with '
      f'--stages={stage_folder.name}: it is trained already, and will only measure them'
    ) from error
  except (OSError, ValueError, KeyError) as error:
    raise UserError(f'{path} is damaged ({error}); remove it and run --stages={stage_folder.name}') from error


def ensure(
  stage_folder: pathlib.Path,
  experiment: HasLatents,
  params: Callable[[], dict[str, Params]],
  source: sources.Source,
  batch_size: int,
  mesh: Mesh,
  seed: int,
) -> None:
  """Measures and stores the statistics of a trained stage, unless they are there."""
  path = path_of(stage_folder)
  if distributed.agree(path.exists()):
    return
  log.say(f'{stage_folder.name}: measuring the latents of {len(source)} training images')
  found = measure(experiment, params(), source, batch_size, mesh, seed)
  for name in NAMES:
    log.say(f'  {name} per channel: {" ".join(f"{value:.4g}" for value in found[name][:16])}')
  if jax.process_index() == 0:
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp.npz')
    np.savez(temporary, **found)
    os.replace(temporary, path)
  distributed.wait_for_all(f'wrote {path}')


def measure(
  experiment: HasLatents,
  params: dict[str, Params],
  source: sources.Source,
  batch_size: int,
  mesh: Mesh,
  seed: int,
) -> Statistics:
  """Returns the statistics over all images of a source; sums in float64 on the host."""
  where, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)

  @jax.jit
  def moments(params, image, rows, key, first, count):
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
    z = experiment.latents(params, image, keys)
    real = (jnp.arange(z.shape[0]) < count)[:, None, None, None]
    shifted = jnp.where(real, z - first, 0.0)
    return {
      'sum': jnp.sum(shifted, axis=(0, 1, 2)),
      'squares': jnp.sum(jnp.square(shifted), axis=(0, 1, 2)),
      'min': jnp.min(jnp.where(real, z, jnp.inf), axis=(0, 1, 2)),
      'max': jnp.max(jnp.where(real, z, -jnp.inf), axis=(0, 1, 2)),
      'positions': jnp.int32(z.shape[1] * z.shape[2]),
    }

  total, size = len(source), sharding.round_up(min(batch_size, len(source)), mesh)
  shift, parts = None, []
  key = jax.device_put(jax.random.key(seed), everywhere)
  for rows in draw.batches(total, size):
    count = min(size, total - int(rows[0]))
    image = jax.device_put(source.read(rows)['image'], where)
    numbers = jax.device_put(rows.astype(np.int32), where)
    if shift is None:  # a rough mean, so that squares do not cancel in float32
      rough = jax.device_get(moments(params, image, numbers, key, jnp.float32(0), count))
      shift = (rough['sum'] / (count * rough['positions'])).astype(np.float32)
    parts.append(jax.device_get(moments(params, image, numbers, key, shift.reshape(1, 1, 1, -1), count)))
  number = total * float(parts[0]['positions'])
  mean = sum(part['sum'].astype(np.float64) for part in parts) / number
  square = sum(part['squares'].astype(np.float64) for part in parts) / number
  return {
    'mean': (mean + shift).astype(np.float32),
    'std': np.sqrt(np.maximum(square - mean**2, 0.0)).astype(np.float32),
    'min': np.min([part['min'] for part in parts], axis=0),
    'max': np.max([part['max'] for part in parts], axis=0),
    'count': np.int64(total),
  }
