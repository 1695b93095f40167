"""The networks that a stage reads and does not train: loaded, as shapes, or with weights of no meaning."""

import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vaediff import checkpoint, latents, sharding
from vaediff import config as configs
from vaediff.errors import UserError
from vaediff.experiments.base import STATISTICS, Experiment, Published
from vaediff.models.functional import Model
from vaediff.types import Params


def abstract_params(model: Model, mesh: Mesh) -> Params:
  """Returns shapes, types and (replicated) shardings of a network's parameters."""
  return _abstract(jax.eval_shape(model.init, jax.random.key(0)), mesh)


def load(experiment: Experiment, config: ConfigDict, workdir: pathlib.Path, mesh: Mesh) -> dict[str, Params]:
  """Returns the networks that an experiment reads, of this run, another, or published.

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
      stored = configs.read(folder)
      if source.stage not in stored or stored[source.stage].model != config[source.stage].model:
        raise UserError(
          f'config.{source.stage}.model differs from the stage {source.stage!r} of {folder}; '
          f'give the same values as {folder / configs.FILE}'
        )
    networks[name] = checkpoint.load_frozen(
      folder / source.stage, source.network, abstract_params(source.model, mesh)
    )
    if source.latent_channels:
      networks[name + STATISTICS] = sharding.replicate(latents.load(folder / source.stage), mesh)
  return networks


def abstract(experiment: Experiment, mesh: Mesh) -> dict[str, Any]:
  """Returns shapes, types and shardings of what `load` would return.

  Raises:
    UserError: when a published network is not there.
  """
  networks = {}
  for name, source in experiment.frozen.items():
    if isinstance(source, Published):
      networks[name] = _abstract(source.load(), mesh)
      continue
    networks[name] = abstract_params(source.model, mesh)
    if source.latent_channels:
      networks[name + STATISTICS] = _abstract(_standard(source.latent_channels), mesh)
  return networks


def fresh(experiment: Experiment, mesh: Mesh) -> dict[str, Params]:
  """Returns networks as initialised and standard latents, to measure speed; published ones as they are."""
  everywhere, networks = sharding.replicated(mesh), {}
  for name, source in experiment.frozen.items():
    if isinstance(source, Published):
      networks[name] = sharding.replicate(source.load(), mesh)
      continue
    networks[name] = jax.jit(source.model.init, out_shardings=everywhere)(jax.random.key(1))
    if source.latent_channels:
      networks[name + STATISTICS] = sharding.replicate(_standard(source.latent_channels), mesh)
  return networks


def _standard(channels: int) -> latents.Statistics:
  ones = np.ones(channels, np.float32)
  return {'mean': 0 * ones, 'std': ones, 'min': -ones, 'max': ones}


def _abstract(shapes: Any, mesh: Mesh) -> Any:
  where = sharding.replicated(mesh)
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes)
