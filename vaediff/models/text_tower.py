"""Words as vectors: a small transformer that is trained with the network that reads them.

    ids -> embedding + place, behind a learned null token -> blocks, pre-norm, both ways -> layer norm

The null token stands first and is always read. Of a dropped example it alone is, and so of a caption of no
words, so that no row of an attention is ever without anything to read. What is padding is read nowhere.

Must not import diffusion, experiments, run, config or data.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vaediff.models.transformer_blocks import EPSILON, Block, Options, normal_init
from vaediff.types import Mask

PAD = 0
"""The id of padding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tower:
  """Sizes of a tower.

  Attributes:
    width: of a token.
    num_layers: blocks.
    num_heads: attention heads; divides `width`.
  """

  width: int = 64
  num_layers: int = 2
  num_heads: int = 4


class Words(NamedTuple):
  """Tokens, and which of them are read: at least one of each example."""

  tokens: Float[Array, 'batch tokens width']
  allowed: Bool[Array, 'batch tokens']


class TextTower(nn.Module):
  """A transformer of the ids of words, both ways.

  Attributes:
    vocabulary: how many ids there are; `PAD` is one of them.
    tower: its sizes.
    dtype: compute type; norms and softmax are float32.
  """

  vocabulary: int
  tower: Tower
  dtype: Any

  @nn.compact
  def __call__(self, ids: Int[Array, 'batch words'], drop: Mask | None = None) -> Words:
    """Returns the null token and those of the words; of dropped examples the first alone is read."""
    (batch, length), width = ids.shape, self.tower.width
    options = Options(style='gpt', width=width, num_heads=self.tower.num_heads, dropout=0.0, dtype=self.dtype)
    words = nn.Embed(self.vocabulary, width, embedding_init=normal_init, name='words')(ids)
    null = self.param('null', nn.initializers.zeros, (width,))
    place = self.param('place', normal_init, (length + 1, width))
    allowed = behind_null(ids != PAD, drop)
    x = jnp.concatenate([jnp.broadcast_to(null, (batch, 1, width)), words], axis=1) + place[None]
    x = x.astype(self.dtype)
    layer_norm = nn.LayerNorm(epsilon=EPSILON, dtype=jnp.float32, name='norm')
    for number in range(self.tower.num_layers):
      x, _ = Block(options, name=f'block_{number}')(x, True, allowed[:, None])
    return Words(layer_norm(x).astype(self.dtype), allowed)


def behind_null(read: Bool[Array, 'batch words'], drop: Mask | None) -> Bool[Array, 'batch tokens']:
  """Returns which tokens are read, a null token before the words; of a dropped example it alone."""
  kept = read if drop is None else read & ~drop[:, None]
  return jnp.concatenate([jnp.ones((len(read), 1), bool), kept], axis=1)


def pooled(words: Words) -> Float[Array, 'batch width']:
  """Returns the sum of the n tokens that are read over sqrt(n), float32.

  A mean would shrink what one word says to 1 / n beside the embedding of the time.
  """
  weights = words.allowed.astype(jnp.float32)[..., None]
  return jnp.sum(weights * words.tokens.astype(jnp.float32), axis=1) / jnp.sqrt(jnp.sum(weights, axis=1))
