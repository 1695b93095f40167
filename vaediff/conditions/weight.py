"""The guidance weight as an input: one pass guides (Meng et al. 2023, arXiv:2210.03142)."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from vaediff.conditions.base import Condition
from vaediff.models.ports import Port
from vaediff.types import Batch, Given, Image, Keys, Read, Values

WEIGHT = 'guidance'
"""Name of the input, of the value, and of the condition."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight(Condition):
  """The weight of each example.

  Attributes:
    weight: where none is given.
  """

  weight: float

  name = WEIGHT
  dropout = 0.0
  title = ''
  ranges = {WEIGHT: 'a guidance weight, 0 = none'}

  @property
  def ports(self) -> Mapping[str, Port]:
    """One number, beside the time."""
    return {WEIGHT: Port(enters='vector', shape=())}

  @property
  def inputs(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """The guidance weight."""
    return {WEIGHT: jax.ShapeDtypeStruct((), jnp.float32)}

  def observe(self, read: Read, batch: Batch, x: Image, key: jax.Array | None) -> Given:
    """Returns the configured weight."""
    del read, batch, key
    return {WEIGHT: jnp.full(x.shape[0], self.weight)}

  def draw(self, read: Read, keys: Keys, indices: Int[Array, ' batch']) -> Given:
    """Returns the configured weight."""
    del read, indices
    return {WEIGHT: jnp.full(keys.shape[0], self.weight)}

  def values(self, read: Read, given: Given) -> Values:
    """Returns the guidance weight."""
    del read
    return {WEIGHT: given[WEIGHT]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreeWeight(Weight):
  """A weight without a port: it is among the values, and takes the place of the configured one."""

  @property
  def ports(self) -> Mapping[str, Port]:
    """No ports: the network does not read it."""
    return {}
