"""A convolutional discriminator that judges overlapping patches (Isola et al. 2017, 1611.07004).

With three stride-2 convolutions each logit sees 70 x 70 pixels. Where the original has batch norm, this has
group norm or nothing: the statistics of a batch are those of one device or need a sum over all of them,
they tie the judgement of one image to the others of its batch, and they are state besides the parameters.
Group norm has as many parameters and none of these.

Must not import diffusion, experiments, run, config or data.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vaediff.errors import UserError
from vaediff.models import layers
from vaediff.types import Image

NORMS = ('group', 'none')
MAX_MULTIPLIER = 8
SLOPE = 0.2
NORM_EPSILON = 1e-6

# The initialisation under which adversarial networks of this kind are trained (1611.07004, section 6.2).
normal_002 = nn.initializers.normal(0.02)


class PatchDiscriminator(nn.Module):
  """4x4 convolutions with leaky ReLU: stride 2 and twice the channels each time, then stride 1 twice.

  Attributes:
    channels: of the first convolution.
    num_layers: stride-2 convolutions, at least 1.
    norm: 'group' or 'none', between the first and the last convolution.
    dtype: 'float32' or 'bfloat16', the type of the arithmetic; the last convolution is float32.

  Raises:
    UserError: a field is out of range.
  """

  channels: int = 64
  num_layers: int = 3
  norm: str = 'group'
  dtype: str = 'float32'

  def __post_init__(self):
    layers.check_dtype(self.dtype)
    if self.norm not in NORMS:
      raise UserError(f"model.norm is '{self.norm}'; choose one of {', '.join(NORMS)}.")
    for field in ('channels', 'num_layers'):
      if getattr(self, field) < 1:
        raise UserError(f'model.{field} is {getattr(self, field)}; it must be at least 1.')
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Image, *, deterministic: bool = True) -> Float[Array, 'batch rows columns']:
    """Returns one logit per patch, float32; there is no dropout to switch.

    Raises:
      UserError: the images are too small to leave a logit.
    """
    del deterministic
    least = 3 * 2**self.num_layers
    if min(x.shape[1:3]) < least:
      raise UserError(
        f'The images are {x.shape[1]} x {x.shape[2]}, but model.num_layers is {self.num_layers}, which needs '
        f'at least {least} x {least}; take fewer layers.'
      )
    dtype = jnp.dtype(self.dtype)
    h = nn.leaky_relu(_conv4x4(self.channels, name='conv_0', strides=2, dtype=dtype)(x), SLOPE)
    for i in range(1, self.num_layers + 1):
      h = _conv4x4(
        min(2**i, MAX_MULTIPLIER) * self.channels,
        name=f'conv_{i}',
        strides=2 if i < self.num_layers else 1,
        # The norm's own bias follows.
        use_bias=self.norm == 'none',
        dtype=dtype,
      )(h)
      if self.norm == 'group':
        h = layers.GroupNorm(epsilon=NORM_EPSILON, name=f'norm_{i}')(h)
      h = nn.leaky_relu(h, SLOPE)
    return _conv4x4(1, name='conv_out', dtype=jnp.float32)(h.astype(jnp.float32))[..., 0]


def _conv4x4(features: int, *, name: str, dtype, strides: int = 1, use_bias: bool = True) -> nn.Conv:
  """Returns a 4x4 convolution with one row and column of zeros on each side."""
  return nn.Conv(
    features,
    kernel_size=(4, 4),
    strides=(strides, strides),
    padding=((1, 1), (1, 1)),
    use_bias=use_bias,
    kernel_init=normal_002,
    dtype=dtype,
    name=name,
  )
