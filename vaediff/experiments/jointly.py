"""Encoders that a diffusion trains with its denoiser, by the same loss: a tokenizer and its decoder.

The condition that reads an encoder says so (`Condition.trained`); its values carry the gradient. What lies
behind the encoder moves as in the stage of an autoencoder (`experiments.bottlenecks`). Without such
conditions nothing here does anything.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vaediff.conditions.base import Conditions, TrainedNetwork
from vaediff.data import pixels
from vaediff.experiments import base, bottlenecks
from vaediff.models.functional import Model
from vaediff.optim import Optimizer, global_norm
from vaediff.types import Batch, Metrics, Params, Read


def models(conditions: Conditions) -> dict[str, Model]:
  """Returns the networks that are trained beside the denoiser."""
  return {name: trained.model for name, trained in conditions.trained.items()}


def init(
  state: base.TrainState, conditions: Conditions, optimizer: Optimizer, key: jax.Array
) -> base.TrainState:
  """Returns the state at step 0 with the encoders, and what their bottlenecks keep."""
  networks, extra = dict(state.networks), dict(state.extra)
  for number, (name, trained) in enumerate(conditions.trained.items(), 1):
    networks[name] = base.init_network(trained.model, optimizer, jax.random.fold_in(key, number))
    extra |= _bottleneck(trained).init(networks[name].params)
  return state.replace(networks=networks, extra=extra)


def start(state: base.TrainState, conditions: Conditions, frozen: Read) -> base.TrainState:
  """Returns the state whose encoders are those that they start with, where these were trained before."""
  networks, extra = dict(state.networks), dict(state.extra)
  for name, trained in conditions.trained.items():
    if trained.start:
      network, known = networks[name], frozen[trained.start]
      params = {part: jax.tree.map(jnp.copy, known[part]) for part in network.params}
      average = None if network.ema_params is None else jax.tree.map(jnp.copy, params)
      networks[name] = network.replace(params=params, ema_params=average)
      extra |= _bottleneck(trained).trained(params)
  return state.replace(networks=networks, extra=extra)


def before_update(
  state: base.TrainState, conditions: Conditions, batch: Batch, key: jax.Array, *, flip: bool
) -> tuple[base.TrainState, Metrics, jax.Array]:
  """Returns the state as the update that follows sees it, scalars to log, and the key that is left.

  Codes follow the vectors of the whole batch, whose images are mirrored by a draw of their own.
  """
  if not conditions.trained:
    return state, {}, key
  key_flip, key_codes, key = jax.random.split(key, 3)
  x = pixels.prepare(batch, key_flip if flip else None)['image']
  networks, extra, metrics = dict(state.networks), dict(state.extra), {}
  for number, (name, trained) in enumerate(conditions.trained.items()):
    own = jax.random.fold_in(key_codes, number)
    networks[name], extra, found = _bottleneck(trained).before_update(networks[name], extra, x, own)
    metrics |= found
  return state.replace(networks=networks, extra=extra), metrics, key


def update(
  state: base.TrainState, conditions: Conditions, grads: Mapping[str, Params], optimizer: Optimizer
) -> tuple[base.TrainState, Metrics]:
  """Returns the state after an update of every network, and the norms of their gradients."""
  networks = dict(state.networks)
  for name, grad in grads.items():
    networks[name] = base.apply_gradients(state.networks[name], grad, optimizer, state.step)
    if name in conditions.trained:
      bottleneck = _bottleneck(conditions.trained[name])
      networks[name] = bottleneck.after_update(state.networks[name], networks[name])
  norms = {f'grad_norm/{name}': global_norm(grad) for name, grad in grads.items()}
  return base.TrainState(step=state.step + 1, networks=networks, extra=state.extra), norms


def _bottleneck(trained: TrainedNetwork) -> bottlenecks.Bottleneck:
  kind = bottlenecks.BY_KIND[trained.model.module.bottleneck]
  return kind(model=trained.model, loss=trained.settings)
