"""Published files as a run: everything is decided and checked first, then written beside it, and moved in.

A stage gets the state that its training would have, as `experiment.init` makes it, with other parameters: it
is sampled, measured, distilled, quantized and trained on as any other. Where the file has the average of the
parameters, that is what is sampled; what it says of its optimizer is not read.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vaediff import experiments, reads
from vaediff.errors import UserError
from vaediff.experiments.base import Experiment, TrainState
from vaediff.machine import sharding
from vaediff.run import checkpoint, guard, log, loop, measurements
from vaediff.run import config as configs
from vaediff.run import frozen as frozen_networks
from vaediff.run.opened import Opened
from vaediff.run.published import ADOPT, FINISH
from vaediff.run.published.base import ORIGINS, SECTION, Import, Network, parts_of
from vaediff.spaces.latents import LATENTS, standard
from vaediff.storage import files, identity, places
from vaediff.types import Params
from vaediff.weights import families, state_dicts, torch_file
from vaediff.weights.families import base as tables
from vaediff.weights.state_dicts import StateDict

RECORD = 'imported.json'
"""In the folder of a stage: where it is from, and what was assumed."""
IMPORTED = 'imported'
"""The same in the `meta` of its checkpoint."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adopted:
  """A network, as it will be stored.

  Attributes:
    params: the network's own.
    average: what is sampled; the same where the file has no average.
    used: names in the file of the tensors that it is made of, and of their averages.
  """

  params: Params
  average: Params
  used: frozenset[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """A run that can be written.

  Attributes:
    config: of the run.
    experiments: by stage, in the order of the config.
    networks: by stage and name.
    records: by stage, what is stored about where it is from.
    steps: by stage.
    scales: by autoencoder stage, what its latents are divided by.
  """

  config: ConfigDict
  experiments: dict[str, Experiment]
  networks: dict[str, dict[str, Adopted]]
  records: dict[str, dict[str, Any]]
  steps: dict[str, int]
  scales: dict[str, float]


def planned(config: ConfigDict, stages: tuple[str, ...]) -> Plan:
  """Returns the run that the files of `config.adopt.path` become; nothing is written.

  Raises:
    UserError: when a file is missing, damaged, holds none of the networks that the stages need, or other ones
      than the config says.
  """
  settings = config[SECTION].copy_and_resolve_references()
  config = config.copy_and_resolve_references()
  config[SECTION].path = ''  # a place is no setting
  task = Import(config, settings, stages)
  opened = [state_dicts.opened(path) for path in paths_of(settings.path)]
  for file in in_order(opened):
    find(task, file)
  if not task.networks:
    raise UserError(
      f'{settings.path} holds {", ".join(part.family.title for file in opened for part in parts_of(file))};'
      f' the stages {", ".join(stages)} have no such network. Take the config, or the variant, that has one'
    )
  steps = {}
  for network in task.networks:
    steps[network.stage] = max(network.step, steps.get(network.stage, 0))
  for stage, step in steps.items():
    task.take(stage, 'train.num_steps', step, 'updates done')
  built = {stage: experiments.build(config, stage) for stage in config.stages if stage in steps}
  for network in task.networks:
    if network.network not in built[network.stage].networks:
      raise UserError(
        f'stage {network.stage!r} has no network {network.network!r}, which {network.file.path} is to fill'
      )
    check_main(task, built[network.stage], network)
  check_all_there(built, steps)
  networks, records = {stage: {} for stage in steps}, {}
  for network in task.networks:
    networks[network.stage][network.network] = adopted(network, built[network.stage], settings.weights)
  for file in opened:
    filled = [networks[network.stage][network.network] for network in task.networks if network.file is file]
    check_left(file, set().union(*(network.used for network in filled)))
  for stage in steps:
    records[stage] = record(task, stage, built[stage])
  order = [stage for stage in config.stages if stage in steps]
  return Plan(
    config=config, experiments={stage: built[stage] for stage in order}, networks=networks, records=records,
    steps=steps, scales=task.scales,
  )  # fmt: skip


def paths_of(path: str) -> list[pathlib.Path]:
  """Returns the files of a comma list; raises UserError where there is none."""
  field = f'config.{SECTION}.path'
  whole = [path] if path and places.expanded(path, field).is_file() else path.split(',')
  found = [places.expanded(part.strip(), field) for part in whole if part.strip()]
  if not found:
    raise UserError(
      f'--mode=import needs the file to import: --config.{SECTION}.path=<file>, several joined by commas'
    )
  return found


def in_order(opened: Iterable[StateDict]) -> list[StateDict]:
  """Returns files whose networks others depend on first: autoencoders and VAEs alone."""
  before = ('vae', 'autoencoder')
  return sorted(opened, key=lambda file: not all(part.family.experiment in before for part in parts_of(file)))


def find(task: Import, file: StateDict) -> None:
  """Adds the networks of a file that the run has a stage for; edits the config."""
  parts = sorted(parts_of(file), key=lambda part: part.family.experiment not in ('vae', 'autoencoder'))
  several = len(parts) > 1
  for part in parts:
    stage = task.stage_of(part, file.path)
    if not stage:
      continue
    options, origin = ADOPT[part.family.name](task, file, part, stage)
    beside = several and part.family.experiment in ('vae', 'autoencoder')  # trained before, its steps unknown
    step = task.settings.step or (1 if beside else file.step) or 1
    task.networks.append(
      Network(part=part, file=file, stage=stage, options=options, origin=origin, step=step)
    )


def check_main(task: Import, experiment: Experiment, network: Network) -> None:
  """Raises UserError where a stage would get a network but not the one that it is about."""
  main = next(iter(experiment.networks))
  if main not in {other.network for other in task.networks if other.stage == network.stage}:
    raise UserError(
      f'{network.file.path} holds {network.part.family.title} alone; stage {network.stage!r} needs its'
      f' {main} too: '
      f'name that file as well, --config.{SECTION}.path=<file>,<file>'
    )


def check_all_there(built: dict[str, Experiment], steps: dict[str, int]) -> None:
  """Raises UserError where a stage reads another one of this run, and no file fills that."""
  for stage, experiment in built.items():
    for source in experiment.frozen.values():
      missing = isinstance(source, reads.FromStage) and not source.workdir and source.stage not in steps
      if missing:
        raise UserError(
          f'stage {stage!r} reads stage {source.stage!r}, which no file fills: name its file too, '
          f'--config.{SECTION}.path=<file>,<file>, or a run that has it as the workdir beside the stage'
        )


def adopted(network: Network, experiment: Experiment, weights: str) -> Adopted:
  """Returns the parameters of a network.

  Raises:
    UserError: when a parameter would not be set exactly once, or a shape is another.
  """
  part, own = network.part, shapes_of(experiment, network.network)
  entries = part.family.entries(own, network.options)
  said = tables.problems(entries, own, part.shapes)
  if said:
    raise UserError(
      f'{network.file.path} holds {part.family.title} that does not fit config.{network.stage}: '
      f'{tables.in_words(said)}. Name the config that it is of; if it is, the file is incomplete'
    )
  raw = read(network, entries, own, part.names)
  average = raw
  if weights == 'ema' and part.averages:
    missing = [entry.name for entry in entries if entry.name and entry.name not in part.averages]
    if missing:
      raise UserError(
        f'{network.file.path} holds no average of {missing[0]} (and {len(missing) - 1} more); take the'
        f' weights themselves with --config.{SECTION}.weights=raw'
      )
    average = read(network, entries, own, part.averages)
  names = [entry.name for entry in entries if entry.name]
  used = {known[name] for known in (part.names, part.averages) for name in names if name in known}
  return Adopted(params=tree_of(raw), average=tree_of(average), used=frozenset(used))


def read(network: Network, entries: list[tables.Entry], own: tables.Shapes, names: Any) -> tables.Arrays:
  """Returns our parameters by path, of the tensors with these names in the file."""
  wanted = {entry.name: names[entry.name] for entry in entries if entry.name}
  found = network.file.read(wanted.values())
  return tables.to_own(entries, own, {name: found[other] for name, other in wanted.items()})


def shapes_of(experiment: Experiment, network: str) -> tables.Shapes:
  """Returns the shapes of a network's parameters by path."""
  tree = jax.eval_shape(experiment.networks[network].init, jax.random.key(0))
  return {path: tuple(leaf.shape) for path, leaf in leaves_of(tree)}


def leaves_of(tree: Any) -> Iterator[tuple[str, Any]]:
  """Yields path, joined by '/', and value of the leaves of a tree."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    yield sharding.path_name(path), leaf


def tree_of(arrays: tables.Arrays) -> Params:
  """Returns a tree of arrays by path."""
  tree: Params = {}
  for path, value in arrays.items():
    *parents, last = path.split('/')
    inside = tree
    for parent in parents:
      inside = inside.setdefault(parent, {})
    inside[last] = value
  return tree


def check_left(file: StateDict, used: set[str]) -> None:
  """Raises UserError for tensors that are neither used nor on the list of what is left out; says the rest."""
  skipped, unknown = families.left_out(file.shapes, used)
  if unknown:
    more = f' (and {len(unknown) - 1} more)' if len(unknown) > 1 else ''
    raise UserError(
      f'{file.path} holds {unknown[0]}{more}, which no network here has a place for: it is of another'
      ' version or a fork of the published code'
    )
  numbers = sum(int(np.prod(file.shapes[name])) for name in used)
  what = ', '.join(f'{count} of {name}' for name, count in skipped.items()) or 'none'
  log.say(f'{file.path.name}: {len(used)} tensors used ({numbers:,} numbers); left out: {what}')
  if file.unread:
    log.say(f'{file.path.name}: not looked at: {", ".join(file.unread)}')


def record(task: Import, stage: str, experiment: Experiment) -> dict[str, Any]:
  """Returns what is stored about where a stage is from."""
  found = [network for network in task.networks if network.stage == stage]
  sources = []
  for network in found:
    repository, licence = ORIGINS[network.origin]
    sources.append(
      {
        'network': network.network,
        'family': network.part.family.name,
        'file': network.file.path.name,
        'sha256': torch_file.sha256_of(network.file.path),
        'layout': network.file.layout,
        'weights': task.settings.weights if network.part.averages else 'as they are in the file',
        'repository': repository,
        'licence': licence,
      }
    )
  fresh = sorted(experiment.networks.keys() - {network.network for network in found})
  return {
    'sources': sources,
    'fresh': fresh,
    'assumed': [
      {'what': what, 'value': value, 'from': where} for what, value, where in task.assumed.get(stage, [])
    ],
  }


# Writing --------------------------------------------------------------------------------------------


def check_new(workdir: pathlib.Path) -> None:
  """Raises UserError where the folder of the run holds anything: an import makes a run, it changes none."""
  if workdir.is_dir() and any(path.name != files.LOCK for path in workdir.iterdir()):
    raise UserError(
      f'{workdir} is not empty: an import makes a new run. Use another --workdir; to join networks of'
      f' several files name them all, --config.{SECTION}.path=<file>,<file>'
    )


def write(plan: Plan, workdir: pathlib.Path) -> None:
  """Writes a run, all of it or nothing.

  Raises:
    UserError: when the folder cannot be written, or is not empty.
  """
  check_new(workdir)
  place = workdir.absolute().with_name(f'.{workdir.name}.{os.getpid()}.tmp')
  try:
    try:
      place.mkdir(parents=True)
      for stage in plan.experiments:
        write_stage(plan, place, stage)
      for stage, scale in plan.scales.items():
        write_scale(plan.config, place, stage, scale)
      configs.save(plan.config, place)
      (workdir / files.LOCK).unlink(missing_ok=True)
      places.move(place, workdir)
    finally:
      places.remove(place)
  except OSError as error:
    raise UserError(f'{workdir} cannot be written: {files.reason(error)}. Nothing was imported') from error


def write_stage(plan: Plan, place: pathlib.Path, stage: str) -> None:
  """Writes checkpoint, summary and record of a stage."""
  config, experiment, step = plan.config, plan.experiments[stage], plan.steps[stage]
  folder, check = place / stage, config.checkpoints.check_arrays
  meta = {
    'stage': stage,
    'data_position': step,
    **dataclasses.asdict(loop.Spent(first_step=step)),
    'config': json.loads(config.to_json()),
    'last': {},
    'frozen': frozen_networks.ids(experiment, place),
    IMPORTED: plan.records[stage],
  }
  checkpointer = checkpoint.Checkpointer(folder, 1, check)
  try:
    checkpointer.save(step, state_of(config, experiment, plan.networks[stage], step), meta)
  finally:
    checkpointer.close()
  summary = {
    'id': checkpoint.identity_of(folder),
    'stage': stage,
    'steps': step,
    **dataclasses.asdict(loop.Spent(first_step=step)),
    'images_per_second': 0.0,
    'last': {},
  }
  files.write_json(folder / loop.SUMMARY, identity.sealed(summary))
  files.write_json(folder / RECORD, plan.records[stage])


def state_of(
  config: ConfigDict, experiment: Experiment, networks: dict[str, Adopted], step: int
) -> TrainState:
  """Returns the state of a stage: as it begins, but for the parameters that were imported, and the step."""
  init = guard.with_counts(experiment.init)
  state = jax.jit(init, compiler_options=loop.run_once_options())(jax.random.key(config.seed))
  known = dict(state.networks)
  for name, found in networks.items():
    before = known[name]
    kept = before.ema_params is not None
    known[name] = before.replace(
      params=jax.tree.map(jnp.asarray, found.params if kept else found.average),
      ema_params=jax.tree.map(jnp.asarray, found.average) if kept else None,
    )
  state = state.replace(step=jnp.int32(step), networks=known)
  for kind, finish in FINISH.items():
    if kind in networks:
      state = finish(experiment, state)
  return state


def write_scale(config: ConfigDict, place: pathlib.Path, stage: str, scale: float) -> None:
  """Writes what the latents of a stage are divided by as if it had been measured."""
  folder, mesh = place / stage, sharding.make_mesh(config.mesh)
  own = Opened(stage, folder)
  target = measurements.Target(config=config, stage=stage, folder=folder, opened=own, mesh=mesh)
  made_of = measurements.made_of(target, {})
  found = standard(config[stage].model.latent_channels)
  arrays = {**found, 'min': scale * found['min'], 'max': scale * found['max'], 'count': np.int64(0)}
  path = folder / f'{LATENTS}-{identity.digest(made_of)}.npz'
  files.write_npz(path, {**arrays, measurements.MADE_OF: json.dumps(made_of)})
