"""A stage is trained: its state, or where it was stopped, then its steps (`run.steps`), then its summary.

Every way out of it, be it an error, a bad step, SIGTERM or Ctrl-C, waits for the save under way.
"""

import dataclasses
import json
import pathlib
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vaediff.data import sources
from vaediff.errors import UserError
from vaediff.experiments.base import Experiment
from vaediff.machine import compiling, distributed, sharding
from vaediff.run import captions, checkpoint, guard, log, same_run
from vaediff.run.steps import Steps
from vaediff.storage import files, identity
from vaediff.types import Params

SUMMARY = 'summary.json'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """Everything a stage is trained with.

  Attributes:
    name: of the stage.
    folder: `<workdir>/<stage>`.
    config: the whole config; `config.<name>` is the stage's section.
    experiment: built from it.
    frozen: parameters of the networks of earlier stages.
    frozen_ids: the id of each of them; stored, so that a change is noticed.
    train_source: images to train on.
    eval_source: images to evaluate on.
    extra: arrays read beside the training images, by the same index.
    mesh: the devices.
    measure: params by network -> the figure `train.best_measure`; not used where that is a validation metric.
    measured_with: what that figure depends on beside the parameters, for the best checkpoint.
    tokenizer: the digest of what makes numbers of captions; '' = none are read.
    starts: parameters that the networks begin as; {} where training has begun.
    start_ids: the id of each network that training began as; stored.
  """

  name: str
  folder: pathlib.Path
  config: ConfigDict
  experiment: Experiment
  frozen: dict[str, Params]
  frozen_ids: dict[str, str]
  train_source: sources.Source
  eval_source: sources.Source
  extra: dict[str, np.ndarray]
  mesh: Mesh
  measure: Callable[[dict[str, Params]], float] | None = None
  measured_with: Mapping[str, str] = dataclasses.field(default_factory=dict)
  tokenizer: str = ''
  starts: dict[str, Params] = dataclasses.field(default_factory=dict)
  start_ids: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Spent:
  """The time of a stage, over all its runs.

  Attributes:
    seconds: in all, from building the state to the last evaluation.
    compiling_seconds: of them, those in which something was compiled; None where an earlier version, which
      did not count them, began the stage.
    first_step: the step from which on they were counted: that of a network that was imported, else 0.
  """

  seconds: float = 0.0
  compiling_seconds: float | None = 0.0
  first_step: int = 0

  def plus(self, seconds: float, compiling_seconds: float) -> 'Spent':
    """Returns this time and more."""
    before = self.compiling_seconds
    compiling = None if before is None else before + compiling_seconds
    return Spent(self.seconds + seconds, compiling, self.first_step)


def abstract_state(experiment: Experiment, mesh: Mesh, rules: sharding.Rules = sharding.RULES) -> Any:
  """Returns shapes, types and shardings of the state, the guard's counts too, without allocating it."""
  shapes = jax.eval_shape(guard.with_counts(experiment.init), jax.random.key(0))
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
    shapes,
    sharding.shardings_of(shapes, mesh, rules),
  )


def train(stage: Stage) -> dict[str, Any]:
  """Trains the stage to `train.num_steps`, from its latest checkpoint if it has one.

  Returns:
    The summary that is also written to `<stage>/summary.json`: steps, seconds, those of them spent compiling,
    images per second, last metrics.

  Raises:
    UserError: when a metric is not finite (names step and metric), or a checkpoint cannot be saved or read.
    Preempted: after SIGTERM or Ctrl-C, once the step is saved.
  """
  section = stage.config[stage.name]
  check_batch_size(section, stage.name, stage.mesh)
  keep, check_arrays = section.train.keep_checkpoints, stage.config.checkpoints.check_arrays
  checkpointer = checkpoint.Checkpointer(stage.folder, keep, check_arrays)
  silence = stage.config.processes.silence_timeout_seconds
  watchdog = distributed.Watchdog(silence, f'stage {stage.name}', checkpointer.kept)
  preemption = distributed.Preemption()
  try:
    with compiling.Clock() as clock:
      return train_with(stage, checkpointer, preemption, clock)
  except BaseException as error:
    if not (isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1):  # peers may be lost
      kept = checkpointer.kept()
      if not isinstance(error, distributed.Preempted) and kept not in str(error):
        log.say(f'stage {stage.name}: {kept}')
    raise
  finally:
    preemption.close()
    watchdog.close()


def train_with(
  stage: Stage,
  checkpointer: checkpoint.Checkpointer,
  preemption: distributed.Preemption,
  compiled: compiling.Clock,
) -> dict[str, Any]:
  """Does what `train` says; whoever calls it waits for the save under way, however it ends."""
  started = time.monotonic()
  train = stage.config[stage.name].train
  run_key = jax.random.fold_in(jax.random.key(stage.config.seed), _number(stage.name))
  key_init, *keys = jax.random.split(run_key, 3)
  frozen = sharding.replicate(stage.frozen, stage.mesh)
  abstract = abstract_state(stage.experiment, stage.mesh, sharding.rules_of(stage.config.mesh))
  where = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  state, start_step, before, last = begin(stage, checkpointer, abstract, frozen, key_init)
  for note in stage.experiment.notes:
    log.say(f'{stage.name}: {note}')

  def spent() -> Spent:
    return before.plus(time.monotonic() - started, compiled.seconds)

  def meta(step: int) -> dict[str, Any]:
    return stored_beside(stage, step, spent(), last)

  steps = Steps(stage, state, where, start_step, frozen, keys, last)
  del state  # each step takes the place of the one before
  steps.run(checkpointer, preemption, meta)
  return write_summary(stage, train.num_steps, train.batch_size, spent(), last)


def begin(
  stage: Stage,
  checkpointer: checkpoint.Checkpointer,
  abstract: Any,
  frozen: dict[str, Params],
  key: jax.Array,
) -> tuple[Any, int, Spent, dict[str, float]]:
  """Returns the state, born sharded or restored, its step, the time trained before, and the last metrics.

  Args:
    stage: to train.
    checkpointer: of its checkpoints; where there is one the state is that of the latest.
    abstract: shapes, types and shardings of the state; see `abstract_state`.
    frozen: parameters that the training reads, on the devices.
    key: of the initial parameters.

  Raises:
    DamagedCheckpoint: when no state, or not where it stands, can be read of the checkpoints that there are.
  """
  if checkpointer.latest_step() is not None:
    state, stored = checkpointer.restore(abstract)
    start_step, before, last = position_of(checkpointer, stored)
    num_steps = stage.config[stage.name].train.num_steps
    log.say(f'{stage.name}: resuming at step {start_step} of {num_steps}')
    return state, start_step, before, last
  where = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  init = guard.with_counts(stage.experiment.init)
  state = jax.jit(init, out_shardings=where, compiler_options=run_once_options())(key)
  first = {**frozen, **sharding.replicate(stage.starts, stage.mesh)}
  state = jax.jit(stage.experiment.start, donate_argnums=0, out_shardings=where)(state, first)
  return state, 0, Spent(), {}


def stored_beside(stage: Stage, step: int, spent: Spent, last: dict[str, float]) -> dict[str, Any]:
  """Returns what is stored beside the state of a step: where training was, and what it was made of."""
  return {
    'stage': stage.name,
    'data_position': step,
    **dataclasses.asdict(spent),
    'config': json.loads(stage.config.to_json()),
    'last': last,
    'frozen': stage.frozen_ids,
    **({checkpoint.STARTS: stage.start_ids} if stage.start_ids else {}),
    same_run.DATA: {'train': stage.train_source.fingerprint, 'eval': stage.eval_source.fingerprint},
    **({captions.DIGEST: stage.tokenizer} if stage.tokenizer else {}),
  }


def position_of(
  checkpointer: checkpoint.Checkpointer, stored: dict[str, Any]
) -> tuple[int, Spent, dict[str, float]]:
  """Returns what is stored with a state: its step, the time trained, the last metrics.

  Raises:
    DamagedCheckpoint: when it is not there.
  """
  try:
    seconds, step = float(stored['seconds']), int(stored['data_position'])
    first = int(stored.get('first_step', 0 if seconds else step))  # of earlier versions: that of an import
    spent = Spent(seconds, stored.get('compiling_seconds'), first)
    return step, spent, dict(stored['last'])
  except (KeyError, TypeError, ValueError) as error:
    folder = checkpointer.folder / str(checkpointer.latest_step())
    raise checkpoint.damaged(folder, ValueError('its meta does not say where training was')) from error


def check_batch_size(section: ConfigDict, stage: str, mesh: Mesh) -> None:
  """Raises UserError unless the stage's batch can be split over the devices."""
  parts = mesh.size * section.train.microbatches
  if section.train.batch_size % parts:
    microbatches = (
      f' times {section.train.microbatches} microbatches' if section.train.microbatches > 1 else ''
    )
    raise UserError(
      f'config.{stage}.train.batch_size must be a multiple of the {mesh.size} devices{microbatches}, '
      f'got {section.train.batch_size}'
    )


def run_once_options() -> dict[str, Any]:
  """Returns compiler options for what runs once: on a CPU, optimizing it takes longer than running it."""
  if jax.default_backend() != 'cpu':
    return {}
  return {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}


def write_summary(
  stage: Stage, num_steps: int, batch_size: int, spent: Spent, last: dict[str, Any]
) -> dict[str, Any]:
  """Writes and returns the stage's line of the final table."""
  summary = {
    'id': checkpoint.identity_of(stage.folder),
    'stage': stage.name,
    'steps': num_steps,
    **dataclasses.asdict(spent),
    'images_per_second': (num_steps - spent.first_step) * batch_size / max(spent.seconds, 1e-9),
    'last': last,
  }
  if jax.process_index() == 0:
    files.write_json(stage.folder / SUMMARY, identity.sealed(summary))
  distributed.wait_for_all(f'{stage.name} is complete')  # the next stage looks for the file
  return summary


def read_summary(folder: pathlib.Path) -> dict[str, Any] | None:
  """Returns the summary of the checkpoint that a stage has; None where it is missing or of another.

  It is derived from the training: whoever finds none finishes the stage again, which takes no step.
  """
  path = folder / SUMMARY
  if not path.exists():
    return None
  try:
    with files.reading(path):
      summary, own = files.read_json(path), checkpoint.identity_of(folder)
      if own.startswith(checkpoint.OF_STEP):  # of an earlier version, which did not seal it
        return summary if isinstance(summary['last'], dict) and summary['steps'] > 0 else None
      summary = identity.unsealed(summary)
      return summary if summary['id'] == own else None
  except files.Damaged as error:
    log.say(str(error))
    return None


def _number(text: str) -> int:
  """Returns a 31-bit number of a name, the same in every process and run."""
  return zlib.crc32(text.encode()) & 0x7FFFFFFF
