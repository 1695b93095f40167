"""The only loop. Reads from top to bottom: state, resume, compile, then step, log, evaluate, save."""

import collections
import dataclasses
import functools
import json
import pathlib
import time
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vaediff import files
from vaediff.data import loader, sources
from vaediff.errors import UserError
from vaediff.experiments.base import Experiment
from vaediff.machine import distributed, sharding
from vaediff.run import best, checkpoint, draw, guard, log
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
    frozen_steps: at which step each of them is; stored, so that a change is noticed.
    train_source: images to train on.
    eval_source: images to evaluate on.
    extra: arrays read beside the training images, by the same index.
    mesh: the devices.
    measure: params by network -> the figure `train.best_measure`; not used where that is a validation metric.
  """

  name: str
  folder: pathlib.Path
  config: ConfigDict
  experiment: Experiment
  frozen: dict[str, Params]
  frozen_steps: dict[str, int]
  train_source: sources.Source
  eval_source: sources.Source
  extra: dict[str, np.ndarray]
  mesh: Mesh
  measure: Callable[[dict[str, Params]], float] | None = None


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
    The summary that is also written to `<stage>/summary.json`: steps, seconds, images per second, last
    metrics.

  Raises:
    UserError: when a metric is not finite (names step and metric), or a checkpoint cannot be saved or read.
  """
  section = stage.config[stage.name]
  num_steps, batch_size = section.train.num_steps, section.train.batch_size
  check_batch_size(section, stage.name, stage.mesh)

  # State: born sharded, or restored ----------------------------------------------------------------
  checkpointer = checkpoint.Checkpointer(stage.folder, section.train.keep_checkpoints)
  watchdog = distributed.Watchdog(stage.config.processes.silence_timeout_seconds, f'stage {stage.name}')
  preemption = distributed.Preemption()
  abstract = abstract_state(stage.experiment, stage.mesh, sharding.rules_of(stage.config.mesh))
  where = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  run_key = jax.random.fold_in(jax.random.key(stage.config.seed), _number(stage.name))
  key_init, key_train, key_eval = jax.random.split(run_key, 3)
  frozen = sharding.replicate(stage.frozen, stage.mesh)
  start_step, seconds_before, last = 0, 0.0, {}
  if checkpointer.latest_step() is None:
    init = guard.with_counts(stage.experiment.init)
    state = jax.jit(init, out_shardings=where, compiler_options=run_once_options())(key_init)
    state = jax.jit(stage.experiment.start, donate_argnums=0, out_shardings=where)(state, frozen)
  else:
    state, stored = checkpointer.restore(abstract)
    start_step, seconds_before, last = stored['data_position'], stored['seconds'], stored['last']
    log.say(f'{stage.name}: resuming at step {start_step} of {num_steps}')

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
  evaluate = Evaluator(stage, key_eval)
  keeper = best.Best(stage.folder, section.train.best_measure) if section.train.best_measure else None
  key_train = sharding.replicate(key_train, stage.mesh)

  # The loop ----------------------------------------------------------------------------------------
  board = log.StageLog(stage.folder, stage.name, start_step, num_steps)
  watch = Watch(stage.name, watchdog)
  profile = log.Profile(stage.folder, section.train.profile_steps)
  clock = log.Clock()
  started, last_step = time.monotonic(), start_step

  def meta(step: int) -> dict[str, Any]:
    return {
      'stage': stage.name,
      'data_position': step,
      'seconds': seconds_before + time.monotonic() - started,
      'config': json.loads(stage.config.to_json()),
      'last': last,
      'frozen': stage.frozen_steps,
    }

  try:
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
      if step % section.train.eval_every_steps == 0 or is_last:
        with clock.paused():
          values = {f'val/{name}': value for name, value in evaluate(state).items()}
        board.scalars(step, values)
        last.update(values)
      if keeper and (step % section.train.best_every_steps == 0 or is_last):
        watch.drain()
        with clock.paused():
          value = evaluate.figure(state, keeper.measure)
        board.scalars(step, {f'best/{keeper.measure}': value})
        keeper.consider(step, state, meta(step), value)
      if section.train.grid_every_steps and (step % section.train.grid_every_steps == 0 or is_last):
        with clock.paused():
          for name, picture in evaluate.grids(state).items():
            board.picture(step, f'samples/{name}', picture)
      stopping = preemption.reached(step)
      if step % section.train.save_every_steps == 0 or is_last or stopping:
        watch.drain()  # never save a state that is not finite
        board.flush()
        with clock.waiting('checkpoint'):
          checkpointer.save(step, state, meta(step))
      if stopping and not is_last:
        checkpointer.close()
        raise distributed.Preempted(f'stage {stage.name} was stopped and saved at step {step} of {num_steps}')
    checkpointer.close()
    if keeper:
      keeper.close()
  finally:
    profile.close()
    board.close()
    preemption.close()
    watchdog.close()
  seconds = seconds_before + time.monotonic() - started
  return write_summary(stage, num_steps, batch_size, seconds, last)


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

  def __init__(self, stage: str, watchdog: distributed.Watchdog):
    self._stage, self._watchdog = stage, watchdog
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
    self._watchdog.beat(f'step {step}')
    if good:
      return
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    bad = ', '.join(f'{name} = {value}' for name, value in values.items() if not np.isfinite(value))
    what = f'{bad} is not finite' if bad else f'loss = {values["loss"]:.5g} is a jump (train.spike_factor)'
    raise UserError(
      f'stage {self._stage}, step {step}: {what}. The last checkpoint is from before it. Lower '
      f"config.{self._stage}.optim.learning_rate, set optim.clip_norm, or train.on_bad_step='skip' to leave "
      'such updates out, and run again'
    )


class Evaluator:
  """Validation metrics and sample grids of a stage, each compiled once."""

  def __init__(self, stage: Stage, key: jax.Array):
    section = stage.config[stage.name]
    self._stage = stage
    self._where = sharding.batch_sharding(stage.mesh)
    self._batch_size = sharding.round_up(min(section.train.batch_size, len(stage.eval_source)), stage.mesh)
    self._limit, self._grid_images = section.train.eval_images, section.train.grid_images
    self._key = sharding.replicate(key, stage.mesh)
    self._eval_step = jax.jit(stage.experiment.eval_step, out_shardings=sharding.replicated(stage.mesh))
    shape, source = stage.eval_source.image_shape, stage.eval_source
    self._draw = draw.make_draw(stage.experiment, stage.mesh, stage.config.seed, shape, lambda: source)

  def __call__(self, state: Any) -> dict[str, float]:
    """Returns the metrics of the evaluation split, averaged over its examples."""
    totals, count = collections.defaultdict(float), 0.0
    total = min(self._limit or len(self._stage.eval_source), len(self._stage.eval_source))
    batches = loader.eval_batches(
      self._stage.eval_source,
      batch_size=self._batch_size,
      limit=self._limit,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      num_threads=self._stage.config.data.num_threads,
      prefetch=self._stage.config.data.prefetch,
    )
    for index, batch in enumerate(batches):
      weight = float(min(self._batch_size, total - index * self._batch_size))  # of all processes
      key = jax.random.fold_in(self._key, index)
      metrics = self._eval_step(
        {**self._stage.frozen, **state.eval_params}, sharding.put_batch(batch, self._where), key
      )
      for name, value in jax.device_get(metrics).items():
        totals[name] += float(value) * weight
      count += weight
    return {name: total / count for name, total in totals.items()}

  def figure(self, state: Any, measure: str) -> float:
    """Returns a validation metric ('val/loss') or what `Stage.measure` makes of the averaged parameters."""
    if not measure.startswith('val/'):
      return self._stage.measure(state.eval_params)
    values = self(state)
    if measure.removeprefix('val/') not in values:
      valid = ', '.join(f'val/{name}' for name in values)
      raise UserError(f'config.{self._stage.name}.train.best_measure is {measure!r}; metrics here: {valid}')
    return values[measure.removeprefix('val/')]

  def grids(self, state: Any) -> dict[str, np.ndarray]:
    """Returns pictures of the first images of a fixed seed, by name."""
    images = self._draw({**self._stage.frozen, **state.eval_params}, np.arange(self._grid_images))
    return {name: draw.as_grid(value) for name, value in images.items()}


def write_summary(
  stage: Stage, num_steps: int, batch_size: int, seconds: float, last: dict[str, Any]
) -> dict[str, Any]:
  """Writes and returns the stage's line of the final table."""
  summary = {
    'stage': stage.name,
    'steps': num_steps,
    'seconds': seconds,
    'images_per_second': num_steps * batch_size / max(seconds, 1e-9),
    'last': last,
  }
  if jax.process_index() == 0:
    files.write_json(stage.folder / SUMMARY, summary)
  distributed.wait_for_all(f'{stage.name} is complete')  # the next stage looks for the file
  return summary


def _number(text: str) -> int:
  """Returns a 31-bit number of a name, the same in every process and run."""
  return zlib.crc32(text.encode()) & 0x7FFFFFFF
