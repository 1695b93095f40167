"""What a frozen VAE makes of every training image: computed once, kept memory-mapped beside the stage."""

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
from vaediff.experiments.diffusion import reads_precomputed
from vaediff.machine import distributed, sharding
from vaediff.run import checkpoint, images, log
from vaediff.types import Params


def precomputed(
  config: ConfigDict,
  workdir: pathlib.Path,
  stage: str,
  experiment: Experiment,
  frozen: dict[str, Params],
  source: sources.Source,
  mesh: Mesh,
) -> dict[str, np.ndarray]:
  """Returns {'x0_vae': uint8, 'z': float32} of every training image, by index, from the posterior mean.

  Only for `diffusion.x0_vae_source = 'precomputed'`; else {}. Computed once, kept memory-mapped beside
  the stage, and computed anew when the VAE's checkpoint is another.
  """
  if not experiment.frozen or not reads_precomputed(config[stage]):
    return {}
  origin = experiment.frozen['vae']
  vae_folder = (pathlib.Path(origin.workdir) if origin.workdir else workdir) / origin.stage
  folder = workdir / stage / f'precomputed-step-{checkpoint.latest_step(vae_folder)}'
  names = ('x0_vae', 'z')
  if not distributed.agree(folder.exists()):
    # every process computes its share and holds the result; the first one writes it
    temporary = folder.with_name(f'.{folder.name}.tmp-{jax.process_index()}')
    temporary.mkdir(parents=True, exist_ok=True)
    write_precomputed(temporary, experiment, frozen, source, config[stage].train.batch_size, mesh)
    if jax.process_index() == 0:
      os.replace(temporary, folder)
    else:
      shutil.rmtree(temporary)
    distributed.wait_for_all(f'wrote {folder}')
  return {name: np.load(folder / f'{name}.npy', mmap_mode='r') for name in names}


def write_precomputed(
  folder: pathlib.Path,
  experiment: Experiment,
  frozen: dict[str, Params],
  source: sources.Source,
  batch_size: int,
  mesh: Mesh,
) -> None:
  """Writes the reconstruction and the mean latent of every image of a source, batch by batch."""
  model = experiment.frozen['vae'].model

  @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
  def run(params, image):
    z, _ = model.apply(params, pixels.to_unit_range(image), method='encode')
    return model.apply(params, z, method='decode'), z

  count, where = len(source), sharding.batch_sharding(mesh)
  shapes = {
    'x0_vae': ((count, *experiment.noise_shape), np.uint8),
    'z': ((count, experiment.latent_dim), np.float32),
  }
  arrays = {
    name: np.lib.format.open_memmap(folder / f'{name}.npy', 'w+', dtype, shape)
    for name, (shape, dtype) in shapes.items()
  }
  log.say(f'precomputing the VAE reconstructions of {count} images')
  batch_size = sharding.round_up(min(batch_size, count), mesh)
  for start in range(0, count, batch_size):
    indices = np.minimum(np.arange(start, start + batch_size), count - 1)
    image = jax.device_put(source.read(indices)['image'], where)
    x0_vae, z = jax.device_get(run(frozen['vae'], image))
    fresh = min(batch_size, count - start)
    arrays['x0_vae'][start : start + fresh] = images.to_uint8(x0_vae[:fresh])
    arrays['z'][start : start + fresh] = z[:fresh]
  for array in arrays.values():
    array.flush()
