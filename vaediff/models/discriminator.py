"""The time-dependent discriminator of denoising diffusion GANs (Xiao et al. 2022, 2112.07804, appendix C).

It reads a cleaner state x_t, the index t, and the noisier state x_{t+1} that was made from x_t or from which
x_t was generated, and returns the logit of the former. Leaky ReLU of slope 0.2 everywhere; no norms. The last
layers also see how much the examples of a small group differ (Karras et al. 2018, 1710.10196, section 3): a
logit depends on the other examples of its group.

Must not import diffusion, experiments, run, config or data.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Num

from vaediff.errors import UserError
from vaediff.models import layers, resampling
from vaediff.models.ncsnpp_blocks import INV_SQRT2, conv3x3, dense
from vaediff.types import Time

SLOPE = 0.2
MINIBATCH_STD_EPSILON = 1e-8

# Blocks as (width over `channels`, halves the resolution); then (last one repeated) up to `num_layers`.
BLOCKS = {
  'small': ((2, False), (4, True), (8, True), (8, True)),
  'large': ((4, True), (8, True), (8, True)),
}
NUM_LAYERS = {'small': (3, 4), 'large': (3, 8)}
GROUP_ORDERS = ('consecutive', 'strided')


class TimeDiscriminator(nn.Module):
  """The discriminator D(x_t, t, x_{t+1}), in its two published variants.

  Attributes:
    variant: 'small', whose first block keeps the resolution, or 'large', all of whose blocks halve it.
    num_layers: residual blocks; 3 or 4 for 'small', 3 to 8 for 'large'.
    dtype: 'float32' or 'bfloat16', the type of the arithmetic. Parameters, the statistics of the groups, the
      last sum, the last linear map and the logits are float32.
    channels: base width; the blocks have 2, 4 or 8 times as many channels.
    time_dim: sines and cosines of t, and width of its embedding; even, at least 4.
    group_size: examples per group of the minibatch standard deviation.
    group_order: which they are, see `minibatch_std`; 'strided' as published.
    init_scale: of the variance of the first kernels that end a branch, and for 'small' of the last
      convolution: 0, as published, starts the network linear and its logits at 0. A narrow network, whose
      updates move its logits little, leaves that state too slowly to teach a generator, and starts at 1.

  Raises:
    UserError: a field has a value that is not allowed.
  """

  variant: str
  num_layers: int
  dtype: str
  channels: int = 64
  time_dim: int = 256
  group_size: int = 4
  group_order: str = 'consecutive'
  init_scale: int | float = 0.0

  def __post_init__(self):
    _check_fields(self)
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    x_t: Float[Array, 'batch height width channels'],
    t: Num[Array, ' batch'],
    x_next: Float[Array, 'batch height width channels'],
    condition: Float[Array, 'batch height width condition'] | None = None,
    *,
    deterministic: bool = True,
  ) -> Float[Array, ' batch']:
    """Returns the logits that x_t was drawn from q(x_t | x_{t+1}), float32.

    Args:
      x_t: the cleaner state, real or generated.
      t: its index, 0 ... T - 1 or any other number; embedded as it is.
      x_next: x_{t+1}, the noisier state.
      condition: concatenated to the two along the channels.
      deterministic: changes nothing; every network of the package has it.

    Raises:
      UserError: the image cannot be halved often enough, or the batch cannot be split into groups.
    """
    blocks = _blocks(self)
    self._check_size(*x_t.shape[1:3], halvings=sum(halve for _, halve in blocks))
    dtype = jnp.dtype(self.dtype)
    images = (x_t, x_next) if condition is None else (x_t, x_next, condition)
    h = jnp.concatenate([image.astype(dtype) for image in images], axis=-1)
    emb = _act(
      DiscriminatorTime(features=self.time_dim, dtype=dtype, name='time_embedding')(t.astype(jnp.float32))
    )
    h = dense(2 * self.channels, name='conv_in', dtype=dtype)(h)
    for i, (multiplier, halve) in enumerate(blocks):
      block = DownBlock(
        features=multiplier * self.channels,
        halve=halve,
        dtype=dtype,
        init_scale=self.init_scale,
        name=f'block_{i}',
      )
      h = block(h, emb)
    spread = minibatch_std(h, group_size=self.group_size, order=self.group_order)
    spread = jnp.broadcast_to(spread[:, None, None, None].astype(dtype), (*h.shape[:3], 1))
    h = jnp.concatenate([h, spread], axis=-1)
    scale = self.init_scale if self.variant == 'small' else 1.0
    h = _act(conv3x3(8 * self.channels, name='conv_out', dtype=dtype, scale=scale)(h))
    h = h.astype(jnp.float32).sum(axis=(1, 2))
    return dense(1, name='logit', dtype=jnp.float32)(h)[:, 0]

  def _check_size(self, height: int, width: int, *, halvings: int) -> None:
    """Raises UserError unless an image of this size can be halved as often as the blocks do."""
    if height % 2**halvings or width % 2**halvings:
      raise UserError(
        f"x_t is {height} x {width}, but a '{self.variant}' discriminator with discriminator.num_layers "
        f'{self.num_layers} halves it {halvings} times and needs multiples of {2**halvings}.'
      )


class DiscriminatorTime(nn.Module):
  """Sines and cosines of t, then linear, leaky ReLU, linear.

  Attributes:
    features: width of everything; even, at least 4.
    dtype: compute type of the linear maps.
  """

  features: int
  dtype: Any

  @nn.compact
  def __call__(self, t: Time) -> Float[Array, 'batch features']:
    """Returns the embedding of the index t, a float of any size."""
    waves = layers.sinusoidal_embedding(t, self.features, sin_first=True, last_frequency_included=True)
    h = dense(self.features, name='dense_0', dtype=self.dtype)(waves)
    return dense(self.features, name='dense_1', dtype=self.dtype)(_act(h))


class DownBlock(nn.Module):
  """Two convolutions with the time between them, and a linear skip; optionally halves the sides.

  Attributes:
    features: channels of the output.
    halve: both branches are filtered and halved, before the second convolution.
    dtype: compute type.
    init_scale: of the second convolution's first kernels.
  """

  features: int
  halve: bool
  dtype: Any
  init_scale: int | float = 0.0

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch height width channels'], emb: Float[Array, 'batch embedding']
  ) -> Float[Array, 'batch height_out width_out features']:
    """Returns (skip(x) + branch(x)) / sqrt(2)."""
    h = conv3x3(self.features, name='conv_1', dtype=self.dtype)(_act(x))
    h = _act(h + dense(self.features, name='emb', dtype=self.dtype)(emb)[:, None, None, :])
    if self.halve:
      h, x = resampling.fir_downsample(h), resampling.fir_downsample(x)
    h = conv3x3(self.features, name='conv_2', dtype=self.dtype, scale=self.init_scale)(h)
    return (dense(self.features, name='skip', dtype=self.dtype, use_bias=False)(x) + h) * INV_SQRT2


def minibatch_std(
  x: Float[Array, 'batch height width channels'], *, group_size: int, order: str = 'consecutive'
) -> Float[Array, ' batch']:
  """Returns how much each example's group varies, float32: the mean over all features of the deviation.

  Karras et al. 2018 (1710.10196), section 3. The standard deviation, with the biased variance and 1e-8 under
  the root, is taken over groups of min(batch, group_size) examples, all of which get the same number. They
  are 'consecutive', so that of a batch sharded over devices a group lies on one of them, or, as published,
  'strided': with G groups every G-th example is of the same.

  Raises:
    UserError: the groups do not divide the batch.
  """
  batch = x.shape[0]
  group = min(batch, group_size)
  if batch % group:
    raise UserError(
      f'The minibatch standard deviation takes groups of {group} examples (discriminator.group_size), which '
      f'do not divide a batch of {batch}; make the batch a multiple of {group}, or choose other groups.'
    )
  strided = order == 'strided'
  shape = (group, batch // group) if strided else (batch // group, group)
  groups = x.astype(jnp.float32).reshape(*shape, -1)
  deviation = jnp.sqrt(groups.var(axis=0 if strided else 1) + MINIBATCH_STD_EPSILON).mean(axis=-1)
  return jnp.tile(deviation, group) if strided else jnp.repeat(deviation, group)


def _act(x: Array) -> Array:
  return jax.nn.leaky_relu(x, SLOPE)


def _blocks(network: TimeDiscriminator) -> tuple[tuple[int, bool], ...]:
  """Returns (width over `channels`, halves the resolution) of every block."""
  blocks = BLOCKS[network.variant]
  return (blocks + blocks[-1:] * network.num_layers)[: network.num_layers]


def _check_fields(network: TimeDiscriminator) -> None:
  """Raises UserError unless every field has a value that a network can be built from."""
  if network.variant not in BLOCKS:
    raise UserError(f"discriminator.variant is '{network.variant}'; choose one of {', '.join(BLOCKS)}.")
  if network.dtype not in layers.DTYPES:
    raise UserError(f"discriminator.dtype is '{network.dtype}'; choose one of {', '.join(layers.DTYPES)}.")
  if network.group_order not in GROUP_ORDERS:
    raise UserError(
      f"discriminator.group_order is '{network.group_order}'; choose one of {', '.join(GROUP_ORDERS)}."
    )
  least, most = NUM_LAYERS[network.variant]
  if not least <= network.num_layers <= most:
    raise UserError(
      f"discriminator.num_layers is {network.num_layers}; a '{network.variant}' discriminator has {least} to "
      f'{most}.'
    )
  if network.time_dim < 4 or network.time_dim % 2:
    raise UserError(f'discriminator.time_dim is {network.time_dim}; it must be even and at least 4.')
  if network.init_scale < 0:
    raise UserError(f'discriminator.init_scale is {network.init_scale}; it must be at least 0.')
  for field in ('channels', 'group_size'):
    if getattr(network, field) < 1:
      raise UserError(f'discriminator.{field} is {getattr(network, field)}; it must be at least 1.')
