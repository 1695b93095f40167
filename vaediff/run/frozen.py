"""The networks that a stage reads and does not train: loaded, as shapes, or with weights of no meaning."""

import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vaediff.errors import UserError
from vaediff.experiments.base import Experiment, HasPrior, offers
from vaediff.machine import sharding
from vaediff.models.functional import Model
from vaediff.reads import STATISTICS, Published
from vaediff.run import checkpoint, measurements
from vaediff.run import config as configs
from vaediff.types import Params


def abstract_params(model: Model, mesh: Mesh) -> Params:
  """Returns shapes, types and (replicated) shardings of a network's parameters."""
  return _abstract(jax.eval_shape(model.init, jax.random.key(0)), mesh)


def load(experiment: Experiment, config: ConfigDict, workdir: pathlib.Path, mesh: Mesh) -> dict[str, Params]:
  """Returns what an experiment reads: networks of this run or another, and what is given.

  Raises:
    UserError: when one is missing, damaged or of another architecture, or its latents were not measured.
  """
  networks = {}
  for name, source in experiment.frozen.items():
    if isinstance(source, Published):
      networks[name] = sharding.replicate(source.load(), mesh)
      continue
    folder = pathlib.Path(source.workdir) if source.workdir else workdir
    if source.workdir:
      check_same(configs.read(folder), config, source.stage, folder)
    networks[name] = checkpoint.load_frozen(
      folder / source.stage, source.network, abstract_params(source.model, mesh)
    )
    if source.latent_channels:
      networks[name + STATISTICS] = sharding.replicate(measurements.load(folder / source.stage), mesh)
  return networks


def check_same(stored: ConfigDict, config: ConfigDict, stage: str, folder: pathlib.Path) -> None:
  """Raises UserError where another run's stage is not the network, or the diffusion, that `config` says."""
  for name in ('model', 'diffusion'):
    if name not in config[stage]:
      continue
    here = config[stage][name].to_dict()
    there = stored[stage][name].to_dict() if stage in stored and name in stored[stage] else {}
    for field, value in here.items():
      if there.get(field) != value:
        raise UserError(
          f'config.{stage}.{name}.{field} is {value!r}, but {there.get(field)!r} in the stage {stage!r} of '
          f'{folder}; give the same values as {folder / configs.FILE}'
        )


def abstract(experiment: Experiment, mesh: Mesh) -> dict[str, Any]:
  """Returns shapes, types and shardings of what `load` would return.

  Raises:
    UserError: when published weights are not there.
  """
  networks = {}
  for name, source in experiment.frozen.items():
    if isinstance(source, Published):
      networks[name] = _abstract(source.load(), mesh)
      continue
    networks[name] = abstract_params(source.model, mesh)
    if source.latent_channels:
      networks[name + STATISTICS] = _abstract(_standard(source.latent_channels), mesh)
  return networks | _normal_prior(experiment)


def fresh(experiment: Experiment, mesh: Mesh) -> dict[str, Params]:
  """Returns networks as initialised and standard latents, to measure speed; what is given as it is."""
  everywhere, networks = sharding.replicated(mesh), {}
  for name, source in experiment.frozen.items():
    if isinstance(source, Published):
      networks[name] = sharding.replicate(source.load(), mesh)
      continue
    networks[name] = jax.jit(source.model.init, out_shardings=everywhere)(jax.random.key(1))
    if source.latent_channels:
      networks[name + STATISTICS] = sharding.replicate(_standard(source.latent_channels), mesh)
  return networks | _normal_prior(experiment)


def _normal_prior(experiment: Experiment) -> dict[str, Any]:
  """Returns N(0, I) for an experiment that draws codes: which prior it is changes no program's cost."""
  draws = offers(experiment, HasPrior) and experiment.draws_codes
  return {'prior': {}} if draws else {}


def _standard(channels: int) -> measurements.Statistics:
  ones = np.ones(channels, np.float32)
  return {'mean': 0 * ones, 'std': ones, 'min': -ones, 'max': ones}


def _abstract(shapes: Any, mesh: Mesh) -> Any:
  where = sharding.replicated(mesh)
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes)
