"""The class of an image: a table with a row for each class and one for a dropped label.

The row is added to the embedding of the time (Dhariwal & Nichol 2021, arXiv:2105.05233); dropping the label
in training makes classifier-free guidance possible (Ho & Salimans 2022, arXiv:2207.12598). Samples have the
classes in turn, or those of them that `sample.labels` names.
"""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

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


def _is_label(value: Any) -> bool:
  """Returns whether it is a number of a class, or a name."""
  if isinstance(value, str):
    return bool(value.strip())
  return isinstance(value, numbers.Integral) and not isinstance(value, bool) and 0 <= value < 2**31


SAMPLE_BOUNDS = {
  'sample.labels': checks.Bound(
    lambda value: isinstance(value, tuple | list) and all(map(_is_label, value)),
    lambda field, value: (
      f'{field} must be numbers of classes, from 0 on, or their names, as 3,7, or () = all in turn; got '
      f'{value!r}'
    ),
  )
}
"""Of every stage that can be given labels, whether it reads them or not."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Label(Condition):
  """The label of each image, 0 ... num_classes - 1.

  Attributes:
    num_classes: of the data set.
    dropout: probability of the null row.
    chosen: the classes that are drawn, in turn; () = all.
  """

  num_classes: int
  dropout: float
  chosen: tuple[int, ...] = ()

  name = LABEL
  title = LABEL

  @property
  def classes(self) -> tuple[int, ...]:
    """Those that are drawn."""
    return self.chosen or tuple(range(self.num_classes))

  @property
  def num_groups(self) -> int:
    """A group for each class that is drawn: image i is of the class with number i modulo theirs."""
    return len(self.classes)

  @property
  def ports(self) -> Mapping[str, Port]:
    """A row of a table, beside the time."""
    return {LABEL: Port(enters='vector', shape=(), classes=self.num_classes, droppable=self.dropout > 0)}

  @property
  def inputs(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """The class, a whole number."""
    return {LABEL: jax.ShapeDtypeStruct((), jnp.int32)}

  def for_training(self) -> 'Label':
    """Returns the same with all classes."""
    return dataclasses.replace(self, chosen=())

  def observe(self, read: Read, batch: Batch, x: Image, key: jax.Array | None) -> Given:
    """Returns the labels of the data."""
    del read, x, key
    return {LABEL: batch[LABEL]}

  def draw(self, read: Read, keys: Keys, indices: Int[Array, ' batch']) -> Given:
    """Returns the classes in turn."""
    del read, keys
    if not self.chosen:
      return {LABEL: (indices % self.num_classes).astype(jnp.int32)}
    return {LABEL: jnp.asarray(self.chosen, jnp.int32)[indices % len(self.chosen)]}

  def values(self, read: Read, given: Given) -> Values:
    """Returns the classes, which the network looks up in a table."""
    del read
    return {LABEL: given[LABEL]}

  def nats(self, read: Read, x: Image) -> Values:
    """Returns 'label', log num_classes: what a bound adds for classes that are taken to be equally likely."""
    del read
    return {LABEL: jnp.full(len(x), math.log(self.num_classes))}


def label_condition(config: ConfigDict, stage: str, space: Space | None = None) -> Label:
  """Returns the condition that `config.<stage>.conditions.label` describes.

  Raises:
    UserError: for a data set whose classes are not known, or a value that is not allowed.
  """
  del space
  section, count = config[stage], config.data.num_classes
  checks.check(section, {**BOUNDS, **SAMPLE_BOUNDS})
  if count < 2:
    raise UserError(
      f'conditions.label needs a data set with classes: data.num_classes is {count}, it '
      'must be at least 2; set it to the number of labels, 0 ... num_classes - 1'
    )
  asked = tuple(section.sample.labels)
  if any(isinstance(one, str) for one in asked):  # `run.classes`, which opens the data, puts numbers for them
    raise UserError(
      f'sample.labels must be numbers, 0 ... {count - 1}, where names are not looked up in the data set; got '
      f'{asked!r}'
    )
  if asked and max(asked) >= count:
    raise UserError(
      f'sample.labels must be classes of this data set, 0 ... {count - 1} (data.num_classes is {count}), got '
      f'{asked!r}'
    )
  return Label(num_classes=count, dropout=section.conditions.label.dropout, chosen=asked)


def check_unread(config: ConfigDict, stage: str) -> None:
  """Raises UserError where classes are asked of a stage that reads no label."""
  labels = config[stage].sample.labels
  if labels and LABEL not in config[stage].conditions:
    count = config.data.num_classes
    also = '' if count else f', of a data set without known classes (data.num_classes is {count})'
    raise UserError(
      f'sample.labels must be () in a stage that reads no label{also}, got {labels!r}; train one that does '
      '(variant label)'
    )
