"""Transformers that predict ids one after the other, row by row: the prior of a tokenizer's codes.

  Decoder         p(c_n | c_<n, prefix): the prefix, one vector of a class or one for each word, is the start
                  of the one stream, and everything is causal (Esser et al. 2021, arXiv:2012.09841; Sun et
                  al. 2024, arXiv:2406.06525)
  EncoderDecoder  p(c_n | c_<n, source): the source is encoded both ways, and every block of the decoder reads
                  it (DiVAE, arXiv:2206.00386, eq. 23)

Both are called in two ways that agree: with all ids at once, and id after id with the keys and values of what
is before in a `Cache`. The prefix has a table of its own: no class or word is a code. What a mask leaves out
of it, such as padding, is read by nothing.

In a hierarchy the coarser ids are known before the first one of this grid is drawn: the embedding of those
that lie above place n is added where id n is predicted.

Must not import diffusion, experiments, run, config or data.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vaediff.errors import UserError
from vaediff.models import layers
from vaediff.models.transformer_blocks import (
  STYLES,
  Block,
  Options,
  Pair,
  Tokens,
  dense,
  norm,
  normal_init,
  rotations,
)

Ids = Int[Array, 'batch tokens']
Words = Int[Array, 'batch words']
Grid = Int[Array, 'batch _ _']
Context = Float[Array, 'batch places width']
Logits = Float[Array, 'batch tokens codes']
Level = tuple[tuple[int, int], int]
"""Of ids: the grid, (height, width), and how many there are."""


class Cache(NamedTuple):
  """What is kept of the tokens before.

  Attributes:
    known: keys and values, [layers, batch, places, heads, channels].
    memory: keys and values of the source, [layers, batch, words, heads, channels]; None without an encoder.
    memory_allowed: which words are read; None without an encoder.
    allowed: which places are read, whatever the order; None = all.
  """

  known: Pair
  memory: Pair | None = None
  memory_allowed: Bool[Array, 'batch 1 words'] | None = None
  allowed: Bool[Array, 'batch places'] | None = None


class _Predictor(nn.Module):
  """What both transformers share: ids and places in, blocks, logits out.

  Attributes:
    grid: (height, width) of the ids.
    codebook_size: how many ids there are.
    above: the coarser levels that are known, coarse first.
    style: 'gpt' or 'llama'.
    width: of a token.
    num_layers: blocks of the decoder.
    num_heads: attention heads; divides `width`.
    source_size: rows of the table of the source; 0 = it is given as vectors.
    source_length: how many vectors the source has.
    dropout: of the input, and after attention and MLP.
    remat: recompute the blocks' activations in the backward pass.
    dtype: 'float32' or 'bfloat16', the type of the arithmetic; norms, softmax and logits are float32.

  Raises:
    UserError: a field has a value that is not allowed.
  """

  grid: tuple[int, int]
  codebook_size: int
  style: str
  width: int
  num_layers: int
  num_heads: int
  source_size: int
  source_length: int = 1
  above: tuple[Level, ...] = ()
  dropout: float = 0.0
  remat: bool = False
  dtype: str = 'float32'

  def __post_init__(self):
    layers.check_dtype(self.dtype)
    _check_fields(self)
    super().__post_init__()

  @property
  def num_tokens(self) -> int:
    """Number of positions of the grid."""
    return self.grid[0] * self.grid[1]

  @property
  def options(self) -> Options:
    """What all blocks share."""
    return Options(
      style=self.style,
      width=self.width,
      num_heads=self.num_heads,
      dropout=self.dropout,
      dtype=jnp.dtype(self.dtype),
    )

  def _set_up(self, num_ids: int, num_places: int, *, reads_memory: bool) -> None:
    """Makes what both have: tables of `num_ids` ids and of places, blocks, and a head without a bias."""
    options = self.options
    self.codes = nn.Embed(num_ids, self.width, embedding_init=normal_init)
    self.levels_above = [nn.Embed(size, self.width, embedding_init=normal_init) for _, size in self.above]
    if self.style == 'gpt':
      self.position = self.param('position', nn.initializers.zeros, (num_places, self.width))
    block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
    self.blocks = [block(options, reads_memory) for _ in range(self.num_layers)]
    self.norm = norm(options)
    self.head = dense(self.codebook_size, options, use_bias=False, zero_init=self.style == 'llama')
    self.drop = nn.Dropout(self.dropout)

  def context(self, *above: Grid) -> Context | None:
    """Returns what is added where each id is predicted, of the coarser ids; None where there are none."""
    total, (height, width) = None, self.grid
    for table, ids in zip(self.levels_above, above, strict=True):
      near = jnp.repeat(jnp.repeat(ids, height // ids.shape[1], axis=1), width // ids.shape[2], axis=2)
      found = table(near.reshape(len(ids), -1))
      total = found if total is None else total + found
    return total

  def _run(
    self,
    x: Tokens,
    start: Int[Array, ''] | int,
    cache: Cache,
    turns: Array | None,
    num_places: int,
  ) -> tuple[Tokens, Cache]:
    """Returns the tokens, which are at the places from `start` on, after the blocks; the cache with them."""
    places = start + jnp.arange(x.shape[1])
    allowed = _seen(jnp.arange(num_places)[None, :] <= places[:, None], cache)
    rotation = None if turns is None else jax.lax.dynamic_slice_in_dim(turns, start, x.shape[1])
    known = cache.known
    for number, block in enumerate(self.blocks):
      x, known = block(x, True, allowed, rotation, known, (number, start), *_of_layer(cache, number))
    return x, cache._replace(known=known)

  def _all(self, x: Tokens, cache: Cache, turns: Array | None, deterministic: bool) -> Tokens:
    """Returns all tokens after the blocks, at once."""
    allowed = _seen(jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool)), cache)
    x = self.drop(x, deterministic=deterministic)
    for number, block in enumerate(self.blocks):
      x, _ = block(x, deterministic, allowed, turns, None, (0, 0), *_of_layer(cache, number))
    return x

  def _logits(self, x: Tokens) -> Logits:
    return self.head(self.norm(x).astype(self.options.dtype)).astype(jnp.float32)

  def _empty(self, batch: int, num_places: int) -> Pair:
    """Returns keys and values of no token yet."""
    shape = (self.num_layers, batch, num_places, self.num_heads, self.width // self.num_heads)
    return Pair(jnp.zeros(shape, self.options.dtype), jnp.zeros(shape, self.options.dtype))


def _seen(before: Bool[Array, 'query key'], cache: Cache) -> Bool[Array, '#batch query key']:
  """Returns what each place sees of those before it and its own."""
  return before[None] if cache.allowed is None else before[None] & cache.allowed[:, None]


def _of_layer(cache: Cache, number: int) -> tuple[Pair | None, Array | None]:
  """Returns what a block reads of the source."""
  if cache.memory is None:
    return None, None
  return Pair(cache.memory.key[number], cache.memory.value[number]), cache.memory_allowed


class Decoder(_Predictor):
  """A causal transformer of a prefix and the ids after it; see `_Predictor` for its fields."""

  @property
  def num_places(self) -> int:
    """Of the stream: the last id is no input."""
    return self.source_length + self.num_tokens - 1

  def setup(self):
    """Makes the layers."""
    self._set_up(self.codebook_size, self.num_places, reads_memory=False)
    if self.source_size:
      self.prefix = nn.Embed(self.source_size, self.width, embedding_init=normal_init)
    if self.style == 'llama' and self.source_length > 1:  # rotations leave the prefix as it is
      shape = (self.source_length, self.width)
      self.prefix_position = self.param('prefix_position', nn.initializers.zeros, shape)

  @property
  def turns(self) -> Array | None:
    """The rotations of all places, in the style that has them."""
    if self.style == 'gpt':
      return None
    channels = self.width // self.num_heads
    return rotations(self.grid, channels, self.source_length)[: self.num_places]

  def _before(self, source: Array) -> Tokens:
    """Returns the vectors of the prefix."""
    x = self.prefix(source) if self.source_size else source
    return x + self.prefix_position[None] if self.style == 'llama' and self.source_length > 1 else x

  def _read(self, mask: Bool[Array, 'batch length'] | None) -> Bool[Array, 'batch places'] | None:
    """Returns which places are read; None = all."""
    if mask is None:
      return None
    return jnp.concatenate([mask, jnp.ones((len(mask), self.num_tokens - 1), bool)], axis=1)

  def _placed(self, x: Tokens, start: Int[Array, ''] | int) -> Tokens:
    """Returns the tokens with what says their place, where that is added."""
    if self.style == 'gpt':
      x = x + jax.lax.dynamic_slice_in_dim(self.position, start, x.shape[1])[None]
    return x.astype(self.options.dtype)

  def __call__(
    self,
    codes: Ids,
    source: Array,
    *above: Grid,
    mask: Bool[Array, 'batch length'] | None = None,
    deterministic: bool = True,
  ) -> Logits:
    """Returns the logits of every id, given those before it.

    Args:
      codes: all ids, row by row.
      source: of the prefix: numbers of its vectors [batch, length], or vectors [batch, length, width].
      *above: ids of the coarser levels.
      mask: which of the prefix are read: its last always is; None = all.
      deterministic: no dropout.
    """
    x = jnp.concatenate([self._before(source), self.codes(codes[:, :-1])], axis=1)
    context, first = self.context(*above), self.source_length - 1
    if context is not None:
      x = x.at[:, first:].add(context)
    cache = Cache(Pair(x, x), allowed=self._read(mask))
    x = self._all(self._placed(x, 0), cache, self.turns, deterministic)
    return self._logits(x[:, first:])

  def start(
    self, source: Array, context: Context | None = None, mask: Bool[Array, 'batch length'] | None = None
  ) -> tuple[Float[Array, 'batch codes'], Cache]:
    """Returns the logits of the first id, and the cache with the prefix, all of it at once."""
    x = self._before(source)
    if context is not None:
      x = x.at[:, -1].add(context[:, 0])
    cache = Cache(self._empty(len(x), self.num_places), allowed=self._read(mask))
    x, cache = self._run(self._placed(x, 0), 0, cache, self.turns, self.num_places)
    return self._logits(x[:, -1:])[:, 0], cache

  def step(
    self, codes: Int[Array, ' batch'], n: Int[Array, ''], cache: Cache, context: Context | None = None
  ) -> tuple[Float[Array, 'batch codes'], Cache]:
    """Returns the logits of id n, given id n - 1 and the cache of what is before it; n >= 1."""
    x = self.codes(codes[:, None])
    if context is not None:
      x = x + jax.lax.dynamic_slice_in_dim(context, n, 1, axis=1)
    start = self.source_length + n - 1
    x, cache = self._run(self._placed(x, start), start, cache, self.turns, self.num_places)
    return self._logits(x)[:, 0], cache


class EncoderDecoder(_Predictor):
  """An encoder of the source, which sees all of it, and a causal decoder whose blocks read it.

  The id `codebook_size` stands before the first. Only of style 'gpt'; see `_Predictor` for the other fields.

  Attributes:
    num_encoder_layers: blocks of the encoder.
  """

  num_encoder_layers: int = 1

  def setup(self):
    """Makes the layers."""
    self._set_up(self.codebook_size + 1, self.num_tokens, reads_memory=True)
    options = self.options
    self.words = nn.Embed(self.source_size, self.width, embedding_init=normal_init)
    self.word_position = self.param('word_position', nn.initializers.zeros, (self.source_length, self.width))
    block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
    self.encoder = [block(options) for _ in range(self.num_encoder_layers)]
    self.encoder_norm = norm(options)

  def encode(
    self, source: Words, mask: Bool[Array, 'batch words'] | None = None, *, deterministic: bool = True
  ) -> Cache:
    """Returns a cache with what every block reads of the source: of words where the mask is True."""
    dtype = self.options.dtype
    x = (self.words(source) + self.word_position[None]).astype(dtype)
    x = self.drop(x, deterministic=deterministic)
    allowed = (jnp.ones(source.shape, bool) if mask is None else mask)[:, None]
    for block in self.encoder:
      x, _ = block(x, deterministic, allowed)
    x = self.encoder_norm(x).astype(dtype)
    pairs = [block.remember(x) for block in self.blocks]
    memory = Pair(*(jnp.stack(parts) for parts in zip(*pairs, strict=True)))
    return Cache(self._empty(len(x), self.num_tokens), memory, allowed)

  def _inputs(self, codes: Ids, start: Int[Array, ''] | int, context: Context | None) -> Tokens:
    """Returns the tokens of inputs that predict the ids from `start` on."""
    x = self.codes(codes) + jax.lax.dynamic_slice_in_dim(self.position, start, codes.shape[1])[None]
    if context is not None:
      x = x + jax.lax.dynamic_slice_in_dim(context, start, codes.shape[1], axis=1)
    return x.astype(self.options.dtype)

  def __call__(
    self,
    codes: Ids,
    source: Words,
    *above: Grid,
    mask: Bool[Array, 'batch words'] | None = None,
    deterministic: bool = True,
  ) -> Logits:
    """Returns the logits of every id, given those before it and the words that the mask keeps."""
    cache = self.encode(source, mask, deterministic=deterministic)
    before = jnp.full((len(codes), 1), self.codebook_size, codes.dtype)
    x = self._inputs(jnp.concatenate([before, codes[:, :-1]], axis=1), 0, self.context(*above))
    return self._logits(self._all(x, cache, None, deterministic))

  def start(
    self, source: Words, context: Context | None = None, mask: Bool[Array, 'batch words'] | None = None
  ) -> tuple[Float[Array, 'batch codes'], Cache]:
    """Returns the logits of the first id, and the cache with the source."""
    before = jnp.full((len(source),), self.codebook_size, jnp.int32)
    return self.step(before, jnp.int32(0), self.encode(source, mask), context)

  def step(
    self, codes: Int[Array, ' batch'], n: Int[Array, ''], cache: Cache, context: Context | None = None
  ) -> tuple[Float[Array, 'batch codes'], Cache]:
    """Returns the logits of id n, given id n - 1 and the cache of what is before it."""
    x, cache = self._run(self._inputs(codes[:, None], n, context), n, cache, None, self.num_tokens)
    return self._logits(x)[:, 0], cache


def _check_fields(model: Any) -> None:
  """Raises UserError unless the fields are in range and fit each other."""
  if model.style not in STYLES:
    raise UserError(f'model.style is {model.style!r}; valid: {", ".join(STYLES)}')
  if model.width % model.num_heads:
    raise UserError(f'model.num_heads is {model.num_heads}, which does not divide model.width {model.width}')
  if model.style == 'llama' and (model.width // model.num_heads) % 4:
    raise UserError(
      f"model.width / model.num_heads is {model.width // model.num_heads}: the style 'llama' turns pairs by "
      'row and by column, which needs a multiple of 4'
    )
  if isinstance(model, EncoderDecoder) and model.style != 'gpt':
    raise UserError(f"model.style is {model.style!r}; an encoder and decoder has the style 'gpt'")
  for grid, _ in model.above:
    if any(side % coarse for side, coarse in zip(model.grid, grid, strict=True)):
      raise UserError(
        f'the ids above have a grid of {grid[0]} x {grid[1]}, which does not divide that of the ids below, '
        f'{model.grid[0]} x {model.grid[1]}'
      )
