"""A diffusion that begins as a trained one: to be fine-tuned, or to be given one more condition.

What captions add to the network is zero at first, so that the two are the same to the last bit.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vaediff import reads
from vaediff.conditions.base import Conditions
from vaediff.errors import UserError
from vaediff.experiments import base
from vaediff.experiments.denoiser import DENOISER
from vaediff.models.functional import Model, laid_over
from vaediff.types import Read

FIRST = 'first_denoiser'
"""The name in `read` of the network that training begins with."""


def source(
  section: ConfigDict, conditions: Conditions, stage: str, build: Callable[[Conditions], Model]
) -> Mapping[str, reads.FromStage]:
  """Returns the network that a stage begins as, by name; {} where it begins fresh.

  Args:
    section: of the stage; of a student, or of a control, it has no `start`.
    conditions: of the stage.
    stage: whose section describes the network.
    build: conditions -> the stage's network on them.

  Raises:
    UserError: when it would begin as two networks.
  """
  added = [one for one in conditions.each if one.added_to]
  named = section.start if 'start' in section else None
  begun = [(named.stage, named.workdir)] if named and named.workdir else []
  if added and begun:
    raise UserError(
      f'config.{stage}.start names {begun[0][1]!r}, and conditions.{added[0].name}.extends '
      f"{added[0].added_to[1]!r}: training begins as one network. Set the workdir of the other to ''"
    )
  begun += [one.added_to for one in added]
  if not begun:
    return {}
  beside = [one.name for one in conditions.each if one.trained]
  if beside:
    raise UserError(
      f'config.{stage} begins as a network of {begun[0][1]!r}, and conditions.{beside[0]}.training has '
      "another one trained beside it, which would begin apart from it: use training = 'frozen'"
    )
  trained_as, workdir = begun[0]
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
