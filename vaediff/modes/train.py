"""`--mode=train`: the stages in order; what is complete is skipped, what is not is resumed."""

import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vaediff import experiments, files, reads
from vaediff.data import sources
from vaediff.errors import UserError
from vaediff.evaluation.during_training import make_measure
from vaediff.experiments.base import Experiment
from vaediff.machine import distributed, sharding
from vaediff.modes import interpolate, reconstruct, sample
from vaediff.run import checkpoint, log, loop, measurements
from vaediff.run import config as configs
from vaediff.run import frozen as frozen_networks
from vaediff.run.config import Run
from vaediff.run.precomputed import precomputed
from vaediff.run.trained import Trained


def mode(run: Run) -> None:
  """Trains the stages."""
  run_stages(run.config, run.workdir, run.stages)


def run_stages(config: ConfigDict, workdir: pathlib.Path, stages: tuple[str, ...]) -> list[dict[str, Any]]:
  """Trains the stages, then draws a first set of samples; returns one summary per stage.

  Nothing is written before config, data and workdir have been checked. A damaged checkpoint is set aside,
  and its stage goes on from the one before.

  Raises:
    UserError: for anything of the user's that cannot work.
    Preempted: after SIGTERM, once everything is saved.
  """
  while True:
    try:
      return run_stages_once(config, workdir, stages)
    except checkpoint.DamagedCheckpoint as error:
      if workdir.resolve() not in error.folder.resolve().parents:
        raise  # of another run, which is not ours to change
      log.say(f'{error}\nset aside as {checkpoint.set_aside(error)}')


def run_stages_once(
  config: ConfigDict, workdir: pathlib.Path, stages: tuple[str, ...]
) -> list[dict[str, Any]]:
  """Does what `run_stages` says, as long as every checkpoint can be read."""
  started = time.monotonic()
  mesh = sharding.make_mesh(config.mesh)
  built = {stage: experiments.build(config, stage) for stage in config.stages}
  # networks check their own fields
  shapes = [jax.eval_shape(built[stage].init, jax.random.key(0)) for stage in config.stages]
  sharding.check_rules(shapes, sharding.rules_of(config.mesh))
  check_workdir(config, workdir)
  log.say(sources.describe(config.data))
  train_source, eval_source = (sources.open_source(config.data, split) for split in ('train', 'eval'))
  log.say(f'{len(train_source)} training and {len(eval_source)} evaluation images; run folder {workdir}')
  if jax.process_index() == 0:
    configs.save(config, workdir)
  distributed.wait_for_all('the config is stored')

  summaries, fresh = [], False
  for name in stages:
    folder = workdir / name
    complete = is_complete(config, workdir, name)
    steps = frozen_steps(built[name], config, workdir, name)
    frozen = {} if complete else frozen_networks.load(built[name], config, workdir, mesh, training=name)
    if complete:
      summaries.append(read_summary(folder, config, name))
      log.say(f'{name}: complete at step {summaries[-1]["steps"]}, skipped')
      measurements.ensure(built[name], config, workdir, name, mesh)
      continue
    fresh = True
    for old in workdir.glob('figures-*.json'):
      old.unlink(missing_ok=True)  # of images that this training makes out of date
    summaries.append(
      loop.train(
        loop.Stage(
          name=name,
          folder=folder,
          config=config,
          experiment=built[name],
          frozen=frozen,
          frozen_steps=steps,
          train_source=train_source,
          eval_source=eval_source,
          extra=precomputed(config, workdir, name, built[name], frozen, train_source, mesh),
          mesh=mesh,
          measure=make_measure(config, name, built[name], frozen, eval_source, mesh),
        )
      )
    )
    measurements.ensure(built[name], config, workdir, name, mesh)
  figures = first_images(config, workdir, stages[-1], mesh, fresh)
  if jax.process_index() == 0:
    print_table(summaries, figures, built[stages[-1]].titles, time.monotonic() - started)
  return summaries


def check_workdir(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Raises UserError when the folder holds a run of another config."""
  if not (workdir / configs.FILE).exists():
    return
  stored = configs.read(workdir)
  trained = tuple(stage for stage in stored.stages if checkpoint.latest_step(workdir / stage) is not None)
  configs.check_same_run(config, stored, trained, workdir)


def is_complete(config: ConfigDict, workdir: pathlib.Path, stage: str) -> bool:
  """Returns whether a stage has reached its last step."""
  folder = workdir / stage
  step = checkpoint.latest_step(folder)
  return step is not None and step >= config[stage].train.num_steps and (folder / loop.SUMMARY).exists()


def frozen_steps(
  experiment: Experiment, config: ConfigDict, workdir: pathlib.Path, stage: str
) -> dict[str, int]:
  """Returns the training step of each network that a stage reads.

  Raises:
    UserError: when one of them is not fully trained, or is not at the step that the stage was begun with.
  """
  for source in experiment.frozen.values():
    if not isinstance(source, reads.FromStage):
      continue
    folder = pathlib.Path(source.workdir) if source.workdir else workdir
    if not is_complete(configs.read(folder) if source.workdir else config, folder, source.stage):
      raise UserError(
        f'stage {stage!r} reads stage {source.stage!r} of {folder}, which is not trained to its last step; '
        f'train it first (--stages={source.stage})'
      )
  steps = frozen_networks.steps(experiment, workdir)
  if checkpoint.latest_step(workdir / stage) is not None:
    begun = checkpoint.load_meta(workdir / stage)['frozen']
    if begun != steps:
      raise UserError(
        f'stage {stage!r} of {workdir} was trained on frozen networks at steps {begun}, which are now at '
        f'{steps}; move {workdir / stage} away to train it anew, or use another --workdir'
      )
  return steps


def read_summary(folder: pathlib.Path, config: ConfigDict, stage: str) -> dict[str, Any]:
  """Returns the summary that the finished stage wrote."""
  try:
    return json.loads((folder / loop.SUMMARY).read_text())
  except ValueError as error:
    raise UserError(f'{folder / loop.SUMMARY} is damaged ({error}); remove it and run again') from error


def first_images(
  config: ConfigDict, workdir: pathlib.Path, stage: str, mesh: Mesh, fresh: bool
) -> dict[str, float]:
  """Writes samples, reconstructions and interpolations of the last stage, unless they are there already.

  Returns:
    The figures of the reconstructions.
  """
  path = workdir / f'figures-{stage}.json'
  if distributed.agree(path.exists()) and not fresh:
    return json.loads(path.read_text())
  trained = Trained(config, workdir, stage, mesh)
  started = time.monotonic()
  if trained.draws_alone:
    sample.sample(trained)
  figures = {'seconds/sample': time.monotonic() - started}
  if trained.experiment.reconstructs:
    figures.update(reconstruct.reconstruct(trained))
  if interpolate.kinds_of(trained.experiment):
    interpolate.interpolate(trained)
  if jax.process_index() == 0:
    files.write_json(path, figures)
  return figures


def print_table(
  summaries: list[dict[str, Any]],
  figures: dict[str, float],
  titles: Mapping[str, str],
  seconds: float,
) -> None:
  """Prints one line per stage, the figures of the reconstructions, and the time in all."""
  rows = [('stage', 'steps', 'seconds', 'images/s', 'last training metrics', 'validation')]
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
  log.say(f'{seconds:.0f} seconds in all, device: {jax.devices()[0].device_kind} x {jax.device_count()}')
