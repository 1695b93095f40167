"""Networks of other runs that those of a stage begin as: read before its first update, and never again.

What they were is kept by id in the checkpoints of the stage. A stage that has begun needs them no more: they
may be trained on, moved, or be gone.
"""

import pathlib
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from vaediff import reads
from vaediff.errors import UserError
from vaediff.experiments import guides
from vaediff.experiments.base import Experiment, InSpace
from vaediff.run import checkpoint, log, same_run
from vaediff.run import frozen as frozen_networks
from vaediff.storage import identity, places

FREE = (
  'model.dropout',
  'model.dtype',
  'model.remat',
  'diffusion.loss_weight',
  'diffusion.condition_dropout',
  'diffusion.x0_vae_source',
)
"""Fields that may differ: how a network is trained, not what it is."""


def check(experiment: Experiment, config: ConfigDict, workdir: pathlib.Path, stage: str) -> None:
  """Raises UserError when a stage cannot begin as the networks of other runs that its config names.

  Args:
    experiment: of the stage; `starts` declares those networks, and without any there is nothing to check.
    config: of the run.
    workdir: the run's folder.
    stage: its name.

  Raises:
    UserError: when a network is not there, when it is that of the stage itself, or when the stage has already
      been trained without it.
  """
  own = workdir / stage
  step = checkpoint.latest_step(own)
  for name, source in experiment.starts.items():
    folder = places.anywhere(source.workdir) / source.stage
    field = field_of(config, stage, source)
    if folder.resolve() == own.resolve():
      raise UserError(
        f'{field} is {source.workdir!r}, this run: stage {stage!r} would begin as itself. Name another run, '
        'or train in another --workdir'
      )
    if step is not None:
      if name not in begun_as(own):
        raise UserError(
          f'{field} is {source.workdir!r}, but {own} has begun without it, and is at step {step}: use '
          'another --workdir, or leave it out to go on'
        )
    elif checkpoint.latest_step(folder) is None:
      raise UserError(
        f'{field} is {source.workdir!r}, where no stage {source.stage!r} is trained; name the folder of a '
        f'run that has it, or the stage, by {field.removesuffix("workdir")}stage'
      )


def begun_as(folder: pathlib.Path) -> dict[str, str]:
  """Returns the ids of the networks that a trained stage began as; in earlier versions it read them on."""
  meta = checkpoint.load_meta(folder)
  if checkpoint.STARTS in meta:
    return dict(meta[checkpoint.STARTS])
  return frozen_networks.earlier_ids(meta.get('frozen', {}))


def load(
  experiment: Experiment, config: ConfigDict, workdir: pathlib.Path, stage: str, mesh: Mesh
) -> tuple[dict[str, Any], dict[str, str]]:
  """Returns the networks that a stage begins as, and the id of each; of one that has begun the ids alone.

  Raises:
    UserError: when one is damaged, or of another architecture.
    Stale: when one was trained in the maps of another network, such as other latents.
  """
  if not experiment.starts:
    return {}, {}
  own = workdir / stage
  if checkpoint.latest_step(own) is not None:
    known = begun_as(own)
    return {}, {name: known[name] for name in experiment.starts if name in known}
  loaded, found = {}, {}
  frozen_networks.check_tokenizers({**experiment.frozen, **experiment.starts}, config, workdir)
  for name, source in experiment.starts.items():
    run = places.anywhere(source.workdir)
    folder, stored = run / source.stage, same_run.stored_config(run / source.stage)
    frozen_networks.check_same(stored, config, source, run, FREE)
    check_space(stored, config, source, stage, field_of(config, stage, source))
    check_networks(experiment, workdir, folder)
    abstract = checkpoint.abstract_params(source.model, mesh)
    check_arrays = config.checkpoints.check_arrays
    loaded[name] = checkpoint.load_frozen(folder, source.network, abstract, check_arrays=check_arrays)
    found[name] = checkpoint.identity_of(folder)
    log.say(f'{stage}: begins as {folder} at step {checkpoint.latest_step(folder)}')
  return loaded, found


def check_space(
  stored: ConfigDict, config: ConfigDict, source: reads.FromStage, stage: str, field: str
) -> None:
  """Raises UserError where a network was trained in another space, or in latents scaled otherwise."""
  here, there = config[stage], stored[source.stage]
  pairs = {'space': (here.space, there.space), 'space_factor': (here.space_factor, there.space_factor)}
  if here.space == 'latent':
    pairs['autoencoder.scaling'] = (here.autoencoder.scaling, there.autoencoder.scaling)
  for name, (own, other) in pairs.items():
    if own != other:
      raise UserError(
        f'config.{stage}.{name} is {own!r}, but {other!r} in the stage {source.stage!r} that {field} '
        'names; begin with one that was trained in the same maps'
      )


def check_networks(experiment: Experiment, workdir: pathlib.Path, folder: pathlib.Path) -> None:
  """Compares the networks that both read: maps must be those of the same; of conditions others are said.

  Raises:
    Stale: when the maps are of another network.
  """
  if not isinstance(experiment, InSpace):
    return
  known = frozen_networks.ids(experiment, workdir)
  begun = frozen_networks.earlier_ids(checkpoint.load_meta(folder).get('frozen', {}))
  shared = known.keys() & begun.keys()
  maps = shared & set(guides.networks_in(experiment.space.frozen))
  identity.compare(
    f'the checkpoint of {folder}',
    {f'the network {name!r}': begun[name] for name in sorted(maps)},
    {f'the network {name!r}': known[name] for name in sorted(maps)},
    'What is diffused means something else here: read the same network, by the workdir of its section',
  )
  for name in sorted(shared - maps):
    if begun[name] != known[name]:
      log.say(f'note: {folder} was trained with another network {name!r} than is read here')


def field_of(config: ConfigDict, stage: str, source: reads.FromStage) -> str:
  """Returns the field that names the run of a network that a stage begins as."""
  section = config[stage]
  if section.start.workdir == source.workdir:
    return f'config.{stage}.start.workdir'
  return f'config.{stage}.conditions.text.extends.workdir'
