"""Two towers, of images and of words, whose vectors of unit length are compared: CLIP.

Radford et al. 2021 (arXiv:2103.00020). Image: patches by a linear map without a bias, behind a class token,
places, a norm, pre-norm blocks, a norm of the class token, a linear map. Words: a table and places, causal
blocks, a norm, of which the token at the end of the text is read, a linear map. Blocks of width W have
12 W^2 + 13 W parameters and `x sigmoid(1.702 x)` between the maps of their MLP.

Where a text ends is how many of its ids are no padding: not where the largest id is, which another vocabulary
moves. Must not import diffusion, experiments, run, config or data.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vaediff.errors import UserError
from vaediff.models import transformer_blocks
from vaediff.models.text_tower import PAD, Tower
from vaediff.types import Image, Scalar

EPSILON = 1e-5
SHARP = 1.702
"""Of the sigmoid that stands for that of GELU."""
SOFTMAX, SIGMOID = 'softmax', 'sigmoid'
FIRST = {SOFTMAX: (1 / 0.07, None), SIGMOID: (10.0, -10.0)}
"""e^ls and the bias of the logits at step 0, by loss."""

Tokens = Float[Array, 'batch tokens width']
Embedding = Float[Array, 'batch embedding']
"""Vectors of unit length, float32."""


def _map(features: int, deviation: float, dtype: Any, name: str, *, use_bias: bool = True) -> nn.Dense:
  init = nn.initializers.normal(deviation)
  return nn.Dense(features, use_bias=use_bias, kernel_init=init, dtype=dtype, name=name)


def _norm(name: str) -> nn.LayerNorm:
  return nn.LayerNorm(epsilon=EPSILON, dtype=jnp.float32, use_fast_variance=False, name=name)


class Block(nn.Module):
  """Attention and MLP, each behind a norm and added to what comes in.

  Attributes:
    tower: width, heads, and how many blocks there are, by which what is added starts smaller.
    dtype: compute type; norms and softmax are float32.
  """

  tower: Tower
  dtype: Any

  @nn.compact
  def __call__(self, x: Tokens, allowed: Bool[Array, '#batch #query key']) -> Tokens:
    """Returns the tokens after it; `allowed` is what each of them sees."""
    (batch, count, width), heads = x.shape, self.tower.num_heads
    added = width**-0.5 * (2 * self.tower.num_layers) ** -0.5
    h = _norm('norm_1')(x).astype(self.dtype)
    query, key, value = (
      _map(width, width**-0.5, self.dtype, name)(h).reshape(batch, count, heads, width // heads)
      for name in ('query', 'key', 'value')
    )
    h = transformer_blocks.attention(query, transformer_blocks.Pair(key, value), allowed)
    x = x + _map(width, added, self.dtype, 'out')(h.reshape(x.shape))
    h = _map(4 * width, (2 * width) ** -0.5, self.dtype, 'up')(_norm('norm_2')(x).astype(self.dtype))
    return x + _map(width, added, self.dtype, 'down')(h * nn.sigmoid(SHARP * h))


class ImageTower(nn.Module):
  """A vision transformer of square patches.

  Attributes:
    patch: pixels of a side; divides those of the image.
    tower: its sizes.
    embedding_size: of the vector.
    dtype: compute type.
  """

  patch: int
  tower: Tower
  embedding_size: int
  dtype: Any

  @nn.compact
  def __call__(self, image: Image) -> Float[Array, 'batch embedding']:
    """Returns a vector per image, of any length."""
    width, side = self.tower.width, (self.patch, self.patch)
    init = nn.initializers.normal(width**-0.5)
    x = nn.Conv(width, side, side, padding='VALID', use_bias=False, dtype=self.dtype, name='patches')(image)
    x = x.reshape(len(image), -1, width)
    whole = self.param('class', init, (width,)).astype(self.dtype)
    x = jnp.concatenate([jnp.broadcast_to(whole, (len(image), 1, width)), x], axis=1)
    x = x + self.param('places', init, x.shape[1:])[None].astype(self.dtype)
    x = _norm('norm_before')(x).astype(self.dtype)
    everything = jnp.ones((1, x.shape[1], x.shape[1]), bool)
    for number in range(self.tower.num_layers):
      x = Block(self.tower, self.dtype, name=f'block_{number}')(x, everything)
    x = _norm('norm_after')(x[:, 0])
    return _map(self.embedding_size, width**-0.5, jnp.float32, 'projection', use_bias=False)(x)


class Encoded(NamedTuple):
  """Texts, word by word and as a whole."""

  words: Float[Array, 'batch words width']
  whole: Float[Array, 'batch embedding']


class WordTower(nn.Module):
  """A causal transformer of ids, read at the last one.

  Attributes:
    vocabulary: how many ids there are; `PAD` is one of them.
    tower: its sizes.
    embedding_size: of the vector.
    dtype: compute type.
  """

  vocabulary: int
  tower: Tower
  embedding_size: int
  dtype: Any

  @nn.compact
  def __call__(self, ids: Int[Array, 'batch words']) -> Encoded:
    """Returns the words behind the last norm, float32, and a vector per text, of any length.

    What stands behind the end of a text changes nothing of the vector, and no word before it.
    """
    width, length = self.tower.width, ids.shape[1]
    x = nn.Embed(self.vocabulary, width, embedding_init=nn.initializers.normal(0.02), name='words')(ids)
    x = x + self.param('places', nn.initializers.normal(0.01), (length, width))[None]
    x = x.astype(self.dtype)
    before = jnp.tril(jnp.ones((length, length), bool))[None]
    for number in range(self.tower.num_layers):
      x = Block(self.tower, self.dtype, name=f'block_{number}')(x, before)
    last = jnp.maximum(jnp.sum(ids != PAD, axis=1) - 1, 0)
    norm = _norm('norm')
    whole = norm(jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0])
    project = _map(self.embedding_size, width**-0.5, jnp.float32, 'projection', use_bias=False)
    return Encoded(words=norm(x), whole=project(whole))


class Compared(NamedTuple):
  """Images and texts as vectors, and how their cosines become logits."""

  images: Embedding
  texts: Embedding
  scale: Scalar
  bias: Scalar | float


class Clip(nn.Module):
  """Both towers, and the scale of what is compared.

  Attributes:
    image_size: pixels of a side.
    patch: of the image tower.
    image: its sizes.
    vocabulary: ids of the words.
    text: sizes of the tower of words.
    embedding_size: of the vectors.
    scale: e^ls at first.
    bias: of the logits at first; None = there is none.
    dtype: compute type of the towers.

  Raises:
    UserError: a field is out of range.
  """

  image_size: int
  patch: int
  image: Tower
  vocabulary: int
  text: Tower
  embedding_size: int
  scale: float
  bias: float | None
  dtype: str

  def __post_init__(self):
    if self.image_size % self.patch:
      raise UserError(f'model.patch is {self.patch}, which does not divide the image size {self.image_size}')
    for name, tower in (('image', self.image), ('text', self.text)):
      if tower.width % tower.num_heads:
        raise UserError(
          f'model.{name}.num_heads is {tower.num_heads}, which does not divide model.{name}.width '
          f'{tower.width}'
        )
    super().__post_init__()

  def setup(self):
    """Makes the towers."""
    dtype = jnp.dtype(self.dtype)
    self.image_encoder = ImageTower(self.patch, self.image, self.embedding_size, dtype)
    self.text_encoder = WordTower(self.vocabulary, self.text, self.embedding_size, dtype)
    self.log_scale = self.param('log_scale', nn.initializers.constant(math.log(self.scale)), ())
    if self.bias is not None:
      self.logit_bias = self.param('bias', nn.initializers.constant(self.bias), ())

  def images(self, image: Image) -> Embedding:
    """Returns images as vectors."""
    return unit(self.image_encoder(image))

  def texts(self, ids: Int[Array, 'batch words']) -> Embedding:
    """Returns texts as vectors."""
    return unit(self.text_encoder(ids).whole)

  def encoded(self, ids: Int[Array, 'batch words']) -> Encoded:
    """Returns the words of texts behind the last norm, and the texts as vectors of unit length."""
    words, whole = self.text_encoder(ids)
    return Encoded(words=words, whole=unit(whole))

  def __call__(self, image: Image, ids: Int[Array, 'batch words'], *, deterministic: bool = True) -> Compared:
    """Returns both; there is no dropout to switch."""
    del deterministic
    bias = 0.0 if self.bias is None else self.logit_bias
    return Compared(
      images=self.images(image), texts=self.texts(ids), scale=jnp.exp(self.log_scale), bias=bias
    )


def unit(x: Float[Array, 'batch embedding']) -> Embedding:
  """Returns vectors of length 1, float32; of 0 it is 0."""
  x = x.astype(jnp.float32)
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
