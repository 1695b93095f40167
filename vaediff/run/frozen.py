"""What a stage reads and does not train: loaded, as shapes, or with values of no meaning."""

import pathlib
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vaediff import reads
from vaediff.errors import UserError
from vaediff.experiments.base import Experiment
from vaediff.machine import sharding
from vaediff.run import checkpoint, measurements
from vaediff.run import config as configs


def load(
  experiment: Experiment, config: ConfigDict, workdir: pathlib.Path, mesh: Mesh, training: str = ''
) -> dict[str, Any]:
  """Returns what an experiment reads: networks of this run or another, measurements, published arrays.

  Args:
    experiment: that reads.
    config: of the run.
    workdir: the run's folder.
    mesh: the devices.
    training: the stage that is being trained; what is measured of it once it is trained is neutral so far.

  Raises:
    UserError: when something is missing, damaged or of another architecture.
  """

  def one(source: reads.Reads) -> Any:
    match source:
      case reads.FromStage():
        folder = pathlib.Path(source.workdir) if source.workdir else workdir
        if source.workdir:
          check_same(configs.read(folder), config, source.stage, folder)
        params = checkpoint.abstract_params(source.model, mesh)
        return checkpoint.load_frozen(folder / source.stage, source.network, params)
      case reads.Measured() if source.stage == training and not source.workdir:
        return sharding.replicate(source.neutral(), mesh)
      case reads.Measured():
        return sharding.replicate(measurements.load(source, config, workdir, mesh), mesh)
      case reads.Published():
        return sharding.replicate(source.load(), mesh)

  return {name: one(source) for name, source in experiment.frozen.items()}


def check_same(stored: ConfigDict, config: ConfigDict, stage: str, folder: pathlib.Path) -> None:
  """Raises UserError where another run's stage is not the network, or the diffusion, that `config` says."""
  for name in ('model', 'diffusion'):
    if name not in config[stage]:
      continue
    here = config[stage][name].to_dict()
    there = stored[stage][name].to_dict() if stage in stored and name in stored[stage] else {}
    for field, value in here.items():
      if field not in there or there[field] != value:
        raise UserError(
          f'config.{stage}.{name}.{field} is {value!r}, but {there[field] if field in there else None!r} in '
          f'the stage {stage!r} of {folder}; give the same values as {folder / configs.FILE}'
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
      case reads.Measured():
        return sharding.abstract_replicated(source.neutral(), mesh)
      case reads.Published():
        return sharding.abstract_replicated(source.load(), mesh)

  return {name: one(source) for name, source in experiment.frozen.items()}


def fresh(experiment: Experiment, mesh: Mesh) -> dict[str, Any]:
  """Returns fresh networks and neutral measurements, to measure speed with; what is published as it is."""

  def one(source: reads.Reads) -> Any:
    match source:
      case reads.FromStage():
        return jax.jit(source.model.init, out_shardings=sharding.replicated(mesh))(jax.random.key(1))
      case reads.Measured():
        return sharding.replicate(source.neutral(), mesh)
      case reads.Published():
        return sharding.replicate(source.load(), mesh)

  return {name: one(source) for name, source in experiment.frozen.items()}


def steps(experiment: Experiment, workdir: pathlib.Path) -> dict[str, int | None]:
  """Returns the training step of each network of an earlier stage that an experiment reads."""
  found = {}
  for name, source in experiment.frozen.items():
    if isinstance(source, reads.FromStage):
      folder = pathlib.Path(source.workdir) if source.workdir else workdir
      found[name] = checkpoint.latest_step(folder / source.stage)
  return found
