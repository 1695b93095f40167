"""Blocks of transformers over ids, in two styles, with keys and values that are kept while ids are drawn.

  gpt    layer norm, GELU with a hidden layer of 4 widths, biases: 12 C^2 + 13 C parameters a block
  llama  RMS norm, SwiGLU, no biases, queries and keys turned by their place in the grid (Su et al. 2021,
         arXiv:2104.09864, half of the channels by the row and half by the column): 4 C^2 + 3 C h + 2 C

Norms and softmax are float32. Must not import diffusion, experiments, run, config or data.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float

STYLES = ('gpt', 'llama')
EPSILON = 1e-5
ROTARY_BASE = 10_000.0
HIDDEN_MULTIPLE = 256
"""Of the hidden layer of SwiGLU."""
LEAST = -1e30
"""Logit of what is not to be seen: finite, so that a row that sees nothing is no nan."""

Tokens = Float[Array, 'batch tokens width']
Heads = Float[Array, 'batch tokens heads channels']
Allowed = Bool[Array, '#batch #query key']
"""What each query sees."""
Rotation = Float[Array, 'tokens pairs 2']
"""Cosine and sine by which each pair of channels is turned."""

normal_init = nn.initializers.normal(0.02)


class Pair(NamedTuple):
  """Keys and values, of one layer or, with one dimension more before, of all."""

  key: Array
  value: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What all blocks of one network share: see `transformer.Decoder`."""

  style: str
  width: int
  num_heads: int
  dropout: float
  dtype: Any

  @property
  def use_bias(self) -> bool:
    """Whether linear maps have biases."""
    return self.style == 'gpt'


def hidden_width(width: int) -> int:
  """Returns the hidden layer of SwiGLU: 8/3 of the width, rounded up to a multiple of 256."""
  return HIDDEN_MULTIPLE * -(-(8 * width // 3) // HIDDEN_MULTIPLE)


def dense(
  features: int, options: Options, *, use_bias: bool | None = None, zero_init: bool = False
) -> nn.Dense:
  """Returns a linear map that starts normal with deviation 0.02."""
  return nn.Dense(
    features,
    use_bias=options.use_bias if use_bias is None else use_bias,
    kernel_init=nn.initializers.zeros if zero_init else normal_init,
    dtype=options.dtype,
  )


def norm(options: Options) -> nn.Module:
  """Returns the norm of a style."""
  if options.style == 'llama':
    return nn.RMSNorm(epsilon=EPSILON, dtype=jnp.float32)
  return nn.LayerNorm(epsilon=EPSILON, dtype=jnp.float32, use_fast_variance=False)


def rotations(grid: tuple[int, int], channels: int, num_before: int) -> Rotation:
  """Returns the rotations of `num_before` tokens that are not turned, then of a grid's, row by row.

  Half of the pairs turn with the row, half with the column, pair p of each by the place times
  10,000^(-p / pairs).
  """
  pairs = channels // 4
  frequencies = ROTARY_BASE ** (-np.arange(pairs) / pairs)
  rows, columns = (np.reshape(place, (-1, 1)) * frequencies for place in np.indices(grid))
  angles = np.concatenate([rows, columns], axis=1)
  angles = np.concatenate([np.zeros((num_before, 2 * pairs)), angles])
  return jnp.asarray(np.stack([np.cos(angles), np.sin(angles)], axis=-1), jnp.float32)


def rotated(x: Heads, rotation: Rotation) -> Heads:
  """Returns x with pairs of neighbouring channels turned."""
  pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
  cosine, sine = (rotation[None, :, None, :, part] for part in (0, 1))
  first = pairs[..., 0] * cosine - pairs[..., 1] * sine
  second = pairs[..., 0] * sine + pairs[..., 1] * cosine
  return jnp.stack([first, second], axis=-1).reshape(x.shape).astype(x.dtype)


def attention(query: Heads, known: Pair, allowed: Allowed) -> Heads:
  """Returns softmax(query key^T / sqrt(d_h)) value over what is allowed, the softmax in float32."""
  query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, *known))
  logits = jnp.einsum('bhqc,bhkc->bhqk', query, key, preferred_element_type=jnp.float32)
  logits = jnp.where(allowed[:, None], logits * query.shape[-1] ** -0.5, LEAST)
  weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
  return jnp.swapaxes(jnp.einsum('bhqk,bhkc->bhqc', weights, value), 1, 2)


class Attention(nn.Module):
  """Attention of several heads."""

  options: Options

  def setup(self):
    """Makes the four linear maps."""
    width = self.options.width
    self.query, self.key, self.value, self.out = (dense(width, self.options) for _ in range(4))

  def _heads(self, x: Tokens) -> Heads:
    batch, tokens, width = x.shape
    return x.reshape(batch, tokens, self.options.num_heads, width // self.options.num_heads)

  def known(self, x: Tokens, rotation: Rotation | None = None) -> Pair:
    """Returns keys and values of tokens."""
    key = self._heads(self.key(x))
    return Pair(key if rotation is None else rotated(key, rotation), self._heads(self.value(x)))

  def __call__(self, x: Tokens, known: Pair, allowed: Allowed, rotation: Rotation | None = None) -> Tokens:
    """Returns what each token gathers of the keys and values that it sees."""
    query = self._heads(self.query(x))
    query = query if rotation is None else rotated(query, rotation)
    return self.out(attention(query, known, allowed).reshape(x.shape))


class Mlp(nn.Module):
  """Linear, GELU, linear with 4 widths; or SwiGLU, silu(x W_1) * (x W_3) W_2 (arXiv:2002.05202)."""

  options: Options

  @nn.compact
  def __call__(self, x: Tokens) -> Tokens:
    """Returns the tokens after it."""
    options, width = self.options, self.options.width
    if options.style == 'gpt':
      return dense(width, options)(nn.gelu(dense(4 * width, options)(x), approximate=False))
    hidden = hidden_width(width)
    return dense(width, options)(nn.silu(dense(hidden, options)(x)) * dense(hidden, options)(x))


class Block(nn.Module):
  """A block, normalised before attention and before the MLP; between them it may read a memory.

  Attributes:
    options: shared by all blocks.
    reads_memory: it attends to the tokens of an encoder too.
  """

  options: Options
  reads_memory: bool = False

  def setup(self):
    """Makes the norms, the attentions and the MLP."""
    options = self.options
    self.norm_1, self.attention = norm(options), Attention(options)
    if self.reads_memory:
      self.norm_memory, self.memory = norm(options), Attention(options)
    self.norm_2, self.mlp = norm(options), Mlp(options)
    self.drop = nn.Dropout(options.dropout)

  def remember(self, memory: Tokens) -> Pair:
    """Returns keys and values of the tokens of an encoder."""
    return self.memory.known(memory)

  def __call__(
    self,
    x: Tokens,
    deterministic: bool,
    allowed: Allowed,
    rotation: Rotation | None = None,
    past: Pair | None = None,
    place: tuple[Any, Any] = (0, 0),
    memory: Pair | None = None,
    memory_allowed: Bool[Array, '#batch 1 words'] | None = None,
  ) -> tuple[Tokens, Pair | None]:
    """Returns the tokens for the next block, and `past` with their keys and values.

    Args:
      x: the tokens.
      deterministic: no dropout.
      allowed: which of the keys each token sees.
      rotation: of these tokens, where the style turns them.
      past: keys and values of all layers and places; None = those of these tokens are all.
      place: in it, (layer, the place of the first of these tokens).
      memory: what `remember` returned.
      memory_allowed: which of the memory each token sees.
    """
    dtype = self.options.dtype
    h = self.norm_1(x).astype(dtype)
    known = self.attention.known(h, rotation)
    if past is not None:
      (layer, start), both = place, zip(past, known, strict=True)
      where = (layer, 0, start, 0, 0)
      put = lambda old, new: jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), where)
      past = Pair(*(put(old, new) for old, new in both))
      known = Pair(past.key[layer], past.value[layer])
    x = x + self.drop(self.attention(h, known, allowed, rotation), deterministic=deterministic)
    if memory is not None:
      h = self.norm_memory(x).astype(dtype)
      x = x + self.drop(self.memory(h, memory, memory_allowed), deterministic=deterministic)
    h = self.mlp(self.norm_2(x).astype(dtype))
    return x + self.drop(h, deterministic=deterministic), past
