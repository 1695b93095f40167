"""Around any update: what happens to one whose loss or gradient is not finite, or whose loss jumps.

The guard's counts are part of the state of every stage, so that a run can change its policy and go on.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vaediff.experiments.base import TrainState
from vaediff.types import Batch, Metrics

POLICIES = ('stop', 'skip')
GUARD = 'guard'
HEALTHY = 'healthy'
"""Metric that the loop takes out: whether the run may go on."""
WARMUP = 100
"""Steps before a jump of the loss is looked for."""
DECAY = 0.99
"""Of the running mean of the loss."""


def with_counts(init: Callable[[jax.Array], TrainState]) -> Callable[[jax.Array], TrainState]:
  """Returns the function that makes the state at step 0 with the guard's counts."""

  def counted(key: jax.Array) -> TrainState:
    state = init(key)
    guard = {'skipped': jnp.int32(0), 'seen': jnp.int32(0), 'loss_average': jnp.float32(0)}
    return state.replace(extra={**state.extra, GUARD: guard})

  return counted


def guarded(
  train_step: Callable[..., tuple[TrainState, Metrics]], train: ConfigDict
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Returns the update that leaves a bad one out, or says so; the step advances either way.

  Args:
    train_step: (state, frozen, batch, key) -> (state, metrics).
    train: a stage's `train` section: 'on_bad_step' is one of `POLICIES`; a loss above 'spike_factor' times
      its running mean is bad, 0 = never.
  """
  skip, spike_factor = train.on_bad_step == 'skip', train.spike_factor

  def step(state: TrainState, frozen: Any, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
    after, metrics = train_step(state, frozen, batch, key)
    guard = state.extra[GUARD]
    bad = ~jnp.all(jnp.stack([jnp.all(jnp.isfinite(value)) for value in metrics.values()]))
    if spike_factor:
      jump = metrics['loss'] > spike_factor * guard['loss_average']
      bad |= (guard['seen'] >= WARMUP) & jump
    if skip:
      kept = jax.tree.map(lambda old, new: jnp.where(bad, old, new), state, _with_guard(after, guard))
      after = kept.replace(step=after.step)
    mean = jnp.where(
      guard['seen'] == 0,
      metrics['loss'],
      DECAY * guard['loss_average'] + (1 - DECAY) * metrics['loss'],
    )
    counted = {
      'skipped': guard['skipped'] + (bad & skip),
      'seen': guard['seen'] + ~bad,
      'loss_average': jnp.where(bad, guard['loss_average'], mean),
    }
    if skip:
      metrics = {**metrics, 'skipped_updates': counted['skipped']}
    return _with_guard(after, counted), {**metrics, HEALTHY: ~bad | skip}

  return step


def _with_guard(state: TrainState, counts: dict[str, jax.Array]) -> TrainState:
  """Returns the state with these counts, whatever the update has made of `extra`."""
  return state.replace(extra={**state.extra, GUARD: counts})
