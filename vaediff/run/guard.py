"""Around any experiment: what happens to an update whose loss or gradient is not finite, or whose loss jumps.

The guard is part of the state of every stage, so that a run can change its policy and go on.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vaediff import reads
from vaediff.errors import UserError
from vaediff.experiments import base
from vaediff.models.functional import Model
from vaediff.types import Batch, Image, Keys, Metrics, Params

POLICIES = ('stop', 'skip')
GUARD = 'guard'
HEALTHY = 'healthy'
"""Metric that the loop takes out: whether the run may go on."""
WARMUP = 100
"""Steps before a jump of the loss is looked for."""
DECAY = 0.99
"""Of the running mean of the loss."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guarded:
  """An experiment whose bad updates stop the run, or are left out and counted.

  Attributes:
    inner: the experiment; what only some experiments have is looked up there.
    policy: 'stop' or 'skip'.
    spike_factor: a loss above this many times its running mean is bad; 0 = never.
  """

  inner: base.Experiment
  policy: str
  spike_factor: float

  @classmethod
  def around(cls, inner: base.Experiment, train: ConfigDict) -> 'Guarded':
    """Returns the experiment under the policy of a stage's `train` section."""
    if train.on_bad_step not in POLICIES:
      raise UserError(f'train.on_bad_step is {train.on_bad_step!r}; valid: {", ".join(POLICIES)}')
    if train.spike_factor < 0 or 0 < train.spike_factor <= 1:
      raise UserError(f'train.spike_factor must be 0 (off) or above 1, got {train.spike_factor}')
    return cls(inner=inner, policy=train.on_bad_step, spike_factor=train.spike_factor)

  @property
  def networks(self) -> Mapping[str, Model]:
    """The networks of the inner experiment."""
    return self.inner.networks

  @property
  def frozen(self) -> Mapping[str, reads.FromStage | reads.Published]:
    """What it reads of earlier stages."""
    return self.inner.frozen

  @property
  def latent_dim(self) -> int:
    """Size of its latent code."""
    return self.inner.latent_dim

  @property
  def noise_shape(self) -> tuple[int, ...]:
    """Shape of the noise of one sample."""
    return self.inner.noise_shape

  @property
  def takes_x0_vae(self) -> bool:
    """Whether its samples can be conditioned on a given image."""
    return self.inner.takes_x0_vae

  @property
  def reads_image(self) -> bool:
    """Whether its samples are made of given images."""
    return self.inner.reads_image

  @property
  def num_function_evaluations(self) -> int:
    """Forward passes of its denoiser per image."""
    return self.inner.num_function_evaluations

  def eval_step(
    self, params: dict[str, Params], frozen: dict[str, Params], batch: Batch, key: jax.Array
  ) -> Metrics:
    """See `base.Experiment`."""
    return self.inner.eval_step(params, frozen, batch, key)

  def sample(
    self,
    params: dict[str, Params],
    frozen: dict[str, Params],
    condition: dict[str, jax.Array],
    keys: Keys,
  ) -> dict[str, Image]:
    """See `base.Experiment`."""
    return self.inner.sample(params, frozen, condition, keys)

  def __getattr__(self, name: str) -> Any:
    if name.startswith('__') or name == 'inner':
      raise AttributeError(name)
    return getattr(self.inner, name)

  def kind_of(self, step: int) -> str:
    """Returns the kind of the update that follows `step` updates; '' where there is only one."""
    return self.inner.kind_of(step) if isinstance(self.inner, base.HasStepKinds) else ''

  def of_kind(self, kind: str) -> 'Guarded':
    """Returns the experiment whose `train_step` is an update of this kind."""
    return dataclasses.replace(self, inner=self.inner.of_kind(kind)) if kind else self

  def init(self, key: jax.Array) -> base.TrainState:
    """Returns the state at step 0, with the guard's counts."""
    state = self.inner.init(key)
    guard = {'skipped': jnp.int32(0), 'seen': jnp.int32(0), 'loss_average': jnp.float32(0)}
    return state.replace(extra={**state.extra, GUARD: guard})

  def train_step(
    self, state: base.TrainState, frozen: dict[str, Params], batch: Batch, key: jax.Array
  ) -> tuple[base.TrainState, Metrics]:
    """Returns the state after one update, or after one left out; the step advances either way."""
    after, metrics = self.inner.train_step(state, frozen, batch, key)
    guard = state.extra[GUARD]
    bad = ~jnp.all(jnp.stack([jnp.all(jnp.isfinite(value)) for value in metrics.values()]))
    if self.spike_factor:
      jump = metrics['loss'] > self.spike_factor * guard['loss_average']
      bad |= (guard['seen'] >= WARMUP) & jump
    skip = self.policy == 'skip'
    if skip:
      kept = jax.tree.map(lambda old, new: jnp.where(bad, old, new), state, after)
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
    after = after.replace(extra={**after.extra, GUARD: counted})
    if skip:
      metrics = {**metrics, 'skipped_updates': counted['skipped']}
    return after, {**metrics, HEALTHY: ~bad | skip}
