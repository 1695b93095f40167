"""The caption of an image: words that a small transformer, trained with the network, makes vectors of.

The ids of a caption's words enter by one port (`models.text_tower`): blocks of the U-Net attend to their
vectors, and their sum joins the embedding of the time (Rombach et al. 2022, arXiv:2112.10752). What joins
the network is zero at first, so that one that was trained without captions can be given them
(`conditions.text.extends`). Dropped in training they make classifier-free guidance possible.

Samples have the captions of `sample.captions` in turn, or else those of the evaluation split. A caption of no
words is the one that is dropped.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from vaediff import checks, reads
from vaediff.conditions.base import Condition
from vaediff.data import words
from vaediff.data.words import TOKENS
from vaediff.errors import UserError
from vaediff.models import text_attention
from vaediff.models.ports import Port
from vaediff.models.text_tower import Tower
from vaediff.spaces import Space
from vaediff.types import Batch, Given, Image, Keys, Read, Values

TEXT = 'text'
"""Name of the condition, and of the section of its tokenizer."""
LEAST = 3
"""Ids of the shortest caption: its begin, one word, its end."""
MOST = 2**16
BOUNDS = {
  'conditions.text.how': checks.one_of(text_attention.WAYS),
  'conditions.text.width': checks.between(1, MOST),
  'conditions.text.num_layers': checks.between(1, 64),
  'conditions.text.num_heads': checks.between(1, 64),
}
OF_TOKENIZERS = {
  'text.kind': checks.one_of(words.KINDS),
  'text.vocab_size': checks.between(words.EOS + 2, 2**22),
  'text.length': checks.between(LEAST, MOST),
}
"""Of every stage that reads captions."""
OF_CAPTIONS = {'conditions.text.dropout': checks.below_one(), **OF_TOKENIZERS}
CHOSEN = {
  'sample.captions': checks.Bound(
    lambda value: isinstance(value, tuple | list) and all(isinstance(one, str) for one in value),
    lambda field, value: (
      f"{field} must be captions, as ('a red ring', 'a blue cross'), or () = those of the evaluation split; "
      f'got {value!r}'
    ),
  ),
}
"""Of every stage that reads captions."""
SAMPLE_BOUNDS = {**CHOSEN, 'sample.rerank.candidates': checks.between(2, MOST)}
"""Of every stage whose images can be ranked by their captions, whether it reads them or not."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text(Condition):
  """The ids of the words of each caption, padded to one length.

  Attributes:
    length: ids of a caption, padding and all.
    vocab_size: they are below it.
    dropout: probability that the null token alone is read.
    stage: that reads them, whose tokenizer and captions they are.
    tower: sizes of the transformer of words.
    how: of `text_attention.WAYS`.
    chosen: the captions that are drawn, in turn; () = those of the evaluation split.
    added_to: see `Condition`.
  """

  length: int
  vocab_size: int
  dropout: float
  stage: str
  tower: Tower = Tower()
  how: str = 'attention'
  chosen: tuple[str, ...] = ()
  added_to: tuple[str, str] | None = None

  name = TEXT
  title = TEXT
  bounds_images = False

  @property
  def num_groups(self) -> int:
    """A group for each caption that is chosen."""
    return len(self.chosen)

  @property
  def ports(self) -> Mapping[str, Port]:
    """The words, wherever the network has attention."""
    text = Port(
      enters='text',
      how=self.how,
      shape=(self.length,),
      classes=self.vocab_size,
      tower=self.tower,
      droppable=self.dropout > 0,
    )
    return {TOKENS: text}

  @property
  def inputs(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Ids of the caption."""
    return {TOKENS: jax.ShapeDtypeStruct((self.length,), jnp.int32)}

  @property
  def frozen(self) -> Mapping[str, reads.Reads]:
    """The captions that are drawn, as ids."""
    captions = reads.Captions(stage=self.stage, workdir='', length=self.length, vocab_size=self.vocab_size)
    return {reads.CAPTIONS: captions}

  def for_training(self) -> 'Text':
    """Returns the same with no captions chosen."""
    return dataclasses.replace(self, chosen=())

  def observe(self, read: Read, batch: Batch, x: Image, key: jax.Array | None) -> Given:
    """Returns the captions of the data; {} where images come without."""
    del read, x, key
    return {TOKENS: batch[TOKENS]} if TOKENS in batch else {}

  def draw(self, read: Read, keys: Keys, indices: Int[Array, ' batch']) -> Given:
    """Returns the captions in turn."""
    del keys
    known = read[reads.CAPTIONS][TOKENS]
    return {TOKENS: known[indices % len(known)].astype(jnp.int32)}

  def values(self, read: Read, given: Given) -> Values:
    """Returns the ids; of a caption of no words padding alone, which is the null."""
    del read
    tokens = given[TOKENS].astype(jnp.int32)
    if tokens.shape[1:] != (self.length,):
      raise UserError(
        f'{TOKENS} must be {self.length} ids per image (text.length), got {tokens.shape[1:]}: captions '
        'become ids by the tokenizer of the stage'
      )
    return {TOKENS: jnp.where(tokens[:, 1:2] == words.EOS, words.PAD, tokens)}


def caption_condition(config: ConfigDict, stage: str) -> Text:
  """Returns the captions that a stage reads, without how a U-Net does.

  Raises:
    UserError: for data without captions, or a value that is not allowed.
  """
  section = config[stage]
  checks.check(section, {**OF_CAPTIONS, **CHOSEN})
  if not config.data.caption_feature:
    raise UserError(
      f'the stage {stage!r} reads captions (conditions.text), but of these data none are read '
      "(data.caption_feature is ''): name the feature or column that holds them, as 'caption', or take "
      'images with captions'
    )
  dropout = section.conditions[TEXT].dropout
  return Text(
    length=section[TEXT].length,
    vocab_size=section[TEXT].vocab_size,
    dropout=dropout,
    stage=stage,
    chosen=checked(tuple(section.sample.captions), dropout),
  )


def text_condition(config: ConfigDict, stage: str, space: Space | None = None) -> Text:
  """Returns the condition that `config.<stage>.conditions.text` describes.

  Raises:
    UserError: for data without captions, or a value that is not allowed.
  """
  del space
  checks.check(config[stage], BOUNDS)
  named = config[stage].conditions[TEXT]
  if named.width % named.num_heads:
    raise UserError(
      f'conditions.text.num_heads is {named.num_heads}, which does not divide conditions.text.width '
      f'{named.width}'
    )
  return dataclasses.replace(
    caption_condition(config, stage),
    tower=Tower(width=named.width, num_layers=named.num_layers, num_heads=named.num_heads),
    how=named.how,
    added_to=_added_to(named),
  )


def checked(captions: tuple[str, ...], dropout: float) -> tuple[str, ...]:
  """Returns the captions that are asked for; raises UserError for one of no words that was never trained."""
  for number, caption in enumerate(captions):
    if not caption.strip() and not dropout:
      raise UserError(
        f'sample.captions has no words at place {number}, and the stage has no null for it: it was trained '
        'with conditions.text.dropout = 0. Write a caption, or train with a dropout, such as 0.1'
      )
  return captions


def _added_to(named: ConfigDict) -> tuple[str, str] | None:
  """Returns stage and run of the network without captions that the stage begins as."""
  if not named.extends.workdir:
    return None
  if named.how != 'attention':
    raise UserError(
      f'conditions.text.extends names {named.extends.workdir!r}, whose network has attention blocks that '
      f"conditions.text.how = {named.how!r} takes the place of; use how = 'attention'"
    )
  return named.extends.stage, named.extends.workdir


def for_student(named: Mapping[str, Any], teacher: str, workdir: str) -> dict[str, Any]:
  """Returns the section of a student, which begins as its teacher."""
  del teacher, workdir
  return {**named, 'extends': {**named['extends'], 'workdir': ''}}


def check_unread(config: ConfigDict, stage: str) -> None:
  """Raises UserError where captions are asked of a stage that reads none, or no CLIP stage is to rank."""
  ranks = config[stage].sample.rerank
  if ranks.stage and not ranks.workdir:
    reads.need_stage(config, ranks.stage, 'clip', 'sample.rerank.stage', 'CLIP stage')
  captions = config[stage].sample.captions
  if captions and TEXT not in config[stage].conditions:
    raise UserError(
      f'sample.captions must be () in a stage that reads no captions, got {captions!r}; train one that does '
      '(variant text, of data with captions)'
    )
