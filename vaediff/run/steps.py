"""The only loop. `Steps` reads from top to bottom: compile, then step, log, save, evaluate.

What is evaluated comes after the save of its step: a run that resumes there does it first.
"""

import collections
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vaediff.data import loader
from vaediff.errors import UserError
from vaediff.experiments.base import Experiment
from vaediff.machine import distributed, sharding
from vaediff.run import checkpoint, guard, log, review, wandb_log
from vaediff.types import Params

MAX_STEPS_AHEAD = 8
"""Steps that may be dispatched before the host waits for one: bounds memory, hides the host's work."""


class Steps:
  """The steps that this process takes, with all that they use and what follows each.

  Args:
    stage: `loop.Stage`.
    state: after the first `start_step` steps, on the devices; it is given away.
    where: its shardings.
    start_step: steps that were taken before.
    frozen: parameters that the training reads, on the devices.
    keys: of the steps, and of the evaluation.
    last: the latest metrics by name; it is updated.
  """

  def __init__(
    self,
    stage: Any,
    state: Any,
    where: Any,
    start_step: int,
    frozen: dict[str, Params],
    keys: list[jax.Array],
    last: dict[str, float],
  ):
    section, (key_train, key_eval) = stage.config[stage.name], keys
    self._stage, self._train, self._frozen, self._last = stage, section.train, frozen, last
    self._state, self._start_step, self._logged_step = state, start_step, start_step
    self._batch_where = sharding.batch_sharding(stage.mesh)
    self._batches = loader.train_batches(
      stage.train_source,
      batch_size=section.train.batch_size,
      seed=stage.config.seed,
      start_step=start_step,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      num_threads=stage.config.data.num_threads,
      prefetch=stage.config.data.prefetch,
      extra=stage.extra,
    )
    self._step_after = make_steps(stage.experiment, section.train, where, sharding.replicated(stage.mesh))
    also = wandb_log.writers(stage.config, stage.name, stage.folder, start_step)
    self._board = log.StageLog(stage.folder, stage.name, start_step, section.train.num_steps, also)
    self._reviewer = review.Reviewer(stage, key_eval, self._board, start_step, last)
    self._key = sharding.replicate(key_train, stage.mesh)
    self._profile = log.Profile(stage.folder, section.train.profile_steps)
    self._clock = log.Clock()

  def run(
    self,
    checkpointer: checkpoint.Checkpointer,
    preemption: distributed.Preemption,
    meta: Callable[[int], dict[str, Any]],
  ) -> None:
    """Takes all steps that are left; logs, saves and evaluates where it is due.

    Args:
      checkpointer: saves the states.
      preemption: says when the process is to stop.
      meta: step -> what is stored beside its state.

    Raises:
      UserError, Preempted: as `loop.train`.
    """
    watch, num_steps = Watch(self._stage.name, checkpointer), self._train.num_steps
    try:
      if self._start_step:
        self._review(self._start_step, meta)  # where the run was ended between the save and this
      for step in range(self._start_step + 1, num_steps + 1):
        healthy, metrics = self._take(step)
        watch.add(step, healthy, metrics)
        self._profile.after(step, self._state)
        self._board.progress(step)
        is_last = step == num_steps
        if step % self._train.log_every_steps == 0 or is_last:
          watch.drain()
          self._log(step, metrics)
        stopping = preemption.reached()
        if step % self._train.save_every_steps == 0 or is_last or stopping:
          watch.drain()  # never save a state that is not finite
          self._board.flush()
          with self._clock.waiting('checkpoint'):
            checkpointer.save(step, self._state, meta(step))
        if stopping:
          checkpointer.close()
          text = f'stage {self._stage.name} was stopped and saved at step {step} of {num_steps}'
          raise distributed.Preempted(text, preemption.status)
        if self._reviewer.due(step):
          watch.drain()  # nor one is evaluated
          self._review(step, meta)
      checkpointer.close()
      self._reviewer.close()
    finally:
      self._reviewer.wait()
      self._profile.close()
      self._board.close()

  def _take(self, step: int) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Takes a step; returns whether it was a good one, and its metrics, neither waited for."""
    self._profile.before(step)
    with self._clock.waiting('input'):
      batch = next(self._batches)
    batch = sharding.put_batch(batch, self._batch_where)
    with jax.transfer_guard('disallow'):
      self._state, metrics, healthy = self._step_after(step - 1)(self._state, self._frozen, batch, self._key)
    return healthy, metrics

  def _log(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Logs the metrics of a step, with the speed since the last one that was logged."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    times = self._clock.lap()
    count = (step - self._logged_step) * self._train.batch_size
    values['images_per_second'] = count / times['seconds']
    values |= {f'waiting/{name}': share for name, share in times['waiting'].items()}
    self._board.scalars(step, values)
    self._last.update(values)
    self._logged_step = step

  def _review(self, step: int, meta: Callable[[int], dict[str, Any]]) -> None:
    """Evaluates the state of a step; its time is no part of the speed."""
    with self._clock.paused():
      self._reviewer(step, self._state, meta)


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
