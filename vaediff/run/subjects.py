"""What is quantized, with records of what it is called with: of a sampler's steps, or of images of the data.

A stage with a sampler has the records of `run.calibration`. A VAE, an autoencoder, a light decoder and a
token prior have none: what their networks read follows from an image (`experiments.called`), and the records
are those of training images that are drawn once.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from vaediff import checks
from vaediff.data import pixels, sources
from vaediff.errors import UserError
from vaediff.experiments import called
from vaediff.experiments.denoiser import Denoiser
from vaediff.run import calibration, draw, log
from vaediff.run.trained import Trained
from vaediff.storage import identity
from vaediff.types import Params

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments and keywords of `Model.apply`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
  """A network and its records.

  Attributes:
    params: of it, in floats.
    records: arrays with a row for each record.
    t: the time of each; 0 of a network that reads none.
    calls: (some of the records) -> its calls; the first is that with all conditions.
    size: records of a batch.
    made_of: ids of the records, of the checkpoint and of all that is read beside it.
  """

  params: Params
  records: Any
  t: Float[np.ndarray, ' records']
  calls: Callable[[Any], tuple[Call, ...]]
  size: int
  made_of: identity.MadeOf

  def batches(self) -> Iterator[tuple[Any, int]]:
    """Yields the records in batches of one size, the last padded by its last, and how many are real."""
    yield from batches(self.records, len(self.t), self.size)


def batches(records: Any, count: int, size: int) -> Iterator[tuple[Any, int]]:
  """Yields rows of arrays in batches of one size, the last padded by its last, and how many are real."""
  size = min(size, count)
  for rows, num_real in draw.padded_batches(count, size):
    yield jax.tree.map(lambda x: x[rows], records), num_real  # noqa: B023


def branches(denoiser: Denoiser) -> tuple[tuple[str, ...], ...]:
  """Returns the conditions that are dropped in each call of the network for one guided x0_hat."""
  weaker = (term.without for term in denoiser.guiding_terms() if term.guide is None)
  return tuple(dict.fromkeys(((), *weaker)))


def arguments(denoiser: Denoiser, batch: Any, without: tuple[str, ...] = ()) -> tuple[Any, ...]:
  """Returns what the network is called with for some records (y, t, values)."""
  y, t, values = batch
  return denoiser.inputs(y, t, values, denoiser.conditions.without(without, y.shape[0]))


def of(trained: Trained, section: ConfigDict, network: str) -> Subject:
  """Returns a network of an opened stage with the records that `config.quantize.calibration` asks for.

  Raises:
    UserError: for bad settings, or a stage of which no records are known.
    Stale: when its records are of another checkpoint.
  """
  checks.check(section, calibration.BOUNDS, 'config.quantize.calibration.')
  if trained.experiment.diffusion is not None:
    return of_steps(trained, section)
  reader = called.reader_of(trained.experiment)
  if reader is None:
    raise UserError(
      f'stage {trained.stage!r} has no sampler whose steps could be recorded, and its network does not read '
      "what follows from an image; use config.quantize.method = 'minmax'"
    )
  return of_images(trained, section, network, reader)


def of_steps(trained: Trained, section: ConfigDict) -> Subject:
  """Returns the denoiser of a stage with records of its sampler."""
  denoiser, records = trained.experiment.diffusion.denoiser, calibration.load(trained, section)
  return Subject(
    params=trained.read[denoiser.network],
    records=(records.y, records.t, records.values),
    t=records.t,
    calls=lambda batch: tuple((arguments(denoiser, batch, without), {}) for without in branches(denoiser)),
    size=section.batch_size,
    made_of={'records': calibration.path_of(trained, section).name, **calibration.made_of(trained)},
  )


def of_images(trained: Trained, section: ConfigDict, network: str, reader: called.Reader) -> Subject:
  """Returns a network with what it is called with for `num_samples` training images, which a seed chooses."""
  experiment, source = trained.experiment, trained.images('train')
  count = min(section.num_samples, len(source))
  log.say(f'{trained.stage}: observing {count} images')
  chosen = np.sort(np.random.default_rng(section.seed).choice(len(source), count, replace=False))

  @jax.jit
  def observe(read: Any, batch: Any, rows: jax.Array) -> called.Calls:
    x = pixels.to_unit_range(batch[sources.IMAGE])
    return reader.of(experiment, read, batch, x, called.keys_of(section.seed, rows))

  parts = []
  for rows, fresh in batches(chosen, count, section.batch_size):
    batch = {name: jnp.asarray(value) for name, value in source.read(rows).items()}
    seen = jax.device_get(observe(trained.read, batch, jnp.asarray(rows, jnp.int32)))
    parts.append(jax.tree.map(lambda x: x[:fresh], seen[network]))  # noqa: B023
  method = {} if reader.method is None else {'method': reader.method}
  asked = {name: section[name] for name in ('num_samples', 'seed')}
  return Subject(
    params=trained.read[network],
    records=jax.tree.map(lambda *each: np.concatenate(each), *parts),
    t=np.zeros(count, np.float32),
    calls=lambda calls: tuple((args, {**keywords, **method}) for args, keywords in calls),
    size=section.batch_size,
    made_of={'records': identity.digest([network, asked]), **calibration.made_of(trained)},
  )
