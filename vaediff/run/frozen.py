"""What a stage reads and does not train: loaded, as shapes, or with values of no meaning; and its ids."""

import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vaediff import reads
from vaediff.errors import UserError
from vaediff.experiments.base import Experiment
from vaediff.machine import sharding
from vaediff.models import quantized
from vaediff.run import captions, checkpoint, measurements, opened, same_run
from vaediff.run.opened import Opened
from vaediff.storage import identity, places


def load(
  experiment: Experiment,
  config: ConfigDict,
  workdir: pathlib.Path,
  mesh: Mesh,
  *,
  training: str = '',
  own: Opened | None = None,
  as_stored: bool = False,
) -> dict[str, Any]:
  """Returns what an experiment reads: networks of this run or another, measurements, published arrays.

  While a stage trains, it does not read what is for sampling alone.

  Args:
    experiment: that reads.
    config: of the run.
    workdir: the run's folder.
    mesh: the devices.
    training: the stage that is being trained; what is measured of it once it is trained is neutral so far.
    own: the stage whose samples are drawn, and the checkpoint that it is opened from: what is measured of it
      is measured of that one.
    as_stored: quantized networks are read as they are stored, also where floats are made of them here.

  Raises:
    UserError: when something is missing, damaged, of another architecture or made of something else.
  """
  sources = experiment.frozen if training else of(experiment)
  loaded = {
    name: _loaded(source, config, workdir, mesh, training, own, as_stored) for name, source in sources.items()
  }
  check_tokenizers(sources, config, workdir)
  if not training:
    check_guides(experiment, workdir, own)
  return loaded


def _loaded(
  source: reads.Reads,
  config: ConfigDict,
  workdir: pathlib.Path,
  mesh: Mesh,
  training: str,
  own: Opened | None,
  as_stored: bool,
) -> Any:
  """Returns what `load` has of one source; see there."""
  match source:
    case reads.FromStage():
      folder = reads.workdir_of(source, workdir)
      field = field_of(config, source) if source.workdir else ''
      checkpoint.folder_of(folder / source.stage, source.step, field)
      if not source.workdir:
        same_run.check_stage(config, folder / source.stage, source.stage)
      else:
        check_same(same_run.stored_config(folder / source.stage), config, source, folder)
      network = (folder / source.stage, source.network, checkpoint.abstract_params(source.model, mesh))
      check_arrays = config.checkpoints.check_arrays
      stored = checkpoint.load_frozen(*network, check_arrays=check_arrays, step=source.step)
      return stored if as_stored else quantized.ready(source.model, stored)
    case reads.Measured() if source.stage == training and not source.workdir:
      return sharding.replicate(source.neutral(), mesh)
    case reads.Measured():
      its_own = own if own and own.stage == source.stage and not source.workdir else None
      return sharding.replicate(measurements.load(source, config, workdir, mesh, its_own), mesh)
    case reads.Captions():
      found = captions.table(source, config, workdir, training=source.stage == training)
      return sharding.replicate(found, mesh)
    case reads.Published():
      return sharding.replicate(source.value, mesh)


def of(experiment: Experiment) -> dict[str, reads.Reads]:
  """Returns all that an experiment reads when it is sampled."""
  return {**experiment.frozen, **experiment.for_sampling}


def ids(experiment: Experiment, workdir: pathlib.Path, *, sampling: bool = False) -> dict[str, str]:
  """Returns the id of each network, and of each published array, that an experiment reads, by its name.

  What is measured is not among them: it is made of these and of the data. Nor is what is read for sampling
  alone, unless that is asked for: a trained stage does not depend on it. Networks that its own were made of
  are, where they are still there.
  """
  found = {
    name: own
    for name, (stage, choice) in experiment.made_of.items()
    if (own := opened.id_of(workdir / stage, choice))
  }
  for name, source in (of(experiment) if sampling else experiment.frozen).items():
    match source:
      case reads.FromStage():
        folder = reads.workdir_of(source, workdir)
        found[name] = checkpoint.identity_of(folder / source.stage, source.step)
      case reads.Published():
        found[name] = source.digest
  return found


def check_ids(
  experiment: Experiment, workdir: pathlib.Path, stage_folder: pathlib.Path, step: int = 0
) -> None:
  """Raises Stale when a network or published array that a trained stage reads has changed since its training.

  Args:
    experiment: of the stage.
    workdir: the run's folder.
    stage_folder: holds the checkpoint of the stage: `<workdir>/<stage>`, or its best.
    step: of the checkpoint; 0 = the latest.

  Raises:
    Stale: names the stage's checkpoint and the first network or array that is another now.
    UserError: when a run that holds one of them is not found.
  """
  meta = checkpoint.load_meta(stage_folder, step)
  for source in experiment.frozen.values():
    if isinstance(source, reads.FromStage) and source.workdir:  # a run that may have been moved
      stored = same_run.stored_config(stage_folder, step)
      checkpoint.latest_folder(places.anywhere(source.workdir) / source.stage, field_of(stored, source))
  now, begun = ids(experiment, workdir), earlier_ids(meta.get('frozen', {}))
  for name in experiment.starts.keys() & begun.keys():  # of an earlier version
    del begun[name]
  begun = {name: value for name, value in begun.items() if name in now or name not in experiment.made_of}
  if checkpoint.ID not in meta:  # of an earlier version, which stored networks only, and their steps
    now = {name: value for name, value in now.items() if name in begun}
  identity.compare(
    f'the checkpoint of {stage_folder}',
    {f'the network {name!r}': value for name, value in begun.items()},
    {f'the network {name!r}': value for name, value in now.items()},
    f'Move {stage_folder} away to train it anew, put back what it was trained with, or use another --workdir',
  )


def check_tokenizers(
  sources: Mapping[str, reads.Reads], config: ConfigDict, workdir: pathlib.Path
) -> None:
  """Raises Stale when networks that read captions, such as a stage and its teacher, use different tokenizers.

  Args:
    sources: what a stage reads; without `reads.Captions` among them there is nothing to compare.
    config: of the run.
    workdir: the run's folder.

  Raises:
    Stale: names the first network that was trained with another tokenizer than the stage that reads it.
  """
  own = next((source for source in sources.values() if isinstance(source, reads.Captions)), None)
  if own is None:
    return
  place = reads.workdir_of(own, workdir)
  tokenizer = captions.tokenizer_of(config, own.stage, place / own.stage)
  for name, source in sources.items():
    if not isinstance(source, reads.FromStage):
      continue
    folder = reads.workdir_of(source, workdir) / source.stage
    meta = checkpoint.load_meta(folder, source.step)
    if captions.DIGEST in meta and meta[captions.DIGEST]:
      identity.compare(
        f'the network {name!r}, the checkpoint of {folder},',
        {'the tokenizer': meta[captions.DIGEST]},
        {'the tokenizer': tokenizer.digest},
        'Name a stage that was trained on the same captions, with the same section `text`',
      )


def check_guides(experiment: Experiment, workdir: pathlib.Path, own: Opened | None) -> None:
  """Raises UserError when a network that is read for sampling alone, such as a guide, does not fit the stage.

  Args:
    experiment: of the stage.
    workdir: the run's folder.
    own: the stage and the checkpoint that it is opened from; None = a stage without one.

  Raises:
    Stale: when it was trained with another network than the stage reads by the same name, such as latents of
      another autoencoder.
    UserError: when it is the very checkpoint that it should guide.
  """
  known = ids(experiment, workdir)
  for name, source in experiment.for_sampling.items():
    if not isinstance(source, reads.FromStage):
      continue
    folder = reads.workdir_of(source, workdir) / source.stage
    meta = checkpoint.load_meta(folder, source.step)
    if own and checkpoint.identity_of(folder, source.step) == own.id:
      raise UserError(
        f'{name!r} is the checkpoint {checkpoint.folder_of(folder, source.step)}, which is that of stage '
        f'{own.stage!r} itself: it differs from itself in nothing. Name an earlier step, or another stage'
      )
    begun = earlier_ids(meta.get('frozen', {}))
    shared = [other for other in source.same if other in begun and other in known]
    identity.compare(
      f'{name!r}, the checkpoint of {folder},',
      {f'the network {other!r}': begun[other] for other in shared},
      {f'the network {other!r}': known[other] for other in shared},
      'Name one that was trained with what this stage reads, such as by the workdir of its section',
    )


def earlier_ids(stored: Any) -> dict[str, str]:
  """Returns the ids that a checkpoint holds of what it reads; an earlier version stored steps instead."""
  if not isinstance(stored, Mapping):
    return {}
  of_step = checkpoint.OF_STEP
  return {
    name: f'{of_step}{value}' if isinstance(value, int) else str(value) for name, value in stored.items()
  }


def field_of(config: ConfigDict, source: reads.FromStage | reads.Measured) -> str:
  """Returns the field that says where another run lies, as 'refiner.vae.workdir'.

  Of several that name that run it is one whose section names the stage, too: 'refiner.autoencoder.workdir'
  for the autoencoder, where the VAE is of the same run.
  """

  def fields(section: ConfigDict, prefix: str) -> Iterator[tuple[bool, str]]:
    for name, value in section.items():
      if isinstance(value, ConfigDict):
        yield from fields(value, f'{prefix}{name}.')
      elif name == 'workdir' and value == source.workdir:
        yield 'stage' in section and section.stage == source.stage, f'{prefix}{name}'

  found = sorted(fields(config, ''), key=lambda field: not field[0])  # stable: else the first
  return found[0][1] if found else '<stage>...workdir'


def check_same(
  stored: ConfigDict,
  config: ConfigDict,
  source: reads.FromStage,
  folder: pathlib.Path,
  free: Collection[str] = (),
) -> None:
  """Raises UserError where another run's stage is not the network, or the diffusion, that `config` says.

  Args:
    stored: the config of the other run.
    config: of this one.
    source: the network that is read.
    folder: of the other run.
    free: fields, as 'model.dropout', that may differ.
  """
  stage, section = source.stage, source.section or source.stage
  for name in ('model', 'diffusion'):
    if name not in config[section]:
      continue
    here = config[section][name].to_dict()
    there = stored[stage][name].to_dict() if stage in stored and name in stored[stage] else {}
    for field, value in here.items():
      if f'{name}.{field}' in free:
        continue
      if field not in there or there[field] != value:
        raise UserError(
          f'config.{section}.{name}.{field} is {value!r}, but {there[field] if field in there else None!r} '
          f'in the stage {stage!r} of {folder}; give the values that it was trained with'
        )


def abstract(experiment: Experiment, mesh: Mesh) -> dict[str, Any]:
  """Returns shapes, types and shardings of what `load` would return.

  Raises:
    UserError: when published weights are not there.
  """

  def one(source: reads.Reads) -> Any:
    match source:
      case reads.FromStage():
        return checkpoint.abstract_params(source.model, mesh)
      case reads.Measured() | reads.Captions():
        return sharding.abstract_replicated(source.neutral(), mesh)
      case reads.Published():
        return sharding.abstract_replicated(source.value, mesh)

  return {name: one(source) for name, source in of(experiment).items()}


def fresh(experiment: Experiment, mesh: Mesh) -> dict[str, Any]:
  """Returns fresh networks and neutral measurements, to measure speed with; what is published as it is."""

  def one(source: reads.Reads) -> Any:
    match source:
      case reads.FromStage():
        init = jax.jit(source.model.init, out_shardings=sharding.replicated(mesh))
        return quantized.ready(source.model, init(jax.random.key(1)))
      case reads.Measured() | reads.Captions():
        return sharding.replicate(source.neutral(), mesh)
      case reads.Published():
        return sharding.replicate(source.value, mesh)

  return {name: one(source) for name, source in of(experiment).items()}
