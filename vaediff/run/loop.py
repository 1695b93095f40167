"""The only loop. Reads from top to bottom: state, resume, compile, then step, log, save, evaluate.

Every way out of it, be it an error, a bad step, SIGTERM or Ctrl-C, waits for the save under way. What is
evaluated comes after the save of its step: a run that resumes there does it first.
"""

import collections
import dataclasses
import functools
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

from vaediff.data import loader, sources
from vaediff.errors import UserError
from vaediff.experiments.base import Experiment
from vaediff.machine import compiling, distributed, sharding
from vaediff.run import captions, checkpoint, guard, log, review, same_run, wandb_log
from vaediff.storage import files, identity
from vaediff.types import Params

SUMMARY = 'summary.json'
MAX_STEPS_AHEAD = 8
"""Steps that may be dispatched before the host waits for one: bounds memory, hides the host's work."""


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
  section = stage.config[stage.name]
  num_steps, batch_size = section.train.num_steps, section.train.batch_size

  # State: born sharded, or restored ----------------------------------------------------------------
  abstract = abstract_state(stage.experiment, stage.mesh, sharding.rules_of(stage.config.mesh))
  where = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  run_key = jax.random.fold_in(jax.random.key(stage.config.seed), _number(stage.name))
  key_init, key_train, key_eval = jax.random.split(run_key, 3)
  frozen = sharding.replicate(stage.frozen, stage.mesh)
  start_step, before, last = 0, Spent(), {}
  if checkpointer.latest_step() is None:
    init = guard.with_counts(stage.experiment.init)
    state = jax.jit(init, out_shardings=where, compiler_options=run_once_options())(key_init)
    first = {**frozen, **sharding.replicate(stage.starts, stage.mesh)}
    state = jax.jit(stage.experiment.start, donate_argnums=0, out_shardings=where)(state, first)
    del first
  else:
    state, stored = checkpointer.restore(abstract)
    start_step, before, last = position_of(checkpointer, stored)
    log.say(f'{stage.name}: resuming at step {start_step} of {num_steps}')
  for note in stage.experiment.notes:
    log.say(f'{stage.name}: {note}')

  # Compile -----------------------------------------------------------------------------------------
  batch_where, replicated = sharding.batch_sharding(stage.mesh), sharding.replicated(stage.mesh)
  batches = loader.train_batches(
    stage.train_source,
    batch_size=batch_size,
    seed=stage.config.seed,
    start_step=start_step,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    num_threads=stage.config.data.num_threads,
    prefetch=stage.config.data.prefetch,
    extra=stage.extra,
  )
  step_fn = make_steps(stage.experiment, section.train, where, replicated)
  also = wandb_log.writers(stage.config, stage.name, stage.folder, start_step)
  board = log.StageLog(stage.folder, stage.name, start_step, num_steps, also)
  reviewer = review.Reviewer(stage, key_eval, board, start_step, last)
  key_train = sharding.replicate(key_train, stage.mesh)

  # The loop ----------------------------------------------------------------------------------------
  watch = Watch(stage.name, checkpointer)
  profile = log.Profile(stage.folder, section.train.profile_steps)
  clock = log.Clock()
  last_step = start_step

  def spent() -> Spent:
    return before.plus(time.monotonic() - started, compiled.seconds)

  def meta(step: int) -> dict[str, Any]:
    return {
      'stage': stage.name,
      'data_position': step,
      **dataclasses.asdict(spent()),
      'config': json.loads(stage.config.to_json()),
      'last': last,
      'frozen': stage.frozen_ids,
      **({checkpoint.STARTS: stage.start_ids} if stage.start_ids else {}),
      same_run.DATA: {'train': stage.train_source.fingerprint, 'eval': stage.eval_source.fingerprint},
      **({captions.DIGEST: stage.tokenizer} if stage.tokenizer else {}),
    }

  try:
    if start_step:
      with clock.paused():
        reviewer(start_step, state, meta)  # where the run was ended between the save and this
    for step in range(start_step + 1, num_steps + 1):
      profile.before(step)
      with clock.waiting('input'):
        batch = next(batches)
      batch = sharding.put_batch(batch, batch_where)
      with jax.transfer_guard('disallow'):
        state, metrics, healthy = step_fn(step - 1)(state, frozen, batch, key_train)
      watch.add(step, healthy, metrics)
      profile.after(step, state)
      board.progress(step)
      is_last = step == num_steps

      if step % section.train.log_every_steps == 0 or is_last:
        watch.drain()
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        times = clock.lap()
        values['images_per_second'] = (step - last_step) * batch_size / times['seconds']
        values |= {f'waiting/{name}': share for name, share in times['waiting'].items()}
        board.scalars(step, values)
        last.update(values)
        last_step = step
      stopping = preemption.reached()
      if step % section.train.save_every_steps == 0 or is_last or stopping:
        watch.drain()  # never save a state that is not finite
        board.flush()
        with clock.waiting('checkpoint'):
          checkpointer.save(step, state, meta(step))
      if stopping:
        checkpointer.close()
        text = f'stage {stage.name} was stopped and saved at step {step} of {num_steps}'
        raise distributed.Preempted(text, preemption.status)
      if reviewer.due(step):
        watch.drain()  # nor one is evaluated
        with clock.paused():
          reviewer(step, state, meta)
    checkpointer.close()
    reviewer.close()
  finally:
    reviewer.wait()
    profile.close()
    board.close()
  return write_summary(stage, num_steps, batch_size, spent(), last)


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


def make_steps(
  experiment: Experiment, train: ConfigDict, where: Any, replicated: Any
) -> Callable[[int], Callable[..., Any]]:
  """Returns updates done -> the compiled step that follows; each kind of update is compiled once."""
  compiled = {}

  def step_after(step: int):
    kind = experiment.kind_of(step)
    if kind not in compiled:
      compiled[kind] = make_step(experiment, train, where, replicated, kind)
    return compiled[kind]

  return step_after


def make_step(experiment: Experiment, train: ConfigDict, where: Any, replicated: Any, kind: str = ''):
  """Returns the compiled, guarded step: (state, frozen, batch, key) -> (state, metrics, whether to go on)."""
  update = guard.guarded(functools.partial(experiment.train_step, kind=kind), train)

  def step_fn(state, frozen, batch, key):
    state, metrics = update(state, frozen, batch, jax.random.fold_in(key, state.step))
    healthy = metrics.pop(guard.HEALTHY)
    return state, metrics, healthy

  return jax.jit(step_fn, donate_argnums=0, out_shardings=(where, replicated, replicated))


class Watch:
  """Stops the run when a step is bad, without waiting for the device at each step."""

  def __init__(self, stage: str, checkpointer: checkpoint.Checkpointer):
    self._stage, self._checkpointer = stage, checkpointer
    self._pending = collections.deque()

  def add(self, step: int, healthy: jax.Array, metrics: dict[str, jax.Array]) -> None:
    """Looks at the steps that are done; waits only when too many are under way."""
    self._pending.append((step, healthy, metrics))
    while self._pending and (self._pending[0][1].is_ready() or len(self._pending) > MAX_STEPS_AHEAD):
      self._check(*self._pending.popleft())

  def drain(self) -> None:
    """Waits for all steps under way and looks at them."""
    while self._pending:
      self._check(*self._pending.popleft())

  def _check(self, step: int, healthy: jax.Array, metrics: dict[str, jax.Array]) -> None:
    good = jax.device_get(healthy)
    distributed.beat(f'step {step}')
    if good:
      return
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    bad = ', '.join(f'{name} = {value}' for name, value in values.items() if not np.isfinite(value))
    what = f'{bad} is not finite' if bad else f'loss = {values["loss"]:.5g} is a jump (train.spike_factor)'
    raise UserError(
      f'stage {self._stage}, step {step}: {what}. It was not saved; {self._checkpointer.kept()}. Lower '
      f"config.{self._stage}.optim.learning_rate, set optim.clip_norm, or train.on_bad_step='skip' to leave "
      'such updates out, and run again'
    )


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
