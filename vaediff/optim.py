"""Optimizers: warm-up, schedule, clipping, Adam(W) and the exponential moving average of parameters."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from vaediff import checks
from vaediff.checks import Bound
from vaediff.errors import UserError
from vaediff.types import Params, Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
  """An optax chain and the decay of the parameter average.

  Attributes:
    transform: gradient -> update.
    ema_decay: 0 keeps no average.
    ema_warmup: decay_k = min(ema_decay, (1 + k) / (10 + k)) at step k, so that an early average is not
      dominated by the initial parameters.
  """

  transform: optax.GradientTransformation
  ema_decay: float
  ema_warmup: bool

  def init_ema(self, params: Params) -> Params | None:
    """Returns the average at step 0: a copy of the parameters, or None where none is kept."""
    return jax.tree.map(jnp.copy, params) if self.ema_decay > 0 else None

  def update_ema(self, ema_params: Params | None, params: Params, step: jax.Array) -> Params | None:
    """Returns decay * ema + (1 - decay) * params."""
    if ema_params is None:
      return None
    decay = jnp.float32(self.ema_decay)
    if self.ema_warmup:
      k = step.astype(jnp.float32)
      decay = jnp.minimum(decay, (1 + k) / (10 + k))
    return jax.tree.map(lambda e, p: e * decay + p * (1 - decay), ema_params, params)


def learning_rate(config: ConfigDict, num_steps: int) -> optax.Schedule:
  """Returns the rate by step: linear from 0 in warm-up, then constant, or to its end at `num_steps`."""
  warmup = config.warmup_steps
  if config.schedule == 'constant':
    after = optax.constant_schedule(config.learning_rate)
  elif config.schedule == 'cosine':
    after = optax.cosine_decay_schedule(
      config.learning_rate, max(num_steps - warmup, 1), config.end_learning_rate / config.learning_rate
    )
  elif config.schedule == 'linear':
    after = optax.linear_schedule(config.learning_rate, config.end_learning_rate, max(num_steps - warmup, 1))
  else:
    raise ValueError(f'no schedule of {SCHEDULES}: {config.schedule!r}')
  if warmup == 0:
    return after
  return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, warmup), after], [warmup])


SCHEDULES = ('constant', 'cosine', 'linear')
LARGEST = 1e30
"""Near the end of float32: squares of what is much larger are not finite."""
BOUNDS = {
  'learning_rate': checks.inside_or_at(0, LARGEST),
  'schedule': Bound(
    lambda value: value in SCHEDULES,
    lambda field, value: f"{field} must be 'constant', 'cosine' or 'linear', got {value!r}",
  ),
  'end_learning_rate': checks.between(0, LARGEST),
  'warmup_steps': checks.between(0, 2**31 - 1),
  'b1': checks.below_one(),
  'b2': checks.below_one(),
  'eps': checks.inside_or_at(0, 1),
  'weight_decay': checks.between(0, LARGEST),
  'clip_norm': checks.between(0, LARGEST),
  'ema_decay': checks.below_one(),
}
"""Of a section that describes an optimizer."""


def make_optimizer(
  config: ConfigDict,
  num_steps: int,
  name: str = 'optim',
  decays: Callable[[tuple[str, ...]], bool] = lambda path: True,
) -> Optimizer:
  """Returns the optimizer that a section of a stage describes.

  Args:
    config: the section.
    num_steps: of the stage.
    name: of the section, for messages.
    decays: of the names on the way to a parameter, whether `weight_decay` is about it.

  Raises:
    UserError: for a value that is not allowed; the message has the section's name.
  """
  checks.check(config, BOUNDS, f'{name}.')
  if not config.end_learning_rate <= config.learning_rate:
    raise UserError(
      f'{name}.end_learning_rate must be in [0, {name}.learning_rate], got '
      f'{config.end_learning_rate} with learning_rate {config.learning_rate}'
    )
  chain = []
  if config.clip_norm > 0:
    chain.append(clip_by_global_norm(config.clip_norm))
  chain.append(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps))
  if config.weight_decay > 0:
    chain.append(decay_of(config.weight_decay, decays))
  chain.append(optax.scale_by_learning_rate(learning_rate(config, num_steps)))
  return Optimizer(transform=optax.chain(*chain), ema_decay=config.ema_decay, ema_warmup=config.ema_warmup)


def is_kernel(path: tuple[str, ...]) -> bool:
  """Returns whether a parameter is the kernel of a layer: no bias, no scale of a norm, no table of codes."""
  return path[-1] == 'kernel'


def decay_of(weight: float, decays: Callable[[tuple[str, ...]], bool]) -> optax.GradientTransformation:
  """Returns u -> u + weight * p for the parameters p that decay, as `optax.add_decayed_weights`."""

  def update(updates: Params, state: optax.EmptyState, params: Params | None = None):
    def decayed(path: tuple[jax.tree_util.DictKey, ...], u: jax.Array, p: jax.Array) -> jax.Array:
      return u + weight * p if decays(tuple(key.key for key in path)) else u

    return jax.tree_util.tree_map_with_path(decayed, updates, params), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def clip_by_global_norm(largest: float) -> optax.GradientTransformation:
  """Returns g -> g min(1, largest / |g|) (Pascanu et al. 2013, 1211.5063, algorithm 1), |g| over all leaves.

  As `optax.clip_by_global_norm`, whose choice between g and (g / |g|) largest keeps compilers from computing
  clipping, moments and parameters in one pass: on a CPU the whole update takes 2.5 times as long with it.
  """

  def update(grads: Params, state: optax.EmptyState, params: Params | None = None):
    del params
    factor = jnp.minimum(1.0, largest / global_norm(grads))
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def global_norm(tree: Params) -> Scalar:
  """Returns the L2 norm over all leaves."""
  return optax.global_norm(tree)
