"""The class of an image: a table with a row for each class and one for a dropped label.

The row is added to the embedding of the time (Dhariwal & Nichol 2021, arXiv:2105.05233); dropping the label
in training makes classifier-free guidance possible (Ho & Salimans 2022, arXiv:2207.12598). Samples have the
classes in turn.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from vaediff import checks
from vaediff.conditions.base import Condition
from vaediff.errors import UserError
from vaediff.models.ports import Port
from vaediff.spaces import Space
from vaediff.types import Batch, Given, Image, Keys, Read, Values

LABEL = 'label'
"""Name of the condition, of its input and of its value."""
BOUNDS = {'conditions.label.dropout': checks.below_one()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Label(Condition):
  """The label of each image, 0 ... num_classes - 1.

  Attributes:
    num_classes: of the data set.
    dropout: probability of the null row.
  """

  num_classes: int
  dropout: float

  name = LABEL
  title = LABEL

  @property
  def num_groups(self) -> int:
    """A group for each class: image i is of class i modulo their number."""
    return self.num_classes

  @property
  def ports(self) -> Mapping[str, Port]:
    """A row of a table, beside the time."""
    return {LABEL: Port(enters='vector', shape=(), classes=self.num_classes, droppable=self.dropout > 0)}

  @property
  def inputs(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """The label."""
    return {LABEL: jax.ShapeDtypeStruct((), jnp.int32)}

  def observe(self, read: Read, batch: Batch, x: Image, key: jax.Array | None) -> Given:
    """Returns the labels of the data."""
    del read, x, key
    return {LABEL: batch[LABEL]}

  def draw(self, read: Read, keys: Keys, indices: Int[Array, ' batch']) -> Given:
    """Returns the classes in turn."""
    del read, keys
    return {LABEL: (indices % self.num_classes).astype(jnp.int32)}

  def values(self, read: Read, given: Given) -> Values:
    """Returns the labels."""
    del read
    return {LABEL: given[LABEL]}


def label_condition(config: ConfigDict, stage: str, space: Space) -> Label:
  """Returns the condition that `config.<stage>.conditions.label` describes.

  Raises:
    UserError: for a data set whose classes are not known, or a value that is not allowed.
  """
  del space
  checks.check(config[stage], BOUNDS)
  if config.data.num_classes < 2:
    raise UserError(
      f'conditions.label needs a data set with classes: data.num_classes is {config.data.num_classes}, it '
      'must be at least 2; set it to the number of labels, 0 ... num_classes - 1'
    )
  return Label(num_classes=config.data.num_classes, dropout=config[stage].conditions.label.dropout)
