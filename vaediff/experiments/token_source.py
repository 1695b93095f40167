"""What stands before the ids of a prior: the words of a caption, then the class, or what stands for none.

All come of one table: the classes, a null, the words. The last is always read; padding, and the words of a
dropped caption, never are. The null of a class is a row of its own.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int
from ml_collections import ConfigDict

from vaediff.conditions import label, text
from vaediff.conditions.base import Conditions
from vaediff.data import words
from vaediff.errors import UserError
from vaediff.models import token_sampling
from vaediff.types import Drop, Values

READS = {label.LABEL: label.label_condition, text.TEXT: text.caption_condition}
"""By section of `conditions`: what a prior can be conditioned on."""


class Before(NamedTuple):
  """Rows of the table, and which of them are read; None = all."""

  ids: Int[Array, 'batch length']
  mask: Bool[Array, 'batch length'] | None

  def paired(self, other: 'Before') -> 'Before':
    """Returns these rows and the other ones in turn."""
    mask = None if self.mask is None else token_sampling.paired(self.mask, other.mask)
    return Before(token_sampling.paired(self.ids, other.ids), mask)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """How conditions become rows of a table.

  Attributes:
    num_classes: 0 = the class is not read.
    vocab_size: of the words.
    num_words: of a caption, padding and all; 0 = it is not read.
  """

  num_classes: int = 0
  vocab_size: int = 0
  num_words: int = 0

  @classmethod
  def of(cls, config: ConfigDict, stage: str) -> 'Source':
    """Returns that of a stage's conditions."""
    known, section = config[stage].conditions, config[stage]
    captions = {}
    if text.TEXT in known:
      captions = {'vocab_size': section.text.vocab_size, 'num_words': section.text.length}
    return cls(num_classes=config.data.num_classes if label.LABEL in known else 0, **captions)

  @property
  def size(self) -> int:
    """Number of rows of the table."""
    return self.num_classes + 1 + (self.vocab_size if self.num_words else 0)

  @property
  def length(self) -> int:
    """How many stand before the ids."""
    return self.num_words + 1

  def __call__(self, values: Values, count: int, drop: Drop = {}) -> Before:  # noqa: B006
    """Returns the rows of so many examples; of what is not among the values, or is dropped, the null."""
    last = jnp.full(count, self.num_classes, jnp.int32)
    if label.LABEL in values and self.num_classes:
      last = values[label.LABEL].astype(jnp.int32)
      if label.LABEL in drop:
        last = jnp.where(drop[label.LABEL], self.num_classes, last)
    if not self.num_words:
      return Before(last[:, None], None)
    tokens = values[words.TOKENS] if words.TOKENS in values else jnp.zeros((count, self.num_words), jnp.int32)
    read = tokens != words.PAD
    if words.TOKENS in drop:
      read = read & ~drop[words.TOKENS][:, None]
    ids = jnp.concatenate([self.num_classes + 1 + tokens, last[:, None]], axis=1)
    return Before(ids, jnp.concatenate([read, jnp.ones((count, 1), bool)], axis=1))


def conditions_of(config: ConfigDict, stage: str) -> Conditions:
  """Returns what the ids are conditioned on: the label, the caption, both, or nothing.

  Raises:
    UserError: for another condition, or one that the data do not have.
  """
  label.check_unread(config, stage)
  text.check_unread(config, stage)
  known = config[stage].conditions
  for name in known:
    if name not in READS:
      raise UserError(f'conditions has a section {name!r}; a token prior reads {" and ".join(READS)}')
  return Conditions(tuple(READS[name](config, stage) for name in sorted(known)))
