"""A trained diffusion whose samples are what its network reads on the way: records to calibrate on.

A record is of one step of the sampler: the state y and the time t of the same call of the network. Nothing is
trained here: whoever has opened a stage draws with one of these in place of its experiment.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vaediff.diffusion import grids
from vaediff.experiments import base
from vaediff.experiments.diffusion import Diffusion
from vaediff.experiments.restored import fields_of
from vaediff.types import Given, Read

STATE, TIME, STEP = 'y', 't', 'step'
"""Names of a record's parts: the state, without Formulation 2's shift, its time, and the step from noise."""
VALUE = 'values/'
"""What is before the name of a value that the network reads beside them."""
KEPT = 'kept_steps'
"""Name, among what is given, of the steps of which records are kept: int32 [kept]."""


def times_of(diffusion: Diffusion) -> Float[np.ndarray, ' steps']:
  """Returns the times at which the steps of the configured sampler begin, from noise on."""
  settings = diffusion.settings
  return grids.time_grid(
    diffusion.denoiser.schedule, settings['grid'], settings['num_steps'], settings['t_start']
  )[:-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorded(Diffusion):
  """Draws records: of each image those of the steps that are given by `KEPT`."""

  @property
  def recorded_values(self) -> tuple[str, ...]:
    """Names of the values that are read: by the network, or as a shift of its state."""
    shift = (self.denoiser.shift,) if self.denoiser.shift else ()
    return tuple(dict.fromkeys((*self.conditions.ports, *shift)))

  @property
  def handed(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """All: none of it is an image to look at."""
    names = (STATE, TIME, STEP, *(VALUE + name for name in self.recorded_values))
    return {name: jax.ShapeDtypeStruct((), jnp.float32) for name in names}

  def sample(self, read: Read, given: Given, keys: base.SampleKeys) -> dict[str, Array]:
    """Returns `STATE`, `TIME` and `STEP` [batch, kept, ...], and the values [batch, ...]."""
    given = self.conditions.complete(read, given)
    values = self.conditions.values(read, given)
    _, states = self.steps(
      self.sampler_denoiser(read, values),
      self.initial(read, given),
      keys.sampler,
      self.settings['t_start'],
      trajectory=True,
    )
    kept = given[KEPT]
    times = jnp.asarray(times_of(self), jnp.float32)
    rows = jnp.arange(kept.shape[0])[:, None]
    found = {STATE: states[kept, rows], TIME: times[kept], STEP: kept}
    return found | {VALUE + name: values[name] for name in self.recorded_values if name in values}


def recorded(diffusion: Diffusion) -> Recorded:
  """Returns what draws the records of a diffusion."""
  return Recorded(**fields_of(diffusion))
