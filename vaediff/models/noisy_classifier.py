"""A classifier of noisy states: the way down of the U-Net, an attention pool, and a linear map to classes.

Dhariwal & Nichol 2021 (arXiv:2105.05233); the pool is that of CLIP (Radford et al. 2021, arXiv:2103.00020):
the mean of all positions asks, all positions and the mean answer. It reads the state and the time, and
nothing else: of a VAE's image it could read the class off, whatever the state says.

Must not import diffusion, experiments, run, config or data.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vaediff.errors import UserError
from vaediff.models import layers
from vaediff.models.unet import UNet
from vaediff.types import Image, Time

NORM_EPSILON = 1e-5


class AttentionPool(nn.Module):
  """Attention of one query, the mean, over the mean and every position, each with a learned place.

  Attributes:
    num_heads: divides the channels.
    dtype: type of the arithmetic.
  """

  num_heads: int
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, 'batch height width channels']) -> Float[Array, 'batch channels']:
    """Returns one vector per example."""
    batch, channels = x.shape[0], x.shape[-1]
    tokens = x.reshape(batch, -1, channels)
    tokens = jnp.concatenate([tokens.mean(axis=1, keepdims=True), tokens], axis=1)
    place = nn.initializers.normal(channels**-0.5)
    tokens = tokens + self.param('places', place, tokens.shape[1:])[None].astype(tokens.dtype)
    heads = lambda name, rows: layers.dense(channels, name=name, dtype=self.dtype)(rows).reshape(
      batch, -1, self.num_heads, channels // self.num_heads
    )
    query, key, value = heads('query', tokens[:, :1]), heads('key', tokens), heads('value', tokens)
    pooled = layers.attention(query, key, value, scale=(channels // self.num_heads) ** -0.5)
    return layers.dense(channels, name='out', dtype=self.dtype)(pooled.reshape(batch, channels))


class NoisyClassifier(nn.Module):
  """Logits of the classes of a noisy state.

  Attributes:
    encoder: the U-Net whose way down and middle are used; without ports.
    num_classes: at least 2.
    pool_heads: of the attention pool; divides the channels of the lowest level.

  Raises:
    UserError: a field is out of range.
  """

  encoder: UNet
  num_classes: int
  pool_heads: int

  def __post_init__(self):
    if self.num_classes < 2:
      raise UserError(f'a classifier needs at least 2 classes, got {self.num_classes}.')
    width = self.encoder.channels * self.encoder.channel_multipliers[-1]
    if width % self.pool_heads:
      raise UserError(f'model.pool_heads is {self.pool_heads}, which does not divide the {width} channels.')
    super().__post_init__()

  @nn.compact
  def __call__(self, y_t: Image, t: Time, *, deterministic: bool = True) -> Float[Array, 'batch classes']:
    """Returns the logits, float32; there is no dropout to switch.

    Args:
      y_t: noisy state.
      t: time in (0, 1].
      deterministic: changes nothing; every network of the package has it.
    """
    del deterministic
    dtype = jnp.dtype(self.encoder.dtype)
    h = self.encoder.features(y_t, t)[-1]
    h = nn.silu(layers.GroupNorm(epsilon=NORM_EPSILON, name='norm')(h)).astype(dtype)
    pooled = AttentionPool(num_heads=self.pool_heads, dtype=dtype, name='pool')(h)
    return layers.dense(self.num_classes, name='classes', dtype=jnp.float32)(pooled.astype(jnp.float32))
