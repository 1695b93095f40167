"""Denoisers whose network is a function that is known, on conditions that only name their values."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from vaediff.conditions.base import Condition, Conditions
from vaediff.experiments.denoiser import Denoiser
from vaediff.models.functional import Model
from vaediff.models.ports import Port

READ = {'denoiser': {}}
"""What such a network reads: it has no parameters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Named(Condition):
  """A condition of these values, which are handed over."""

  name: str
  each: tuple[str, ...]
  dropout: float = 0.1
  title: str = ''

  @property
  def ports(self):
    return {name: Port(enters='vector', shape=(1,), droppable=self.dropout > 0) for name in self.each}

  @property
  def inputs(self):
    return {}

  def observe(self, read, batch, x, key):
    return {}

  def values(self, read, given):
    return {name: given[name] for name in self.each}


class Network(nn.Module):
  """A function of (x_t, t, values, drop)."""

  function: Callable

  def __call__(self, x_t, t, values={}, drop={}, *, deterministic=True):  # noqa: B006
    return self.function(x_t, t, values, drop)


def denoiser(
  function: Callable, schedule, conditions: Mapping[str, tuple[str, ...]], *, prediction='x0', **changes
) -> Denoiser:
  """Returns the denoiser of a network: unbounded, not clipped; `conditions` are the values by condition."""
  inputs = (jax.ShapeDtypeStruct((1, 1), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32), {})
  each = tuple(Named(name=name, each=names) for name, names in conditions.items())
  fields = {'loss_weight': 'snr', 'bound': None, 'clip': 'none', 'threshold_percentile': 100.0}
  return Denoiser(
    model=Model(module=Network(function), inputs=inputs),
    conditions=Conditions(each),
    schedule=schedule,
    prediction=prediction,
    **{**fields, **changes},
  )
