"""Maps of tokens that enter a U-Net inside: at residual blocks of its bottom level (DiVAE, section 3.2).

A map has a position, and a way in which it joins the network's map h:

    'encoder', 'decoder'  every residual block of the bottom level on the way down, or up
    'middle'              the first residual block of the middle

    'concat'     the block reads [h, tokens]
    'add'        what the block's first convolution gives, plus a linear map of the tokens
    'attention'  behind the block, each position of h reads all tokens; zero at first

The first two need a map with the sides of h. Widths of what the blocks return do not change.

Must not import diffusion, experiments, run, config or data.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vaediff.models import layers

POSITIONS = ('encoder', 'middle', 'decoder')
WAYS = ('concat', 'add', 'attention')


class Tokens(NamedTuple):
  """A map that enters at a position: its name, one of `WAYS`, and the map."""

  name: str
  how: str
  map: Float[Array, 'batch height width channels']


Entering = tuple[Tokens, ...]


def concatenated(x: Array, entering: Entering) -> Array:
  """Returns the map with those behind it that are concatenated."""
  maps = [tokens.map.astype(x.dtype) for tokens in entering if tokens.how == 'concat']
  return jnp.concatenate([x, *maps], axis=-1) if maps else x


def added(features: int, block: str, entering: Entering, dtype: Any) -> Array | None:
  """Returns the sum of what is added inside a block, of so many channels; None where nothing is.

  Call it within the compact method of the block's level, as `TokenAttention`.
  """
  maps = [
    layers.dense(features, name=f'{block}_{tokens.name}', dtype=dtype)(tokens.map)
    for tokens in entering
    if tokens.how == 'add'
  ]
  return sum(maps[1:], maps[0]) if maps else None


class TokenAttention(nn.Module):
  """Cross-attention: every position of a map reads all tokens.

  At first the output is the map itself. Tokens say where they are by sines of their position, so that their
  order does not matter, and their grid is free; what asks says where it is, too, on the grid of the tokens.

  Attributes:
    heads: of the attention.
    norm_epsilon: of the group norm.
    dtype: compute type.
  """

  heads: int
  norm_epsilon: float
  dtype: Any

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'batch height width channels'],
    tokens: Float[Array, 'batch rows columns token_channels'],
  ) -> Float[Array, 'batch height width channels']:
    """Returns x plus what its positions gather from the tokens."""
    batch, height, width, channels = x.shape
    inner = (self.heads, channels // self.heads)
    rows, columns, token_channels = tokens.shape[1:]
    h = layers.GroupNorm(epsilon=self.norm_epsilon, name='norm')(x)
    h = h + layers.positions(height, width, channels, (rows, columns))[None].astype(h.dtype)
    query = layers.dense(channels, name='query', dtype=self.dtype)(h).reshape(batch, height * width, *inner)
    normed = nn.LayerNorm(dtype=jnp.float32, name='norm_tokens')(tokens)
    placed = normed + layers.positions(rows, columns, token_channels)[None]
    key, value = (
      layers.dense(channels, name=name, dtype=self.dtype)(placed).reshape(batch, -1, *inner)
      for name in ('key', 'value')
    )
    h = layers.attention(query, key, value, scale=inner[1] ** -0.5).astype(self.dtype)
    out = layers.dense(channels, name='out', dtype=self.dtype, zero_init=True)
    return x + out(h.reshape(batch, height, width, channels))
