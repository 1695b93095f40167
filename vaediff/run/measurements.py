"""What is measured of a trained stage over the training images, for the stages that read it.

A measurement is made once, when the stage is trained or when it is first read, and stored beside the stage's
checkpoint, by what it was made of. Its statistics scale an autoencoder's latents; a VAE's prior is what its
codes are drawn from, and their PCA another basis of them; how often each of a tokenizer's codes occurs says
which are in use.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vaediff import experiments, reads
from vaediff.conditions import pca, prior
from vaediff.data import pixels, sources
from vaediff.errors import UserError
from vaediff.experiments.base import Experiment
from vaediff.machine import distributed, sharding
from vaediff.models import codebook
from vaediff.run import checkpoint, draw, log, same_run
from vaediff.run.opened import Opened
from vaediff.spaces import tokenizers
from vaediff.spaces.embeddings import EMBEDDING
from vaediff.spaces.latents import LATENTS
from vaediff.storage import files, identity
from vaediff.types import Params, Read

Arrays = dict[str, np.ndarray]
Codes = Callable[[], tuple[np.ndarray, np.ndarray]]
STATISTICS = ('mean', 'std', 'min', 'max')
"""Of latents: float32 [channels], over images and positions."""
MADE_OF = 'made_of'
"""What a stored measurement was made of, as JSON, beside its arrays."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
  """The trained stage that is measured.

  Attributes:
    config: of the run that asks.
    stage: its name.
    folder: `<workdir>/<stage>`: measurements are stored there.
    opened: the checkpoint that is measured: the stage's latest, its best, or that of a step.
    mesh: the devices.
    settings: of the reader; see `reads.Measured`.
  """

  config: ConfigDict
  stage: str
  folder: pathlib.Path
  opened: Opened
  mesh: Mesh
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def load(
  source: reads.Measured,
  config: ConfigDict,
  workdir: pathlib.Path,
  mesh: Mesh,
  opened: Opened | None = None,
) -> Arrays:
  """Returns the arrays of a measurement, made first if need be.

  Args:
    source: names stage and measurement.
    config: of the run that asks.
    workdir: of that run.
    mesh: the devices.
    opened: the checkpoint that is measured, where that is not the stage's latest.

  Raises:
    UserError: when the stage is not trained, or the stored file is damaged.
  """
  folder = reads.workdir_of(source, workdir) / source.stage
  target = Target(
    config=config,
    stage=source.stage,
    folder=folder,
    opened=opened or Opened(source.stage, folder),
    mesh=mesh,
    settings=source.settings,
  )
  return BY_NAME[source.measurement](target)


def ensure(experiment: Experiment, config: ConfigDict, workdir: pathlib.Path, stage: str, mesh: Mesh) -> None:
  """Makes what later stages read of a stage that is trained, unless it is there."""
  folder = workdir / stage
  for name in experiment.measures:
    BY_NAME[name](Target(config=config, stage=stage, folder=folder, opened=Opened(stage, folder), mesh=mesh))


def latents(target: Target) -> Arrays:
  """Returns `STATISTICS` of an autoencoder's latents, as a later stage draws them."""
  return _statistics(target, LATENTS)


def embeddings(target: Target) -> Arrays:
  """Returns `STATISTICS` of a CLIP stage's vectors of images, of unit length."""
  return _statistics(target, EMBEDDING)


def _statistics(target: Target, name: str) -> Arrays:
  """Returns `STATISTICS` of what a stage observes, by its name."""

  def make() -> Arrays:
    experiment, read, source, size = opened_with_images(target)
    log.say(f'{target.stage}: measuring the {name} of {len(source)} training images')
    found = moments_of_latents(experiment, read, source, size, target.mesh, target.config.seed, name)
    for key in STATISTICS:
      log.say(f'  {key} per channel: {" ".join(f"{value:.4g}" for value in found[key][:16])}')
    return found

  stored = stored_or_made(target, name, {}, STATISTICS, make)
  return {key: stored[key] for key in STATISTICS}


def fitted_prior(target: Target, codes: Codes | None = None) -> Arrays:
  """Returns the prior of a VAE's z that `<stage>.prior` describes; {} = N(0, I).

  It is fitted to what `codes` returns, that is asked for only then; None = `codes_to_fit`.
  """
  section = target.config[target.stage].prior
  if section.kind == 'normal':
    return {}

  def make() -> Arrays:
    z, _ = codes() if codes else codes_to_fit(target)
    counts = '-'.join(map(str, section.num_components))
    log.say(f'fitting a Gaussian mixture ({section.covariance}, {counts} components) to {len(z)} latents')
    arrays, scores = prior.fit(z, section, target.config.seed)
    shown = ', '.join(f'{k}: {score:.2f}' for k, score in scores.items())
    log.say(f'held-out nats per latent by components: {shown}; {len(arrays["weights"])} used')
    return arrays

  return stored_or_made(target, prior.PRIOR, section.to_dict(), prior.arrays_of(section), make)


def prior_of_classes(target: Target) -> Arrays:
  """Returns the priors of a VAE's z of every class of the data set; {} for N(0, I)."""
  section, num_classes = target.config[target.stage].prior, target.config.data.num_classes
  codes = functools.cache(lambda: codes_to_fit(target))
  arrays = fitted_prior(target, codes)
  if not arrays:
    return {}

  def make() -> Arrays:
    z, labels = codes()
    log.say(f'fitting a Gaussian mixture to the latents of each of {num_classes} classes: {len(z)} in all')
    return prior.fit_classes(arrays, z, labels, num_classes, section, target.config.seed)

  settings = {**section.to_dict(), 'num_classes': num_classes, 'fewest': prior.FEWEST}
  return stored_or_made(target, prior.OF_CLASSES, settings, prior.arrays_of_classes(section), make)


def codes_to_fit(target: Target) -> tuple[np.ndarray, np.ndarray]:
  """Returns z ~ q(z | x) [n, d] and labels [n] of the first `<stage>.prior.num_encoded` training images."""
  experiment, read, source, size = opened_with_images(target)
  count = min(target.config[target.stage].prior.num_encoded, len(source))
  log.say(f'{target.stage}: encoding {count} training images')
  return drawn_codes(experiment, read, source, count, size, target.mesh, target.config.seed)


def principal_directions(target: Target) -> Arrays:
  """Returns the PCA of a VAE's z that the reader's settings describe; what is stored is all of it."""

  def make() -> Arrays:
    experiment, read, source, size = opened_with_images(target)
    log.say(f'{target.stage}: measuring the directions of the codes of {len(source)} training images')
    parts = posteriors(experiment, read, source, len(source), size, target.mesh)
    return pca.spectrum_of(((mean, logvar) for mean, logvar, _ in parts), target.stage)

  spectrum = stored_or_made(target, pca.PCA, {}, pca.SPECTRUM, make)
  kept, fraction = pca.kept(spectrum, target.settings, target.stage), pca.signal_fraction(spectrum)
  log.say(
    f'{target.stage}: the PCA of the code has {len(kept)} of {len(fraction)} directions, with signal '
    f'fractions from {fraction[kept].max():.2g} to {fraction[kept].min():.2g}'
  )
  return pca.arrays_of(spectrum, target.settings, target.stage)


def code_frequencies(target: Target) -> Arrays:
  """Returns how often each code of a tokenizer occurs over the training images, by level; each sums to 1."""
  tokenizer = tokenizers.tokenizer_of(target.config, target.stage, '', 'the measured stage')
  keys = tuple(tokenizers.level_key(level) for level in range(len(tokenizer.sizes)))

  def make() -> Arrays:
    _, read, source, size = opened_with_images(target)
    log.say(f'{target.stage}: counting the codes of {len(source)} training images')
    counts = counts_of_codes(tokenizer, read[tokenizer.network], source, size, target.mesh)
    found = {key: (count / count.sum()).astype(np.float32) for key, count in zip(keys, counts, strict=True)}
    for (height, width), values in zip(tokenizer.grids, found.values(), strict=True):
      log.say(
        f'  {height}x{width}: {np.count_nonzero(values)} of {len(values)} codes are used, perplexity '
        f'{tokenizers.perplexity(values):.3g}'
      )
    return found

  stored = stored_or_made(target, tokenizers.FREQUENCIES, {}, keys, make)
  return {key: stored[key] for key in keys}


BY_NAME: dict[str, Callable[[Target], Arrays]] = {
  tokenizers.FREQUENCIES: code_frequencies,
  LATENTS: latents,
  EMBEDDING: embeddings,
  pca.PCA: principal_directions,
  prior.PRIOR: fitted_prior,
  prior.OF_CLASSES: prior_of_classes,
}


def made_of(target: Target, settings: dict[str, Any]) -> dict[str, str]:
  """Returns what a measurement is made of: the stage's checkpoint, the images that it saw, settings.

  Where others may take their place, with `data.check_fingerprint` off, it is those that are there.
  """
  meta = checkpoint.load_meta(target.opened.folder, target.opened.step)
  images = meta.get(same_run.DATA, {}).get('train', 'unknown')
  if not target.config.data.check_fingerprint:
    with contextlib.suppress(UserError):  # what is stored is read without images too
      images = sources.open_source(target.config.data, 'train').fingerprint
  return {
    f'the network {target.stage!r}': target.opened.id,
    'the training images': images,
    'the settings': identity.digest([settings, target.config.seed]),
  }


def stored_or_made(
  target: Target, name: str, settings: dict[str, Any], arrays: tuple[str, ...], make: Callable[[], Arrays]
) -> Arrays:
  """Returns the arrays of a stored measurement, which is made and stored first where it is not there.

  Where the folder cannot be written they are used without being stored, and that is said.

  Args:
    target: the stage that is measured.
    name: of the measurement, and of its file, which has the digest of what it was made of.
    settings: that it depends on.
    arrays: the names that it must have.
    make: measures.

  Raises:
    UserError: when the file is damaged, or was made of something else.
  """
  wanted = made_of(target, settings)
  path = target.folder / f'{name}-{identity.digest(wanted)}.npz'
  if not distributed.agree(path.exists()):
    made = make()
    if jax.process_index() == 0:
      try:
        files.write_npz(path, {**made, MADE_OF: json.dumps(wanted)})
      except UserError as error:
        log.say(f'{error}; what was measured is used and not stored')
    distributed.wait_for_all(f'wrote {path}')
    return made
  stored = files.read_npz(path)
  with files.reading(path):
    made = json.loads(str(stored.pop(MADE_OF)))
    missing = [item for item in arrays if item not in stored]
    broken = [item for item, value in stored.items() if not np.all(np.isfinite(value))]
    if missing or broken or not isinstance(made, dict):
      what = f'{missing[0]} is missing' if missing else f'{(*broken, MADE_OF)[0]} is not what was measured'
      raise ValueError(what)
  identity.compare(str(path), made, wanted, files.REMOVE.capitalize())
  return stored


def opened(target: Target) -> tuple[Experiment, dict[str, Any]]:
  """Returns the experiment of a trained stage, and its own networks."""
  experiment = experiments.build(target.config, target.stage)
  check, from_step, mesh = target.config.checkpoints.check_arrays, target.opened.step, target.mesh
  shapes = {name: checkpoint.abstract_params(model, mesh) for name, model in experiment.networks.items()}
  read = {
    name: checkpoint.load_frozen(target.opened.folder, name, shape, check_arrays=check, step=from_step)
    for name, shape in shapes.items()
  }
  return experiment, read


def opened_with_images(target: Target) -> tuple[Experiment, dict[str, Any], sources.Source, int]:
  """Returns what `opened` does, the stage's training images, and how many of them are a batch."""
  size = target.config[target.stage].sample.batch_size
  own = target.opened
  return *opened(target), same_run.open_images(target.config, 'train', own.folder, own.step), size


def drawn_codes(
  experiment: Any, read: Read, source: sources.Source, count: int, batch_size: int, mesh: Mesh, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns z ~ q(z | x) [count, d] and the labels [count] of the first images of a source."""
  codes, labels = [], []
  for k, (mean, logvar, label) in enumerate(posteriors(experiment, read, source, count, batch_size, mesh)):
    noise = np.random.default_rng(seed + k).standard_normal(mean.shape, np.float32)
    codes.append(mean + np.exp(0.5 * logvar) * noise)
    labels.append(label)
  return np.concatenate(codes), np.concatenate(labels)


def posteriors(
  experiment: Any, read: Read, source: sources.Source, count: int, batch_size: int, mesh: Mesh
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Yields mean and log variance of q(z | x) [n, d] and labels [n] of the first images, in blocks."""
  where = sharding.batch_sharding(mesh)
  posterior = jax.jit(experiment.posterior, out_shardings=sharding.replicated(mesh))
  for k, chunk in enumerate(np.array_split(np.arange(count), max(1, count // 1024))):
    batch = source.read(chunk)
    image, parts = batch[sources.IMAGE], []
    size = sharding.round_up(min(batch_size, len(image)), mesh)
    for rows, num_real in draw.padded_batches(len(image), size):
      x = jax.device_put(pixels.to_unit_range(jnp.asarray(image[rows])), where)
      parts.append([part[:num_real] for part in jax.device_get(posterior(read, x))])
      distributed.beat(f'{k} blocks of codes')
    mean, logvar = (np.concatenate(part) for part in zip(*parts, strict=True))
    yield mean, logvar, batch[sources.LABEL]


def counts_of_codes(
  tokenizer: tokenizers.Tokenizer, params: Params, source: sources.Source, batch_size: int, mesh: Mesh
) -> list[np.ndarray]:
  """Returns how often each code occurs over all images of a source, float64 [codes], by level."""
  where = sharding.batch_sharding(mesh)

  def count(params, image, number):
    ids, real = tokenizer.codes(params, pixels.to_unit_range(image)), jnp.arange(image.shape[0]) < number
    return [codebook.histogram(rows, size, real) for rows, size in zip(ids, tokenizer.sizes, strict=True)]

  counting = jax.jit(count, out_shardings=sharding.replicated(mesh))
  total, size = len(source), sharding.round_up(min(batch_size, len(source)), mesh)
  counts = [np.zeros(codes) for codes in tokenizer.sizes]
  for rows, num_real in draw.padded_batches(total, size):
    image = jax.device_put(source.read(rows)[sources.IMAGE], where)
    for level, found in enumerate(jax.device_get(counting(params, image, num_real))):
      counts[level] += found
    distributed.beat(f'the codes of {int(rows[-1]) + 1} images')
  return counts


def moments_of_latents(
  experiment: Experiment,
  read: Read,
  source: sources.Source,
  batch_size: int,
  mesh: Mesh,
  seed: int,
  name: str = LATENTS,
) -> Arrays:
  """Returns the statistics over all images of a source, of what is observed; sums in float64 on the host."""
  where, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)

  @jax.jit
  def moments(read, image, rows, key, first, count):
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
    z = experiment.observe(read, {}, pixels.to_unit_range(image), keys)[name]
    z = z.reshape(len(z), 1, -1, z.shape[-1])  # of maps, or of vectors
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
  for rows, num_real in draw.padded_batches(total, size):
    image = jax.device_put(source.read(rows)[sources.IMAGE], where)
    args = (read, image, jax.device_put(rows.astype(np.int32), where), key)
    if shift is None:  # a rough mean, so that squares do not cancel in float32
      channels = jax.eval_shape(moments, *args, np.float32(0), num_real)['sum'].shape
      rough = jax.device_get(moments(*args, np.zeros((1, 1, 1, *channels), np.float32), num_real))
      shift = (rough['sum'] / (num_real * rough['positions'])).astype(np.float32)
    parts.append(jax.device_get(moments(*args, shift.reshape(1, 1, 1, -1), num_real)))
    distributed.beat(f'{len(parts)} batches of latents')
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
