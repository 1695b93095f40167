"""What conditions see in every training image: observed once, kept memory-mapped beside the stage."""

import functools
import os
import pathlib
import shutil

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vaediff.data import pixels, sources
from vaediff.experiments.base import Experiment
from vaediff.machine import distributed, sharding
from vaediff.run import draw, log
from vaediff.run import frozen as frozen_networks
from vaediff.types import Read


def precomputed(
  config: ConfigDict,
  workdir: pathlib.Path,
  stage: str,
  experiment: Experiment,
  frozen: Read,
  source: sources.Source,
  mesh: Mesh,
) -> dict[str, np.ndarray]:
  """Returns what the stage has `stored` of every training image, by index; {} where that is nothing.

  Computed once, and anew when a network that it is made with is at another step.
  """
  if not experiment.stored:
    return {}
  steps = frozen_networks.steps(experiment, workdir)
  known = '-'.join(f'{name}-{step}' for name, step in sorted(steps.items()))
  folder = workdir / stage / f'precomputed-{known}'
  if not distributed.agree(folder.exists()):
    # every process computes all and holds the result; the first one writes it
    temporary = folder.with_name(f'.{folder.name}.tmp-{jax.process_index()}')
    temporary.mkdir(parents=True, exist_ok=True)
    write(temporary, experiment, frozen, source, config[stage].train.batch_size, mesh)
    if jax.process_index() == 0:
      os.replace(temporary, folder)
    else:
      shutil.rmtree(temporary)
    distributed.wait_for_all(f'wrote {folder}')
  return {name: np.load(folder / f'{name}.npy', mmap_mode='r') for name in experiment.stored}


def write(
  folder: pathlib.Path,
  experiment: Experiment,
  frozen: Read,
  source: sources.Source,
  batch_size: int,
  mesh: Mesh,
) -> None:
  """Writes what is seen in every image of a source, batch by batch; images as bytes."""

  @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
  def run(read, batch):
    batch = pixels.prepare(batch, None)
    seen = experiment.store(read, batch, batch[sources.IMAGE])
    return {
      name: pixels.to_bytes(value) if experiment.stored[name].dtype == np.uint8 else value
      for name, value in seen.items()
    }

  count, where = len(source), sharding.batch_sharding(mesh)
  arrays = {
    name: np.lib.format.open_memmap(folder / f'{name}.npy', 'w+', struct.dtype, (count, *struct.shape))
    for name, struct in experiment.stored.items()
  }
  log.say(f'precomputing {", ".join(arrays)} of {count} images')
  size = sharding.round_up(min(batch_size, count), mesh)
  for rows in draw.batches(count, size):
    batch = source.read(rows)
    seen = run(frozen, jax.device_put(batch, where))
    start = int(rows[0])
    fresh = min(size, count - start)
    for name, value in jax.device_get(seen).items():
      arrays[name][start : start + fresh] = value[:fresh]
  for array in arrays.values():
    array.flush()
