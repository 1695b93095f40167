"""The words of one caption as vectors, between what they mean and what shows one image (Imagic, 2210.09276).

    e = eta e_tgt + (1 - eta) e_opt

e_tgt are the vectors that the text tower of a network makes of the caption, e_opt those that were optimised
to show an image; section 3.2 there. At eta = 0 samples are that image, towards 1 they are what the caption
says. They take the place of the captions of a diffusion that was trained with some (`conditions.text`), and
are dropped as these are: the null is the network's own.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from vaediff import reads
from vaediff.conditions.base import Condition
from vaediff.conditions.text import TEXT, Text
from vaediff.data.words import TOKENS
from vaediff.models import told_words
from vaediff.models.functional import Model
from vaediff.models.ports import Port
from vaediff.types import Batch, Given, Image, Keys, Read, Values

EMBEDDING = 'embedding'
"""Name of the network that e_opt is, and of the value."""
ETA = 'eta'
"""Name of the input: where between e_opt, 0, and e_tgt, 1."""
LEAST_ETA, MOST_ETA = 0.0, 1.5
"""Beyond 1 it is past the caption; further on nothing is left of the image."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embedding(Condition):
  """The vectors of one caption, at some eta.

  Attributes:
    text: the captions of the network; the one chosen is that of e_tgt.
    workdir: the run whose tokenizer makes ids of it.
    network: name in `read` of the network whose tower makes e_tgt.
    dtype: of that network.
    etas: that are drawn, in turn.
  """

  text: Text
  workdir: str
  network: str
  dtype: str
  etas: tuple[float, ...] = (LEAST_ETA,)

  name = TEXT
  title = EMBEDDING
  ranges = {ETA: f'a number in [{LEAST_ETA:g}, {MOST_ETA:g}]: 0 = the image, 1 = the caption'}

  @property
  def dropout(self) -> float:
    """That of the captions, of whose null there is guidance; an edit's training drops nothing."""
    return self.text.dropout

  @property
  def num_groups(self) -> int:
    """A group for each eta."""
    return len(self.etas)

  @property
  def ports(self) -> Mapping[str, Port]:
    """That of the words, whose ids say which vectors are read."""
    return self.text.ports

  @property
  def inputs(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """The weight eta between the two sets of vectors."""
    return {ETA: jax.ShapeDtypeStruct((), jnp.float32)}

  @property
  def frozen(self) -> Mapping[str, reads.Reads]:
    """The caption, as ids."""
    return {
      name: dataclasses.replace(source, workdir=self.workdir) for name, source in self.text.frozen.items()
    }

  @property
  def model(self) -> Model:
    """The network that e_opt is."""
    return told_words.vectors(self.ports[TOKENS])

  def for_training(self) -> 'Embedding':
    """Returns the same at eta = 0 alone."""
    return dataclasses.replace(self, etas=(LEAST_ETA,))

  def observe(self, read: Read, batch: Batch, x: Image, key: jax.Array | None) -> Given:
    """Returns eta = 0: e_opt shows the image."""
    del read, batch, key
    return {ETA: jnp.full(x.shape[0], LEAST_ETA)}

  def draw(self, read: Read, keys: Keys, indices: Int[Array, ' batch']) -> Given:
    """Returns the etas in turn."""
    del read, keys
    return {ETA: jnp.asarray(self.etas, jnp.float32)[indices % len(self.etas)]}

  def target(self, read: Read) -> Array:
    """Returns e_tgt, [tokens, width]; nothing is learned through it."""
    ids = read[reads.CAPTIONS][TOKENS][:1].astype(jnp.int32)
    found = told_words.of_words(read[self.network], TOKENS, self.ports[TOKENS], self.dtype, ids)
    return jax.lax.stop_gradient(found[0])

  def values(self, read: Read, given: Given) -> Values:
    """Returns the ids of the caption, for all the same, and the vectors at each eta."""
    eta = given[ETA].astype(jnp.float32)[:, None, None]
    ids = self.text.values(read, {TOKENS: read[reads.CAPTIONS][TOKENS][:1]})[TOKENS]
    optimised = read[EMBEDDING][told_words.TOKENS]
    vectors = eta * self.target(read)[None] + (1 - eta) * optimised[None]
    return {TOKENS: jnp.broadcast_to(ids, (len(eta), *ids.shape[1:])), EMBEDDING: vectors}
