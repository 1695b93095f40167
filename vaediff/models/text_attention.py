"""Blocks of a U-Net whose map reads the tokens of a text, beside or in place of its attention to itself.

    'attention'    `TextAttention`, behind each attention block. Nothing at first, so that a network that was
                   trained without a text can be given one
    'transformer'  `SpatialTransformer` of latent diffusion (Rombach et al. 2022, arXiv:2112.10752), in the
                   place of each attention block: 20 c^2 + 2 d c + 21 c parameters for c channels and tokens
                   of d numbers

Must not import diffusion, experiments, run, config or data.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from vaediff.models import layers
from vaediff.models.text_tower import Words

WAYS = ('attention', 'transformer')
LDM_EPSILON, NORM_EPSILON = 1e-6, 1e-5
"""Of group norms and of layer norms in latent diffusion's block."""

Map = Float[Array, 'batch height width channels']
Tokens = Float[Array, 'batch tokens token_width']
Allowed = Bool[Array, 'batch tokens']


class Text(NamedTuple):
  """A text that a map reads: its name, one of `WAYS`, and its tokens."""

  name: str
  how: str
  words: Words


Texts = tuple[Text, ...]


def in_place(texts: Texts) -> Text | None:
  """Returns the text whose block takes the place of an attention block; None where there is none."""
  return next((text for text in texts if text.how == 'transformer'), None)


class TextAttention(nn.Module):
  """Cross-attention: every position of a map reads the tokens of a text.

  At first the output is the map itself. What asks says where it is, by sines of its position; without them
  small networks learned the words of a whole image alone, such as its background (docs/text.md).

  Attributes:
    heads: of the attention.
    norm_epsilon: of the group norm.
    dtype: compute type.
  """

  heads: int
  norm_epsilon: float
  dtype: Any

  @nn.compact
  def __call__(self, x: Map, tokens: Tokens, allowed: Allowed) -> Map:
    """Returns x plus what its positions gather from the tokens that are allowed."""
    h = layers.GroupNorm(epsilon=self.norm_epsilon, name='norm')(x)
    h = h + layers.positions(*h.shape[1:])[None].astype(h.dtype)
    h = _gathered(self, self.heads, h, tokens, allowed, use_bias=True)
    return x + layers.dense(x.shape[-1], name='out', dtype=self.dtype, zero_init=True)(h)


class SpatialTransformer(nn.Module):
  """Latent diffusion's block: a linear map, self-attention, cross-attention, GEGLU, a linear map.

  At first the output is the map itself.

  Attributes:
    heads: of both attentions.
    dtype: compute type; norms and softmax are float32.
  """

  heads: int
  dtype: Any

  @nn.compact
  def __call__(self, x: Map, tokens: Tokens, allowed: Allowed) -> Map:
    """Returns x plus what the block adds to it."""
    channels = x.shape[-1]
    linear = lambda features, name, **more: layers.dense(features, name=name, dtype=self.dtype, **more)
    norm = lambda name: nn.LayerNorm(epsilon=NORM_EPSILON, dtype=jnp.float32, name=name)
    h = linear(channels, 'proj_in')(layers.GroupNorm(epsilon=LDM_EPSILON, name='norm')(x))
    for name, source, seen in (('self', None, None), ('cross', tokens, allowed)):
      normed = norm(f'norm_{name}')(h).astype(self.dtype)
      h = h + Attention(heads=self.heads, dtype=self.dtype, name=name)(normed, source, seen)
    hidden = linear(8 * channels, 'mlp_in')(norm('norm_mlp')(h).astype(self.dtype))
    value, gate = jnp.split(hidden, 2, axis=-1)
    h = h + linear(channels, 'mlp_out')(value * nn.gelu(gate, approximate=False))
    return x + linear(channels, 'proj_out', zero_init=True)(h)


class Attention(nn.Module):
  """Attention of a map to tokens or, without them, to itself; queries, keys and values have no biases.

  Attributes:
    heads: of the attention.
    dtype: compute type.
  """

  heads: int
  dtype: Any

  @nn.compact
  def __call__(self, x: Map, tokens: Tokens | None = None, allowed: Allowed | None = None) -> Map:
    """Returns what each position gathers."""
    source = x.reshape(len(x), -1, x.shape[-1]) if tokens is None else tokens
    h = _gathered(self, self.heads, x, source, allowed, use_bias=False)
    return layers.dense(x.shape[-1], name='out', dtype=self.dtype)(h)


def _gathered(
  module: TextAttention | Attention,
  heads: int,
  x: Map,
  tokens: Tokens,
  allowed: Allowed | None,
  *,
  use_bias: bool,
) -> Map:
  """Returns what each position of a map gathers of tokens; call it within the module's compact method."""
  batch, channels = len(x), x.shape[-1]

  def split(name: str, of: jax.Array) -> jax.Array:
    found = layers.dense(channels, name=name, dtype=module.dtype, use_bias=use_bias)(of)
    return found.reshape(batch, -1, heads, channels // heads)

  query, key, value = split('query', x), split('key', tokens), split('value', tokens)
  scale = (channels // heads) ** -0.5
  return layers.attention(query, key, value, scale=scale, allowed=allowed).reshape(x.shape)
