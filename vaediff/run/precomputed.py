"""What conditions see in every training image: observed once, kept memory-mapped beside the stage."""

import contextlib
import functools
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vaediff.data import arrays, pixels, sources
from vaediff.errors import UserError
from vaediff.experiments.base import Experiment
from vaediff.machine import distributed, sharding
from vaediff.run import draw, log
from vaediff.run import frozen as frozen_networks
from vaediff.storage import buckets, files, identity
from vaediff.types import Read

FACTS = 'made_of.json'
"""In the folder: what the arrays were made of, and their digests."""


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

  Computed once; of other networks or other images it is another folder.

  Raises:
    UserError: when the folder is damaged, or cannot be written, or nothing can be learned of what is stored.
  """
  if not experiment.stored:
    return {}
  made_of = {
    **{f'the network {name!r}': value for name, value in frozen_networks.ids(experiment, workdir).items()},
    'the training images': source.fingerprint,
  }
  folder = workdir / stage / f'precomputed-{identity.digest(made_of)}'
  remote = isinstance(folder, buckets.BucketPath)
  if not distributed.agree((folder / FACTS if remote else folder).exists()):
    # every process computes all and holds the result; the first one writes it
    beside = buckets.Beside(folder)
    temporary = beside.here if remote else folder.with_name(f'.{folder.name}.tmp-{jax.process_index()}')
    try:
      temporary.mkdir(parents=True, exist_ok=True)
      write(temporary, experiment, frozen, source, config[stage].train.batch_size, mesh)
      if jax.process_index() == 0:
        kept = {name: arrays.digest_of_file(temporary / f'{name}.npy') for name in experiment.stored}
        files.write_json(temporary / FACTS, identity.sealed({'made_of': made_of, 'arrays': kept}))
        if remote:
          beside.push(last=FACTS)
        else:
          os.replace(temporary, folder)
    except OSError as error:
      raise UserError(f'{folder} cannot be written: {files.reason(error)}') from error
    finally:
      shutil.rmtree(temporary, ignore_errors=True)
    distributed.wait_for_all(f'wrote {folder}')
  stored = read(folder, experiment, made_of, len(source))
  experiment.check_stored(stored)
  return stored


def read(
  folder: pathlib.Path, experiment: Experiment, made_of: identity.MadeOf, count: int
) -> dict[str, np.ndarray]:
  """Returns the arrays of a folder, memory-mapped; what they were made of, and their bytes, are compared."""
  mend = f'remove the folder {folder}: it is made again'
  with files.reading(folder / FACTS, mend):
    folder = buckets.fetched(folder)  # they are mapped into memory
    facts = identity.unsealed(files.read_json(folder / FACTS, mend))
    identity.compare(str(folder), facts['made_of'], made_of, mend.capitalize())
    return {
      name: arrays.open_array(
        folder / f'{name}.npy', (count, *struct.shape), struct.dtype, facts['arrays'][name], mend
      )
      for name, struct in experiment.stored.items()
    }


def write(
  folder: pathlib.Path,
  experiment: Experiment,
  frozen: Read,
  source: sources.Source,
  batch_size: int,
  mesh: Mesh,
) -> None:
  """Writes what is seen in every image of a source, batch by batch; images as bytes.

  Raises:
    UserError: when what is seen in an image is not finite.
  """

  @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
  def run(read, batch):
    batch = pixels.prepare(batch, None)
    seen = experiment.store(read, batch, batch[sources.IMAGE])
    finite = {name: jnp.isfinite(value).reshape(len(value), -1).all(axis=1) for name, value in seen.items()}
    return finite, {
      name: pixels.to_bytes(value) if experiment.stored[name].dtype == np.uint8 else value
      for name, value in seen.items()
    }

  count, where = len(source), sharding.batch_sharding(mesh)
  log.say(f'precomputing {", ".join(experiment.stored)} of {count} images')
  size = sharding.round_up(min(batch_size, count), mesh)
  with contextlib.ExitStack() as opened:
    writers = {
      name: opened.enter_context(arrays.Writer(folder / f'{name}.npy', (count, *struct.shape), struct.dtype))
      for name, struct in experiment.stored.items()
    }
    for rows, num_real in draw.padded_batches(count, size):
      finite, seen = jax.device_get(run(frozen, jax.device_put(source.read(rows), where)))
      distributed.beat(f'image {rows[-1]} of the {count} that are precomputed')
      start = int(rows[0])
      for name, value in seen.items():
        check_finite(name, finite[name][:num_real], start)
        writers[name].write(start, value[:num_real])


def check_finite(name: str, finite: np.ndarray, first: int) -> None:
  """Raises UserError where what is seen in an image is not finite; `first` is the index of the first."""
  if not finite.all():
    image = first + int(np.flatnonzero(~finite)[0])
    raise UserError(
      f'{name} of training image {image} is not finite: the network that makes it has diverged; train its '
      'stage anew with a lower learning rate'
    )
