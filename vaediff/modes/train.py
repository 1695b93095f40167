"""`--mode=train`: the stages in order; what is complete is skipped, what is not is resumed."""

import contextlib
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vaediff import reads
from vaediff.data import sources
from vaediff.errors import UserError
from vaediff.evaluation.during_training import make_measure
from vaediff.experiments import quantized
from vaediff.experiments.base import Experiment
from vaediff.machine import compiling, distributed, sharding
from vaediff.modes import checked, interpolate, reconstruct, sample
from vaediff.run import captions, checkpoint, log, loop, measurements, same_run, starting
from vaediff.run import config as configs
from vaediff.run import frozen as frozen_networks
from vaediff.run.config import Run
from vaediff.run.precomputed import precomputed
from vaediff.run.trained import Trained
from vaediff.storage import files, identity


def mode(run: Run) -> None:
  """Trains the stages that the mode was called for."""
  run_stages(run.config, run.workdir, run.stages)


def run_stages(config: ConfigDict, workdir: pathlib.Path, stages: tuple[str, ...]) -> list[dict[str, Any]]:
  """Trains the stages, then draws a first set of samples; returns one summary per stage.

  Nothing is written before config, data and workdir have been checked. A damaged checkpoint is set aside,
  and its stage goes on from the one before.

  Raises:
    UserError: for anything of the user's that cannot work.
    Preempted: after SIGTERM, once everything is saved.
  """
  with contextlib.ExitStack() as held:
    if jax.process_index() == 0:
      held.enter_context(files.lock(workdir, '--mode=train'))
    started, compiled = time.monotonic(), held.enter_context(compiling.Clock())
    made = with_damage_set_aside(workdir, lambda: run_stages_once(config, workdir, stages))
    if jax.process_index() == 0:
      print_table(*made, seconds=time.monotonic() - started, compiling_seconds=compiled.seconds)
    return made[0]


def with_damage_set_aside(workdir: pathlib.Path, once: Callable[[], Any]) -> Any:
  """Returns what a call returns; as often as it meets a damaged checkpoint of the run, that is set aside.

  Raises:
    DamagedCheckpoint: of another run, or again of one that was set aside.
  """
  moved = set()
  while True:
    try:
      return once()
    except checkpoint.DamagedCheckpoint as error:
      if workdir.resolve() not in error.folder.resolve().parents:
        raise  # of another run, which is not ours to change
      if error.folder in moved:
        raise  # made anew and damaged again: the disk, or a mistake of the program
      moved.add(error.folder)
      log.say(f'{error}\nset aside as {checkpoint.set_aside(error)}')


def run_stages_once(
  config: ConfigDict, workdir: pathlib.Path, stages: tuple[str, ...]
) -> tuple[list[dict[str, Any]], dict[str, float], Mapping[str, str]]:
  """Does what `run_stages` says, as long as every checkpoint can be read.

  Returns:
    The summaries, the figures of the reconstructions, and the titles of what they are of.
  """
  mesh = sharding.make_mesh(config.mesh)
  built = checked.check(Run(config, workdir, stages))
  stages = trainable(built, stages)
  # networks check their own fields
  shapes = [jax.eval_shape(built[stage].init, jax.random.key(0)) for stage in trainable(built, config.stages)]
  sharding.check_rules(shapes, sharding.rules_of(config.mesh))
  check_workdir(config, workdir)
  log.say(sources.describe(config.data))
  images = {split: sources.open_source(config.data, split) for split in ('train', 'eval')}
  for stage in stages:
    if built[stage].classes and not images['train'].num_classes:
      raise UserError(
        f'stage {stage!r} reads the labels of images, and those of data.train_split = '
        f'{config.data.train_split!r} have none; use images with labels, or leave out the variant label'
      )
  for stage in config.stages:
    if checkpoint.latest_step(workdir / stage) is not None:
      same_run.check_images(config, images, workdir / stage)
  for stage in stages:
    starting.check(built[stage], config, workdir, stage)
  counts = [len(images[split]) for split in ('train', 'eval')]
  log.say(f'{counts[0]} training and {counts[1]} evaluation images; run folder {workdir}')
  if jax.process_index() == 0:
    configs.save(configs.with_quantized(config, workdir), workdir)
  distributed.wait_for_all('the config is stored')

  summaries = []
  for name in stages:
    summary = finished(built[name], config, workdir, name)
    if summary is None:
      summary = train_stage(built[name], config, workdir, name, images, mesh)
    else:
      check_whole(built[name], config, workdir, name, mesh)
      log.say(f'{name}: complete at step {summary["steps"]}, skipped')
    summaries.append(summary)
    measurements.ensure(built[name], config, workdir, name, mesh)
  return summaries, first_images(config, workdir, stages[-1], mesh), built[stages[-1]].titles


def trainable(built: Mapping[str, Experiment], stages: tuple[str, ...]) -> tuple[str, ...]:
  """Returns the stages that the loop trains.

  Raises:
    UserError: when none of them is.
  """
  found = tuple(stage for stage in stages if built[stage].trainable)
  if not found:
    raise UserError(f'stage {stages[-1]!r} is not trained: --mode=quantize makes it, of a stage that is')
  return found


def train_stage(
  experiment: Experiment,
  config: ConfigDict,
  workdir: pathlib.Path,
  stage: str,
  images: Mapping[str, sources.Source],
  mesh: Mesh,
) -> dict[str, Any]:
  """Trains one stage, from its latest checkpoint if it has one; returns its summary.

  Its pictures on the way are drawn without networks that guide samples alone: they may not be there yet.
  """
  experiment, folder = experiment.alone(), workdir / stage
  captions.check_training(config, stage, images['train'])
  tokenizer = captions.tokenizer_of(config, stage, folder)
  images = {split: captions.with_tokens(config, stage, folder, source) for split, source in images.items()}
  frozen = frozen_networks.load(experiment, config, workdir, mesh, training=stage)
  starts, start_ids = starting.load(experiment, config, workdir, stage, mesh)
  measure, measured_with = make_measure(config, stage, experiment, frozen, images['eval'], mesh)
  return loop.train(
    loop.Stage(
      name=stage,
      folder=folder,
      config=config,
      experiment=experiment,
      frozen=frozen,
      frozen_ids=frozen_networks.ids(experiment, workdir),
      starts=starts,
      start_ids=start_ids,
      train_source=images['train'],
      eval_source=images['eval'],
      extra=precomputed(config, workdir, stage, experiment, frozen, images['train'], mesh),
      mesh=mesh,
      measure=measure,
      measured_with=measured_with,
      tokenizer=tokenizer.digest if tokenizer else '',
    )
  )


def check_workdir(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Raises UserError when the folder holds a stage that was trained with another config."""
  for stage in config.stages:
    if config[stage].experiment != quantized.SECTION and checkpoint.latest_step(workdir / stage) is not None:
      same_run.check_stage(config, workdir / stage, stage, training=True)


def finished(
  experiment: Experiment, config: ConfigDict, workdir: pathlib.Path, stage: str
) -> dict[str, Any] | None:
  """Returns the summary of a stage that has reached its last step; None for one that has not.

  Raises:
    UserError: when a network that it reads is not fully trained, or is not the one that it was begun with.
  """
  for source in experiment.frozen.values():
    if not isinstance(source, reads.FromStage):
      continue
    folder = reads.workdir_of(source, workdir)
    if not is_complete(configs.read(folder) if source.workdir else config, folder, source.stage):
      raise UserError(
        f'stage {stage!r} reads stage {source.stage!r} of {folder}, which is not trained to its last step; '
        f'train it first (--stages={source.stage})'
      )
  if checkpoint.latest_step(workdir / stage) is not None:
    frozen_networks.check_ids(experiment, workdir, workdir / stage)
  return loop.read_summary(workdir / stage) if is_complete(config, workdir, stage) else None


def check_whole(
  experiment: Experiment, config: ConfigDict, workdir: pathlib.Path, stage: str, mesh: Mesh
) -> None:
  """Raises DamagedCheckpoint where the state of a complete stage cannot be read back."""
  keep, check_arrays = config[stage].train.keep_checkpoints, config.checkpoints.check_arrays
  checkpointer = checkpoint.Checkpointer(workdir / stage, keep, check_arrays)
  try:
    checkpointer.restore(loop.abstract_state(experiment, mesh, sharding.rules_of(config.mesh)))
  finally:
    checkpointer.close()


def is_complete(config: ConfigDict, workdir: pathlib.Path, stage: str) -> bool:
  """Returns whether a stage has reached its last step."""
  step = checkpoint.latest_step(workdir / stage)
  return step is not None and step >= config[stage].train.num_steps


def first_images(config: ConfigDict, workdir: pathlib.Path, stage: str, mesh: Mesh) -> dict[str, float]:
  """Writes samples, reconstructions and interpolations of the last stage.

  Of a stage that another feeds, which is not trained yet, reconstructions alone. Those that are there already
  stay, if they were made of the same networks and settings.

  Returns:
    The figures of the reconstructions.
  """
  path = workdir / f'figures-{stage}.json'
  trained = Trained(config, workdir, stage, mesh)
  shown = [config[name].to_dict() for name in ('reconstruct', 'interpolate')]
  made_of = {**trained.made_of, 'the settings of pictures': identity.digest(shown)}
  if trained.experiment.reconstructs and not config.data.check_fingerprint:  # others may be there by now
    made_of['the evaluation images'] = trained.eval_source.fingerprint
  known = stored_figures(path, made_of)
  if distributed.agree(known is not None):
    return known
  started = time.monotonic()
  if trained.draws_alone:
    sample.sample(trained)
  figures = {'seconds/sample': time.monotonic() - started}
  if trained.experiment.reconstructs:
    figures.update(reconstruct.reconstruct(trained))
  if trained.draws_alone and interpolate.kinds_of(trained.experiment):
    interpolate.interpolate(trained)
  if jax.process_index() == 0:
    files.write_json(path, identity.sealed({'made_of': made_of, 'figures': figures}))
  return figures


def stored_figures(path: pathlib.Path, made_of: identity.MadeOf) -> dict[str, float] | None:
  """Returns the figures of a file; None where there is none, or one of something else."""
  if not path.exists():
    return None
  try:
    with files.reading(path):
      stored = files.read_json(path)
      if 'figures' not in stored:  # of an earlier version, which did not say what they were made of
        return None
      stored = identity.unsealed(stored)
      return stored['figures'] if stored['made_of'] == made_of else None
  except files.Damaged as error:
    log.say(str(error))
    return None


def compiling_of(summary: Mapping[str, Any]) -> str:
  """Returns the cell of a stage; a dash where it was imported, or trained in part by an earlier version."""
  seconds = summary.get('compiling_seconds')
  return '-' if seconds is None else f'{seconds:.1f}'


def print_table(
  summaries: list[dict[str, Any]],
  figures: dict[str, float],
  titles: Mapping[str, str],
  seconds: float,
  compiling_seconds: float,
) -> None:
  """Prints one line per stage, the figures of the reconstructions, and the time in all."""
  rows = [('stage', 'steps', 'seconds', 'compiling', 'images/s', 'last training metrics', 'validation')]
  for summary in summaries:
    timed = ('images_per_second', 'waiting/')
    last = {name: f'{v:.4g}' for name, v in summary['last'].items() if not name.startswith(timed)}
    training = ' '.join(f'{name}={value}' for name, value in last.items() if not name.startswith('val/'))
    validation = ' '.join(f'{name[4:]}={value}' for name, value in last.items() if name.startswith('val/'))
    rows.append(
      (
        summary['stage'],
        str(summary['steps']),
        f'{summary["seconds"]:.1f}',
        compiling_of(summary),
        f'{summary["images_per_second"]:.0f}',
        training,
        validation,
      )
    )
  widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
  log.say('')
  for row in rows:
    log.say('  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
  for name, value in figures.items():
    if name.startswith('mse/'):
      what = titles[name[4:]] if name[4:] in titles else name[4:]
      error = f'mean squared error per pixel {value:.5f} (pixels in [0, 1], evaluation split)'
      log.say(f'{what} reconstruction: {error}')
  device = f'{jax.devices()[0].device_kind} x {jax.device_count()}'
  log.say(f'{seconds:.0f} seconds in all, {compiling_seconds:.0f} of them compiling, device: {device}')
