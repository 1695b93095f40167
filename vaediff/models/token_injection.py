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
WAVELENGTH = 10_000
"""Of the slowest sine of a position, over that of the fastest."""


class Tokens(NamedTuple):
  """A map that enters at a position: its name, one of `WAYS`, and the map."""

  name: str
  how: str
  map: Float[Array, 'batch height width channels']


Entering = tuple[Tokens, ...]


def beside(x: Array, entering: Entering) -> Array:
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
  order does not matter, and their grid is free.

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
    h = layers.GroupNorm(epsilon=self.norm_epsilon, name='norm')(x)
    query = layers.dense(channels, name='query', dtype=self.dtype)(h).reshape(batch, height * width, *inner)
    normed = nn.LayerNorm(dtype=jnp.float32, name='norm_tokens')(tokens)
    placed = normed + positions(*tokens.shape[1:])[None]
    key, value = (
      layers.dense(channels, name=name, dtype=self.dtype)(placed).reshape(batch, -1, *inner)
      for name in ('key', 'value')
    )
    h = layers.attention(query, key, value, scale=inner[1] ** -0.5).astype(self.dtype)
    out = layers.dense(channels, name='out', dtype=self.dtype, zero_init=True)
    return x + out(h.reshape(batch, height, width, channels))


def positions(height: int, width: int, channels: int) -> Float[Array, 'height width channels']:
  """Returns sines and cosines of each position of a grid: half the channels of its row, half of its column.

  Of frequencies there are a quarter of the channels, from 1 down; channels that are left are zero.
  """
  count = channels // 4
  frequencies = WAVELENGTH ** -(jnp.arange(count, dtype=jnp.float32) / max(count, 1))

  def waves(length: int) -> Array:
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)

  shape = (height, width, 2 * count)
  rows = jnp.broadcast_to(waves(height)[:, None], shape)
  columns = jnp.broadcast_to(waves(width)[None], shape)
  left = jnp.zeros((height, width, channels - 4 * count))
  return jnp.concatenate([rows, columns, left], axis=-1)
