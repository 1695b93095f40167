"""What is measured of a trained stage over the training images, for the stages that read it.

A measurement is made once, when the stage is trained or when it is first read, and stored beside the stage's
checkpoint, by what it was made of. Its statistics scale an autoencoder's latents; a VAE's prior is what its
codes are drawn from, and their PCA another basis of them; how often each of a tokenizer's codes occurs says
which are in use.
"""

import contextlib
import dataclasses
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
from vaediff.spaces import tokenizers
from vaediff.spaces.embeddings import EMBEDDING
from vaediff.spaces.latents import LATENTS
from vaediff.storage import files, identity, places
from vaediff.types import Params, Read

Arrays = dict[str, np.ndarray]
STATISTICS = ('mean', 'std', 'min', 'max')
"""Of latents: float32 [channels], over images and positions."""
MADE_OF = 'made_of'
"""What a stored measurement was made of, as JSON, beside its arrays."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Of:
  """The trained stage that is measured.

  Attributes:
    config: of the run that asks.
    stage: its name.
    folder: `<workdir>/<stage>`: measurements are stored there.
    checkpoints: the folder whose latest checkpoint is measured: that one, or the stage's best.
    mesh: the devices.
    settings: of the reader; see `reads.Measured`.
  """

  config: ConfigDict
  stage: str
  folder: pathlib.Path
  checkpoints: pathlib.Path
  mesh: Mesh
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def load(
  source: reads.Measured,
  config: ConfigDict,
  workdir: pathlib.Path,
  mesh: Mesh,
  checkpoints: pathlib.Path | None = None,
) -> Arrays:
  """Returns the arrays of a measurement, made first if need be.

  Args:
    source: names stage and measurement.
    config: of the run that asks.
    workdir: of that run.
    mesh: the devices.
    checkpoints: the folder whose latest checkpoint is measured, where that is not the stage's.

  Raises:
    UserError: when the stage is not trained, or the stored file is damaged.
  """
  folder = (places.anywhere(source.workdir) if source.workdir else workdir) / source.stage
  of = Of(
    config=config,
    stage=source.stage,
    folder=folder,
    checkpoints=checkpoints or folder,
    mesh=mesh,
    settings=source.settings,
  )
  return BY_NAME[source.measurement](of)


def ensure(experiment: Experiment, config: ConfigDict, workdir: pathlib.Path, stage: str, mesh: Mesh) -> None:
  """Makes what later stages read of a stage that is trained, unless it is there."""
  folder = workdir / stage
  for name in experiment.measures:
    BY_NAME[name](Of(config=config, stage=stage, folder=folder, checkpoints=folder, mesh=mesh))


def latents(of: Of) -> Arrays:
  """Returns `STATISTICS` of an autoencoder's latents, as a later stage draws them."""
  return _statistics(of, LATENTS)


def embeddings(of: Of) -> Arrays:
  """Returns `STATISTICS` of a CLIP stage's vectors of images, of unit length."""
  return _statistics(of, EMBEDDING)


def _statistics(of: Of, name: str) -> Arrays:
  """Returns `STATISTICS` of what a stage observes, by its name."""

  def make() -> Arrays:
    experiment, read = opened(of)
    source = same_run.open_images(of.config, 'train', of.checkpoints)
    log.say(f'{of.stage}: measuring the {name} of {len(source)} training images')
    size = of.config[of.stage].sample.batch_size
    found = moments_of_latents(experiment, read, source, size, of.mesh, of.config.seed, name)
    for key in STATISTICS:
      log.say(f'  {key} per channel: {" ".join(f"{value:.4g}" for value in found[key][:16])}')
    return found

  stored = stored_or_made(of, name, {}, STATISTICS, make)
  return {key: stored[key] for key in STATISTICS}


def fitted_prior(of: Of) -> Arrays:
  """Returns the prior of a VAE's z that `<stage>.prior` describes; {} = N(0, I)."""
  section = of.config[of.stage].prior
  if section.kind == 'normal':
    return {}

  def make() -> Arrays:
    experiment, read = opened(of)
    source = same_run.open_images(of.config, 'train', of.checkpoints)
    count = min(section.num_encoded, len(source))
    counts = '-'.join(map(str, section.num_components))
    log.say(f'fitting a Gaussian mixture ({section.covariance}, {counts} components) to {count} latents')
    size = of.config[of.stage].sample.batch_size
    z = drawn_codes(experiment, read, source, count, size, of.mesh, of.config.seed)
    arrays, scores = prior.fit(z, section, of.config.seed)
    shown = ', '.join(f'{k}: {score:.2f}' for k, score in scores.items())
    log.say(f'held-out nats per latent by components: {shown}; {len(arrays["weights"])} used')
    return arrays

  return stored_or_made(of, prior.PRIOR, section.to_dict(), prior.arrays_of(section), make)


def prior_of_classes(of: Of) -> Arrays:
  """Returns the priors of a VAE's z of every class of the data set; {} for N(0, I)."""
  section, num_classes = of.config[of.stage].prior, of.config.data.num_classes
  arrays = fitted_prior(of)
  if not arrays:
    return {}

  def make() -> Arrays:
    experiment, read = opened(of)
    source = same_run.open_images(of.config, 'train', of.checkpoints)
    count, size = min(section.num_encoded, len(source)), of.config[of.stage].sample.batch_size
    z = drawn_codes(experiment, read, source, count, size, of.mesh, of.config.seed)
    chunks = np.array_split(np.arange(count), max(1, count // 1024))
    labels = np.concatenate([source.read(chunk)[sources.LABEL] for chunk in chunks])
    log.say(f'fitting a Gaussian mixture to the latents of each of {num_classes} classes: {count} in all')
    return prior.fit_classes(arrays, z, labels, num_classes, section, of.config.seed)

  settings = {**section.to_dict(), 'num_classes': num_classes, 'fewest': prior.FEWEST}
  return stored_or_made(of, prior.OF_CLASSES, settings, prior.arrays_of_classes(section), make)


def principal_directions(of: Of) -> Arrays:
  """Returns the PCA of a VAE's z that the reader's settings describe; what is stored is all of it."""

  def make() -> Arrays:
    experiment, read = opened(of)
    source = same_run.open_images(of.config, 'train', of.checkpoints)
    log.say(f'{of.stage}: measuring the directions of the codes of {len(source)} training images')
    size = of.config[of.stage].sample.batch_size
    return pca.spectrum_of(posteriors(experiment, read, source, len(source), size, of.mesh), of.stage)

  spectrum = stored_or_made(of, pca.PCA, {}, pca.SPECTRUM, make)
  kept, fraction = pca.kept(spectrum, of.settings, of.stage), pca.signal_fraction(spectrum)
  log.say(
    f'{of.stage}: the PCA of the code has {len(kept)} of {len(fraction)} directions, with signal fractions '
    f'from {fraction[kept].max():.2g} to {fraction[kept].min():.2g}'
  )
  return pca.arrays_of(spectrum, of.settings, of.stage)


def code_frequencies(of: Of) -> Arrays:
  """Returns how often each code of a tokenizer occurs over the training images, by level; each sums to 1."""
  tokenizer = tokenizers.tokenizer_of(of.config, of.stage, '', 'the measured stage')
  keys = tuple(tokenizers.level_key(level) for level in range(len(tokenizer.sizes)))

  def make() -> Arrays:
    _, read = opened(of)
    source = same_run.open_images(of.config, 'train', of.checkpoints)
    log.say(f'{of.stage}: counting the codes of {len(source)} training images')
    size = of.config[of.stage].sample.batch_size
    counts = counts_of_codes(tokenizer, read[tokenizer.network], source, size, of.mesh)
    found = {key: (count / count.sum()).astype(np.float32) for key, count in zip(keys, counts, strict=True)}
    for (height, width), values in zip(tokenizer.grids, found.values(), strict=True):
      log.say(
        f'  {height}x{width}: {np.count_nonzero(values)} of {len(values)} codes are used, perplexity '
        f'{tokenizers.perplexity(values):.3g}'
      )
    return found

  stored = stored_or_made(of, tokenizers.FREQUENCIES, {}, keys, make)
  return {key: stored[key] for key in keys}


BY_NAME: dict[str, Callable[[Of], Arrays]] = {
  tokenizers.FREQUENCIES: code_frequencies,
  LATENTS: latents,
  EMBEDDING: embeddings,
  pca.PCA: principal_directions,
  prior.PRIOR: fitted_prior,
  prior.OF_CLASSES: prior_of_classes,
}


def made_of(of: Of, settings: dict[str, Any]) -> dict[str, str]:
  """Returns what a measurement is made of: the stage's checkpoint, the images that it saw, settings.

  Where others may take their place, with `data.check_fingerprint` off, it is those that are there.
  """
  images = checkpoint.load_meta(of.checkpoints).get(same_run.DATA, {}).get('train', 'unknown')
  if not of.config.data.check_fingerprint:
    with contextlib.suppress(UserError):  # what is stored is read without images too
      images = sources.open_source(of.config.data, 'train').fingerprint
  return {
    f'the network {of.stage!r}': checkpoint.identity_of(of.checkpoints),
    'the training images': images,
    'the settings': identity.digest([settings, of.config.seed]),
  }


def stored_or_made(
  of: Of, name: str, settings: dict[str, Any], arrays: tuple[str, ...], make: Callable[[], Arrays]
) -> Arrays:
  """Returns the arrays of a stored measurement, which is made and stored first where it is not there.

  Where the folder cannot be written they are used without being stored, and that is said.

  Args:
    of: the stage that is measured.
    name: of the measurement, and of its file, which has the digest of what it was made of.
    settings: that it depends on.
    arrays: the names that it must have.
    make: measures.

  Raises:
    UserError: when the file is damaged, or was made of something else.
  """
  wanted = made_of(of, settings)
  path = of.folder / f'{name}-{identity.digest(wanted)}.npz'
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


def opened(of: Of) -> tuple[Experiment, dict[str, Any]]:
  """Returns the experiment of a trained stage, and its own networks."""
  experiment = experiments.build(of.config, of.stage)
  check = of.config.checkpoints.check_arrays
  read = {
    name: checkpoint.load_frozen(
      of.checkpoints, name, checkpoint.abstract_params(model, of.mesh), check_arrays=check
    )
    for name, model in experiment.networks.items()
  }
  return experiment, read


def drawn_codes(
  experiment: Any, read: Read, source: sources.Source, count: int, batch_size: int, mesh: Mesh, seed: int
) -> np.ndarray:
  """Returns z ~ q(z | x) [count, d] of the first images of a source."""
  codes = []
  for k, (mean, logvar) in enumerate(posteriors(experiment, read, source, count, batch_size, mesh)):
    noise = np.random.default_rng(seed + k).standard_normal(mean.shape, np.float32)
    codes.append(mean + np.exp(0.5 * logvar) * noise)
  return np.concatenate(codes)


def posteriors(
  experiment: Any, read: Read, source: sources.Source, count: int, batch_size: int, mesh: Mesh
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields mean and log variance of q(z | x) [n, d] of the first images of a source, in blocks."""
  where = sharding.batch_sharding(mesh)
  posterior = jax.jit(experiment.posterior, out_shardings=sharding.replicated(mesh))
  for k, chunk in enumerate(np.array_split(np.arange(count), max(1, count // 1024))):
    image = source.read(chunk)['image']
    size = sharding.round_up(min(batch_size, len(image)), mesh)
    parts = []
    for rows in draw.batches(len(image), size):
      x = jax.device_put(pixels.to_unit_range(jnp.asarray(image[rows])), where)
      fresh = min(size, len(image) - int(rows[0]))
      parts.append([part[:fresh] for part in jax.device_get(posterior(read, x))])
      distributed.beat(f'{k} blocks of codes')
    mean, logvar = (np.concatenate(part) for part in zip(*parts, strict=True))
    yield mean, logvar


def counts_of_codes(
  tokenizer: tokenizers.Tokenizer,
  params: Params,
  source: sources.Source,
  batch_size: int,
  mesh: Mesh,
) -> list[np.ndarray]:
  """Returns how often each code occurs over all images of a source, float64 [codes], by level."""
  where = sharding.batch_sharding(mesh)

  def count(params, image, number):
    ids, real = tokenizer.codes(params, pixels.to_unit_range(image)), jnp.arange(image.shape[0]) < number
    return [codebook.histogram(rows, size, real) for rows, size in zip(ids, tokenizer.sizes, strict=True)]

  counting = jax.jit(count, out_shardings=sharding.replicated(mesh))
  total, size = len(source), sharding.round_up(min(batch_size, len(source)), mesh)
  counts = [np.zeros(codes) for codes in tokenizer.sizes]
  for rows in draw.batches(total, size):
    image = jax.device_put(source.read(rows)['image'], where)
    number = min(size, total - int(rows[0]))
    for level, found in enumerate(jax.device_get(counting(params, image, number))):
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
  for rows in draw.batches(total, size):
    count = min(size, total - int(rows[0]))
    image = jax.device_put(source.read(rows)['image'], where)
    numbers = jax.device_put(rows.astype(np.int32), where)
    if shift is None:  # a rough mean, so that squares do not cancel in float32
      rough = jax.device_get(moments(read, image, numbers, key, jnp.float32(0), count))
      shift = (rough['sum'] / (count * rough['positions'])).astype(np.float32)
    parts.append(jax.device_get(moments(read, image, numbers, key, shift.reshape(1, 1, 1, -1), count)))
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
