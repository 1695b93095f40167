"""The caption of an image as a frozen CLIP stage reads it: its words behind the tower, and one vector.

What DALL-E 2's prior is given (arXiv:2204.06125, section 2.2). The ids are those of the caption, so that
they are drawn, given and refused as everywhere (`conditions.text`); the vector is multiplied by the square
root of its size, so that its numbers have a mean square of 1. Of a caption of no words nothing is read, as of
one that is dropped.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vaediff import reads
from vaediff.conditions.text import Text, caption_condition
from vaediff.data import words
from vaediff.data.words import TOKENS
from vaediff.models.ports import Port
from vaediff.spaces import embeddings
from vaediff.spaces.embeddings import CLIP
from vaediff.types import Given, Read, Values

WORDS, READ, CAPTION = 'clip_words', 'clip_words_read', 'clip_caption'
"""The values: the words, which of them are no padding, and the vector of the caption."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipText(Text):
  """A caption, word by word and as a whole.

  Attributes:
    clip: the CLIP stage.
  """

  clip: reads.FromStage

  @property
  def ports(self) -> Mapping[str, Port]:
    """All are dropped at once."""
    module, droppable = self.clip.model.module, self.dropout > 0
    return {
      WORDS: Port(
        enters='text', how='attention', shape=(self.length, module.text.width), droppable=droppable
      ),
      READ: Port(enters='vector', shape=(self.length,), droppable=droppable),
      CAPTION: Port(enters='vector', shape=(module.embedding_size,), droppable=droppable),
    }

  @property
  def frozen(self) -> Mapping[str, reads.Reads]:
    """The captions that are drawn, and the CLIP stage."""
    return {**super().frozen, CLIP: self.clip}

  def values(self, read: Read, given: Given) -> Values:
    """Returns the words, which of them are read, and the vector; of a caption of no words a vector of 0."""
    tokens = super().values(read, given)[TOKENS]
    known = (tokens != words.PAD).astype(jnp.float32)
    encoded = self.clip.model.apply(read[CLIP], tokens, method='encoded')
    length = jnp.sqrt(jnp.float32(encoded.whole.shape[1]))
    caption = length * encoded.whole * jnp.max(known, axis=1, keepdims=True)
    return {WORDS: encoded.words, READ: known, CAPTION: caption}

  def vectors(self, values: Values) -> Float[Array, 'batch embedding']:
    """Returns the vectors of captions, of unit length, of what `values` returned; 0 of no words."""
    caption = values[CAPTION]
    return caption / jnp.sqrt(jnp.float32(caption.shape[1]))


def clip_text_condition(config: ConfigDict, stage: str, clip: reads.FromStage) -> ClipText:
  """Returns the captions that `config.<stage>` reads by a CLIP stage.

  Raises:
    UserError: for data without captions, a value that is not allowed, or captions that the CLIP stage has by
      other ids.
  """
  plain = caption_condition(config, stage)
  embeddings.check_words(config, stage, clip.stage, CLIP)
  fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(Text)}
  return ClipText(**fields, clip=clip)
