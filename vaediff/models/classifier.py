"""A small convolutional classifier, for sets of images that no published network was trained on.

One 3x3 convolution per resolution, group norm and SiLU, halved by average pooling down to 4x4 while the
channels double; then a hidden layer, whose activations are the features, and the logits.

Must not import diffusion, experiments, run, config or data.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vaediff.errors import UserError
from vaediff.models import layers
from vaediff.types import Image

LAST_SIDE = 4
"""Images are halved down to about this side."""


class Classifier(nn.Module):
  """Image -> features and logits.

  Attributes:
    num_classes: number of logits, at least 2.
    channels: at full resolution; they double with every halving.
    num_features: length of the feature vector.
    dropout: rate on the features while training.
    dtype: compute type.
    heads: how many classes each of several properties has, whose logits follow one another in place of those
    of
      `num_classes`; () = the label alone.

  Raises:
    UserError: for a number of classes, channels or features that makes no network.
  """

  num_classes: int
  channels: int
  num_features: int
  dropout: float
  dtype: str
  heads: tuple[int, ...] = ()

  @nn.compact
  def __call__(
    self, x: Image, *, deterministic: bool = True
  ) -> tuple[Float[Array, 'batch features'], Float[Array, 'batch classes']]:
    """Returns (features, logits) of images in [-1, 1], both float32."""
    for field, least in (('num_classes', 2), ('channels', 1), ('num_features', 1)):
      if getattr(self, field) < least:
        raise UserError(f'model.{field} must be >= {least}, got {getattr(self, field)}')
    if not 0 <= self.dropout < 1:
      raise UserError(f'model.dropout must be in [0, 1), got {self.dropout}')
    channels, level = self.channels, 0
    h = x
    while True:
      h = layers.conv3x3(channels, name=f'conv_{level}', dtype=self.dtype)(h)
      h = nn.silu(layers.GroupNorm(epsilon=1e-5, name=f'norm_{level}')(h))
      if min(h.shape[1:3]) < 2 * LAST_SIDE:
        break
      h = nn.avg_pool(h, (2, 2), strides=(2, 2))
      channels, level = 2 * channels, level + 1
    h = h.reshape(h.shape[0], -1)
    features = nn.silu(layers.dense(self.num_features, name='features', dtype=self.dtype)(h))
    h = nn.Dropout(self.dropout, deterministic=deterministic)(features)
    logits = layers.dense(sum(self.heads) or self.num_classes, name='logits', dtype=self.dtype)(h)
    return jnp.asarray(features, jnp.float32), jnp.asarray(logits, jnp.float32)
