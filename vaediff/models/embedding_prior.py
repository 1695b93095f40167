"""A causal transformer that says the vector of an image of its caption: DALL-E 2's prior.

Ramesh et al. 2022 (arXiv:2204.06125), section 2.2. One stream, in this order: the words of the caption as a
CLIP tower has them, the vector of the caption, the time, the noisy vector of the image, and a query. At the
query, which sees all before it, the vector of the image is read. No word sees what stands behind it.

Of a caption that is dropped, or has no words, no word is seen, and `null` stands for its vector. With width W
and vectors of d numbers a block has 12 W^2 + 13 W parameters, and the time 2 W^2 + 2 W.

Must not import diffusion, experiments, run, config or data.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vaediff.errors import UserError
from vaediff.models import layers
from vaediff.models.transformer_blocks import Block, Options, norm, normal_init
from vaediff.models.unet_blocks import Mlp
from vaediff.types import Drop, Time, Values, Vectors

TIME_STEPS = 1000
"""t in (0, 1] is embedded as the step index 0 ... 999."""
BEHIND = 4
"""What stands behind the words: caption, time, image, query."""


class EmbeddingPrior(nn.Module):
  """A prediction of a vector, given a caption.

  Attributes:
    size: numbers of the vectors, those of captions too.
    texts: names of the values that it reads: the words [words, any width], which of them are read (above 0),
      and the vector of the caption.
    width: of a token.
    num_layers: blocks.
    num_heads: attention heads; divides `width`.
    dropout: after attention and MLP.
    remat: recompute the blocks' activations in the backward pass.
    dtype: 'float32' or 'bfloat16', the type of the arithmetic; norms, softmax and the output are float32.

  Raises:
    UserError: a field has a value that is not allowed.
  """

  size: int
  texts: tuple[str, str, str]
  width: int
  num_layers: int
  num_heads: int
  dropout: float = 0.0
  remat: bool = False
  dtype: str = 'float32'

  def __post_init__(self):
    layers.check_dtype(self.dtype)
    if self.width % self.num_heads:
      raise UserError(f'model.num_heads is {self.num_heads}, which does not divide model.width {self.width}')
    if self.width % 2 or self.width < 4:
      raise UserError(f'model.width must be even, and at least 4, got {self.width}')
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    x_t: Vectors,
    t: Time,
    values: Values,
    drop: Drop = {},  # noqa: B006
    *,
    deterministic: bool = True,
  ) -> Vectors:
    """Returns the prediction of x0, float32; row i is of row i alone.

    Args:
      x_t: noisy vectors of images.
      t: time in (0, 1].
      values: of captions, by the names of `texts`.
      drop: by value; an example is dropped where one of them is.
      deterministic: dropout is off; otherwise the 'dropout' key is needed.
    """
    dtype = jnp.dtype(self.dtype)
    words, read, caption = (values[name] for name in self.texts)
    absent = ~jnp.any(read > 0, axis=1)
    for name in self.texts:
      absent = absent | drop[name] if name in drop else absent
    null = self.param('null', nn.initializers.zeros, (self.size,))
    caption = jnp.where(absent[:, None], null[None], caption)
    x = self._stream(words, caption, t, x_t).astype(dtype)
    allowed = seen_by((read > 0) & ~absent[:, None])
    options = Options(
      style='gpt', width=self.width, num_heads=self.num_heads, dropout=self.dropout, dtype=dtype
    )
    block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
    for number in range(self.num_layers):
      x, _ = block(options, name=f'block_{number}')(x, deterministic, allowed)
    head = nn.Dense(self.size, kernel_init=nn.initializers.zeros, dtype=jnp.float32, name='head')
    return head(norm(options)(x[:, -1]))

  def _stream(
    self, words: Float[Array, 'batch words inputs'], caption: Vectors, t: Time, x_t: Vectors
  ) -> Float[Array, 'batch tokens width']:
    """Returns the tokens with their places; call it within the compact method."""
    dtype = jnp.dtype(self.dtype)
    linear = lambda name: nn.Dense(self.width, kernel_init=normal_init, dtype=dtype, name=name)
    waves = layers.sinusoidal_embedding(
      TIME_STEPS * t - 1.0, self.width, sin_first=False, last_frequency_included=False
    )
    query = self.param('query', normal_init, (self.width,))
    behind = [
      linear('caption')(caption),
      Mlp(features=self.width, dtype=dtype, name='time_mlp')(waves),
      linear('image')(x_t),
      jnp.broadcast_to(query, (len(t), self.width)),
    ]
    x = jnp.concatenate([linear('words')(words), jnp.stack(behind, axis=1).astype(dtype)], axis=1)
    return x + self.param('place', normal_init, x.shape[1:])[None].astype(dtype)


def seen_by(read: jax.Array) -> jax.Array:
  """Returns what each token sees, bool [batch, tokens, tokens]: what is read, up to itself.

  Args:
    read: which words are, bool [batch, words]; what stands behind them always is.
  """
  keys = jnp.concatenate([read, jnp.ones((len(read), BEHIND), bool)], axis=1)
  return jnp.tril(jnp.ones((keys.shape[1],) * 2, bool))[None] & keys[:, None]
