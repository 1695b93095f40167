"""What is measured of a trained stage over the training images, for the stages that read it.

A measurement is made once, when the stage is trained or when it is first read, and stored beside the stage's
checkpoint. Its statistics scale an autoencoder's latents; a VAE's prior is what its codes are drawn from.
"""

import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vaediff import experiments, files, reads
from vaediff.conditions import prior
from vaediff.data import pixels, sources
from vaediff.errors import UserError
from vaediff.experiments.base import Experiment
from vaediff.machine import distributed, sharding
from vaediff.run import checkpoint, draw, log
from vaediff.spaces.latents import LATENTS
from vaediff.types import Read

Arrays = dict[str, np.ndarray]
STATISTICS = ('mean', 'std', 'min', 'max')
"""Of latents: float32 [channels], over images and positions."""


def load(source: reads.Measured, config: ConfigDict, workdir: pathlib.Path, mesh: Mesh) -> Arrays:
  """Returns the arrays of a measurement, made first if need be.

  Raises:
    UserError: when the stage is not trained, or the stored file is damaged.
  """
  folder = pathlib.Path(source.workdir) if source.workdir else workdir
  return BY_NAME[source.measurement](config, folder, source.stage, mesh)


def ensure(
  experiment: Experiment, config: ConfigDict, workdir: pathlib.Path, stage: str, mesh: Mesh
) -> None:
  """Makes what later stages read of a stage that is trained, unless it is there."""
  for name in experiment.measures:
    BY_NAME[name](config, workdir, stage, mesh)


def latents(config: ConfigDict, workdir: pathlib.Path, stage: str, mesh: Mesh) -> Arrays:
  """Returns `STATISTICS` of an autoencoder's latents, as a later stage draws them."""
  path = workdir / stage / f'latents-step-{checkpoint.latest_step(workdir / stage)}.npz'

  def make() -> Arrays:
    experiment, read = opened(config, workdir, stage, mesh)
    source = sources.open_source(config.data, 'train')
    log.say(f'{stage}: measuring the latents of {len(source)} training images')
    found = moments_of_latents(experiment, read, source, config[stage].sample.batch_size, mesh, config.seed)
    for name in STATISTICS:
      log.say(f'  {name} per channel: {" ".join(f"{value:.4g}" for value in found[name][:16])}')
    return found

  stored = stored_or_made(path, stage, make)
  if not set(STATISTICS) <= stored.keys():
    raise damaged(path, stage, f'it holds {", ".join(sorted(stored)) or "nothing"}')
  return {name: stored[name] for name in STATISTICS}


def fitted_prior(config: ConfigDict, workdir: pathlib.Path, stage: str, mesh: Mesh) -> Arrays:
  """Returns the prior of a VAE's z that `<stage>.prior` describes; {} = N(0, I)."""
  section = config[stage].prior
  if section.kind == 'normal':
    return {}
  counts = '-'.join(map(str, section.num_components))
  settings = f'{section.covariance}-{counts}-of-{section.num_encoded}-holdout-{section.holdout_fraction}'
  step = checkpoint.latest_step(workdir / stage)
  path = workdir / stage / f'prior-{settings}-seed-{config.seed}-step-{step}.npz'

  def make() -> Arrays:
    experiment, read = opened(config, workdir, stage, mesh)
    source = sources.open_source(config.data, 'train')
    count = min(section.num_encoded, len(source))
    log.say(f'fitting a Gaussian mixture ({section.covariance}, {counts} components) to {count} latents')
    z = drawn_codes(experiment, read, source, count, config[stage].sample.batch_size, mesh, config.seed)
    arrays, scores = prior.fit(z, section, config.seed)
    shown = ', '.join(f'{k}: {score:.2f}' for k, score in scores.items())
    log.say(f'held-out nats per latent by components: {shown}; {len(arrays["weights"])} used')
    return arrays

  return stored_or_made(path, stage, make)


BY_NAME: dict[str, Callable[[ConfigDict, pathlib.Path, str, Mesh], Arrays]] = {
  LATENTS: latents,
  prior.PRIOR: fitted_prior,
}


def stored_or_made(path: pathlib.Path, stage: str, make: Callable[[], Arrays]) -> Arrays:
  """Returns the arrays of an npz file, which process 0 writes first where it is not there.

  Raises:
    UserError: when the file is damaged.
  """
  if not distributed.agree(path.exists()):
    arrays = make()
    if jax.process_index() == 0:
      files.write_npz(path, arrays)
    distributed.wait_for_all(f'wrote {path}')
  try:
    with np.load(path) as stored:
      return {name: stored[name] for name in stored.files}
  except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
    raise damaged(path, stage, error) from error


def damaged(path: pathlib.Path, stage: str, reason: object) -> UserError:
  """Returns the error for a file of measurements that cannot be read."""
  return UserError(f'{path} is damaged ({reason}); remove it, and it is made anew from {stage!r}')


def opened(
  config: ConfigDict, workdir: pathlib.Path, stage: str, mesh: Mesh
) -> tuple[Experiment, dict[str, Any]]:
  """Returns the experiment of a trained stage, and its own networks."""
  experiment = experiments.build(config, stage)
  read = {
    name: checkpoint.load_frozen(workdir / stage, name, checkpoint.abstract_params(model, mesh))
    for name, model in experiment.networks.items()
  }
  return experiment, read


def drawn_codes(
  experiment: Any, read: Read, source: sources.Source, count: int, batch_size: int, mesh: Mesh, seed: int
) -> np.ndarray:
  """Returns z ~ q(z | x) [count, d] of the first images of a source."""
  where = sharding.batch_sharding(mesh)
  posterior = jax.jit(experiment.posterior, out_shardings=sharding.replicated(mesh))
  codes = []
  for k, chunk in enumerate(np.array_split(np.arange(count), max(1, count // 1024))):
    image = source.read(chunk)['image']
    size = sharding.round_up(min(batch_size, len(image)), mesh)
    parts = []
    for rows in draw.batches(len(image), size):
      x = jax.device_put(pixels.to_unit_range(jnp.asarray(image[rows])), where)
      fresh = min(size, len(image) - int(rows[0]))
      parts.append([part[:fresh] for part in jax.device_get(posterior(read, x))])
    mean, logvar = (np.concatenate(part) for part in zip(*parts, strict=True))
    noise = np.random.default_rng(seed + k).standard_normal(mean.shape, np.float32)
    codes.append(mean + np.exp(0.5 * logvar) * noise)
  return np.concatenate(codes)


def moments_of_latents(
  experiment: Experiment,
  read: Read,
  source: sources.Source,
  batch_size: int,
  mesh: Mesh,
  seed: int,
) -> Arrays:
  """Returns the statistics over all images of a source; sums in float64 on the host."""
  where, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)

  @jax.jit
  def moments(read, image, rows, key, first, count):
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
    z = experiment.observe(read, {}, pixels.to_unit_range(image), keys)[LATENTS]
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
      rough = jax.device_get(moments(read, image, numbers, key, jnp.float32(0), count))
      shift = (rough['sum'] / (count * rough['positions'])).astype(np.float32)
    parts.append(jax.device_get(moments(read, image, numbers, key, shift.reshape(1, 1, 1, -1), count)))
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
