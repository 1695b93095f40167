"""A diffusion that begins as one that was trained without one of its conditions, such as captions.

What the condition adds to the network is zero at first, so that the two are the same to the last bit.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from vaediff import reads
from vaediff.conditions.base import Conditions
from vaediff.experiments import base
from vaediff.experiments.denoiser import DENOISER
from vaediff.models.functional import Model, laid_over
from vaediff.types import Read

FIRST = 'first_denoiser'
"""The name in `read` of the network that training begins with."""


def source(
  conditions: Conditions, stage: str, build: Callable[[Conditions], Model]
) -> Mapping[str, reads.FromStage]:
  """Returns the network that a stage begins as, by name; {} where it begins fresh.

  Args:
    conditions: of the stage.
    stage: whose section describes the network.
    build: conditions -> the stage's network on them.
  """
  added = [one for one in conditions.each if one.added_to]
  if not added:
    return {}
  trained_as, workdir = added[0].added_to
  model = build(Conditions(tuple(one for one in conditions.each if not one.added_to)))
  return {
    FIRST: reads.FromStage(stage=trained_as, network=DENOISER, workdir=workdir, model=model, section=stage)
  }


def start(state: base.TrainState, frozen: Read, name: str) -> base.TrainState:
  """Returns the state whose network, and average, have the parameters that they begin as."""
  if FIRST not in frozen:
    return state
  network = state.networks[name]
  params = laid_over(network.params, jax.tree.map(jnp.copy, frozen[FIRST]))
  average = None if network.ema_params is None else jax.tree.map(jnp.copy, params)
  network = network.replace(params=params, ema_params=average)
  return state.replace(networks={**state.networks, name: network})
