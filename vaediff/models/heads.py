"""Discriminator heads on the maps of a frozen denoiser (LADD, Sauer et al. 2024, 2403.12015).

A head judges one map of features, position by position; the time at which the features were taken modulates
it. What the features are of, and that they are not trained, is the caller's business.

Must not import diffusion, experiments, run, config or data.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vaediff.errors import UserError
from vaediff.models import layers
from vaediff.models.unet import TIME_STEPS
from vaediff.models.unet_blocks import Mlp
from vaediff.types import Time

NORM_EPSILON = 1e-6


class Head(nn.Module):
  """Group norm, 3x3 convolution, scale and shift by the embedding (FiLM, 1709.07871), SiLU, 1x1 convolution.

  Attributes:
    channels: between the two convolutions.
    dtype: compute type; the last convolution is float32.
  """

  channels: int
  dtype: Any

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch height width features'], emb: Float[Array, 'batch embedding']
  ) -> Float[Array, 'batch patches']:
    """Returns one logit per position."""
    h = layers.GroupNorm(epsilon=NORM_EPSILON, name='norm')(x)
    h = layers.conv3x3(self.channels, name='conv', dtype=self.dtype)(h)
    film = layers.dense(2 * self.channels, name='film', dtype=self.dtype)(nn.silu(emb))
    scale, shift = jnp.split(film[:, None, None, :], 2, axis=-1)
    h = nn.silu(h * (1.0 + scale) + shift)
    logits = layers.dense(1, name='out', dtype=jnp.float32)(h.astype(jnp.float32))
    return logits.reshape(x.shape[0], -1)


class Heads(nn.Module):
  """One head per map, all with the same embedding of the time.

  Attributes:
    channels: width of every head, and of the embedding; even, at least 4.
    dtype: 'float32' or 'bfloat16', the type of the arithmetic. Parameters, group norm statistics, the last
      convolutions and the logits are float32.

  Raises:
    UserError: a field is out of range.
  """

  channels: int = 256
  dtype: str = 'float32'

  def __post_init__(self):
    layers.check_dtype(self.dtype)
    if self.channels < 4 or self.channels % 2:
      raise UserError(f'discriminator.channels is {self.channels}; it must be even and at least 4.')
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    t: Time,
    *features: Float[Array, 'batch _ _ _'],
    deterministic: bool = True,
  ) -> list[Float[Array, 'batch _']]:
    """Returns the logits of each map, one per position, float32; there is no dropout to switch.

    Args:
      t: time in (0, 1] of the state that the features are of; embedded as the step index 1000 t - 1.
      *features: the maps, in the order in which the module was initialised.
      deterministic: changes nothing; every network of the package has it.
    """
    del deterministic
    dtype = jnp.dtype(self.dtype)
    position = layers.sinusoidal_embedding(
      TIME_STEPS * t - 1.0, self.channels, sin_first=False, last_frequency_included=False
    )
    emb = Mlp(features=self.channels, dtype=dtype, name='time_mlp')(position)
    return [
      Head(channels=self.channels, dtype=dtype, name=f'head_{k}')(x, emb) for k, x in enumerate(features)
    ]
