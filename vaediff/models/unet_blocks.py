"""The parts of the U-Net: what sets its two published variants apart, its blocks and its levels.

Must not import diffusion, experiments, run, config or data.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vaediff.models import layers, text_attention, token_injection
from vaediff.models.text_attention import Texts
from vaediff.models.token_injection import Entering


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
  """The choices in which the published U-Nets differ.

  Attributes:
    norm_epsilon: of every group norm.
    down_padding: zeros (before, after) along height and width of the stride-2 convolution.
    zero_init: the last layer of every block, and of the network, starts at zero.
    sin_first: order of the time embedding's halves.
    last_frequency_included: spacing of its frequencies.
    fused_qkv: one linear map gives [query, key, value] head after head, instead of three maps.
    scale_by_all_channels: attention is scaled by C^-1/2 with the C of all heads together. For one
      head this is the usual scale; for more it makes a flatter softmax than C_head^-1/2.
  """

  norm_epsilon: float
  down_padding: tuple[tuple[int, int], tuple[int, int]]
  zero_init: bool
  sin_first: bool
  last_frequency_included: bool
  fused_qkv: bool
  scale_by_all_channels: bool


VARIANTS = {
  # Nichol and Dhariwal 2021 (2102.09672): DiffuseVAE's network.
  'openai': Variant(
    norm_epsilon=1e-5,
    down_padding=((1, 1), (1, 1)),
    zero_init=True,
    sin_first=False,
    last_frequency_included=False,
    fused_qkv=True,
    scale_by_all_channels=False,
  ),
  # Ho et al. 2020 (2006.11239) as reused by Song et al. 2021 (2010.02502): DiffuseVAE's CIFAR-10
  # figures. Its attention had one head; DiffuseVAE gave it several and kept the scale of one.
  'ddim': Variant(
    norm_epsilon=1e-6,
    down_padding=((0, 1), (0, 1)),
    zero_init=False,
    sin_first=True,
    last_frequency_included=True,
    fused_qkv=False,
    scale_by_all_channels=True,
  ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockOptions:
  """What all blocks of one network share.

  Attributes:
    variant: one of `VARIANTS`.
    num_heads: of every attention block, where head_channels is 0.
    head_channels: channels of each head; 0 = as many as `num_heads` leaves.
    dropout: rate inside residual blocks, in [0, 1).
    deterministic: dropout is off.
    scale_shift_norm: the embedding scales and shifts the second group norm instead of being added.
    resblock_updown: residual blocks halve and double maps, instead of convolutions.
    remat: recompute each block's activations in the backward pass instead of storing them.
    dtype: compute type.
  """

  variant: Variant
  num_heads: int
  dropout: float
  deterministic: bool
  scale_shift_norm: bool
  remat: bool
  dtype: Any
  head_channels: int = 0
  resblock_updown: bool = False

  def heads(self, channels: int) -> int:
    """Returns the attention heads of a map with so many channels."""
    return channels // self.head_channels if self.head_channels else self.num_heads


RESIZE = {
  '': lambda x: x,
  'halve': lambda x: layers.average_pool(x, 2),
  'double': lambda x: layers.upsample_nearest(x, 2),
}
"""What a residual block does to the sides of its map."""


class Mlp(nn.Module):
  """Linear, SiLU, linear; embeds the time, and z.

  Attributes:
    features: width of the hidden layer and of the output.
    dtype: compute type.
    zero_init: the output is zero at first.
  """

  features: int
  dtype: Any
  zero_init: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, 'batch inputs']) -> Float[Array, 'batch features']:
    """Returns the embedding of x."""
    h = layers.dense(self.features, name='dense_0', dtype=self.dtype)(x)
    last = layers.dense(self.features, name='dense_1', dtype=self.dtype, zero_init=self.zero_init)
    return last(nn.silu(h))


class ResidualBlock(nn.Module):
  """Two normalised convolutions with the embedding between them.

  Attributes:
    features: channels of the output; a 1x1 convolution carries the input when it has others.
    options: shared by all blocks.
    resize: of `RESIZE`, what is done to the map before the first convolution, and to the input that is
      carried past both (Dhariwal and Nichol 2021, 2105.05233).
  """

  features: int
  options: BlockOptions
  resize: str = ''

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'batch height width channels'],
    emb: Float[Array, 'batch embedding'],
    added: Float[Array, 'batch height width features'] | None = None,
  ) -> Float[Array, 'batch height_out width_out features']:
    """Returns x plus what the block adds to it; `added` joins what the first convolution gives."""
    options, dtype = self.options, self.options.dtype
    epsilon = options.variant.norm_epsilon
    h = nn.silu(layers.GroupNorm(epsilon=epsilon, name='norm_1')(x))
    h, x = RESIZE[self.resize](h), RESIZE[self.resize](x)
    h = layers.conv3x3(self.features, name='conv_1', dtype=dtype)(h)
    h = h if added is None else h + added
    width = 2 * self.features if options.scale_shift_norm else self.features
    emb = layers.dense(width, name='emb', dtype=dtype)(nn.silu(emb))[:, None, None, :]
    norm_2 = layers.GroupNorm(epsilon=epsilon, name='norm_2')
    if options.scale_shift_norm:
      scale, shift = jnp.split(emb, 2, axis=-1)
      h = norm_2(h) * (1.0 + scale) + shift
    else:
      h = norm_2(h + emb)
    dropout = nn.Dropout(options.dropout, deterministic=options.deterministic, name='dropout')
    h = layers.conv3x3(self.features, name='conv_2', dtype=dtype, zero_init=options.variant.zero_init)(
      dropout(nn.silu(h))
    )
    if x.shape[-1] != self.features:
      x = layers.dense(self.features, name='skip', dtype=dtype)(x)
    return x + h


class AttentionBlock(nn.Module):
  """Self-attention between all positions of a map.

  Attributes:
    options: shared by all blocks.
  """

  options: BlockOptions

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch height width channels']
  ) -> Float[Array, 'batch height width channels']:
    """Returns x plus what its positions gather from each other."""
    options, variant = self.options, self.options.variant
    batch, height, width, channels = x.shape
    heads = options.heads(channels)
    h = layers.GroupNorm(epsilon=variant.norm_epsilon, name='norm')(x)
    h = h.reshape(batch, height * width, channels)
    if variant.fused_qkv:
      qkv = layers.dense(3 * channels, name='qkv', dtype=options.dtype)(h)
      qkv = qkv.reshape(batch, height * width, heads, 3, channels // heads)
      query, key, value = (qkv[:, :, :, i, :] for i in range(3))
    else:
      query, key, value = (
        layers.dense(channels, name=name, dtype=options.dtype)(h).reshape(
          batch, height * width, heads, channels // heads
        )
        for name in ('query', 'key', 'value')
      )
    scaled_channels = channels if variant.scale_by_all_channels else channels // heads
    h = layers.attention(query, key, value, scale=scaled_channels**-0.5)
    h = layers.dense(channels, name='out', dtype=options.dtype, zero_init=variant.zero_init)(
      h.reshape(batch, height, width, channels)
    )
    return x + h


def residual_block(features: int, options: BlockOptions, name: str, resize: str = '') -> nn.Module:
  """Returns a residual block, rematerialised if asked for; parameters are the same either way."""
  block = nn.remat(ResidualBlock) if options.remat else ResidualBlock
  return block(features=features, options=options, resize=resize, name=name)


def attention_block(options: BlockOptions, name: str) -> nn.Module:
  """Returns an attention block, rematerialised if asked for."""
  block = nn.remat(AttentionBlock) if options.remat else AttentionBlock
  return block(options=options, name=name)


def attended(texts: Texts, options: BlockOptions, name: str, x: Array) -> Array:
  """Returns a map after attention to itself and to texts; call it within the level's compact method."""
  kept = nn.remat if options.remat else lambda block: block
  heads, instead = options.heads(x.shape[-1]), text_attention.in_place(texts)
  if instead:
    block = kept(text_attention.SpatialTransformer)
    x = block(heads=heads, dtype=options.dtype, name=f'{name}_{instead.name}')(x, *instead.words)
  else:
    x = attention_block(options, name)(x)
  for text in texts:
    if text.how == 'attention':
      block = kept(text_attention.TextAttention)
      x = block(
        heads=heads, norm_epsilon=options.variant.norm_epsilon, dtype=options.dtype,
        name=f'{name}_{text.name}',
      )(x, *text.words)  # fmt: skip
  return x


def block_with(
  entering: Entering, features: int, options: BlockOptions, name: str, x: Array, emb: Array
) -> Array:
  """Returns what a residual block makes of a map, and of the maps of tokens that enter there."""
  added = token_injection.added(features, name, entering, options.dtype)
  inputs = (token_injection.concatenated(x, entering), emb)
  h = residual_block(features, options, name)(*inputs, *([] if added is None else [added]))
  for tokens in entering:
    if tokens.how == 'attention':
      attention = (
        nn.remat(token_injection.TokenAttention) if options.remat else token_injection.TokenAttention
      )
      h = attention(
        heads=options.heads(features), norm_epsilon=options.variant.norm_epsilon, dtype=options.dtype,
        name=f'{name}_{tokens.name}',
      )(h, tokens.map)  # fmt: skip
  return h


class DownLevel(nn.Module):
  """The blocks of one resolution on the way down.

  Attributes:
    features: channels of every block.
    num_blocks: residual blocks.
    attend: an attention block follows each of them.
    downsample: a stride-2 convolution, or a residual block that halves, ends the level.
    options: shared by all blocks.
  """

  features: int
  num_blocks: int
  attend: bool
  downsample: bool
  options: BlockOptions

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'batch height width channels'],
    emb: Float[Array, 'batch embedding'],
    entering: Entering = (),
    texts: Texts = (),
  ) -> list[Array]:
    """Returns the output of each block, then of what halves; the last is the level's output."""
    outputs = []
    for i in range(self.num_blocks):
      x = block_with(entering, self.features, self.options, f'res_{i}', x, emb)
      if self.attend:
        x = attended(texts, self.options, f'attn_{i}', x)
      outputs.append(x)
    if self.downsample and self.options.resblock_updown:
      outputs.append(residual_block(self.features, self.options, 'down', resize='halve')(x, emb))
    elif self.downsample:
      down = layers.conv3x3(
        self.features,
        name='down',
        dtype=self.options.dtype,
        strides=2,
        padding=self.options.variant.down_padding,
      )
      outputs.append(down(x))
    return outputs


class Middle(nn.Module):
  """Residual block, attention, residual block at the lowest resolution.

  Attributes:
    options: shared by all blocks.
  """

  options: BlockOptions

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'batch height width channels'],
    emb: Float[Array, 'batch embedding'],
    entering: Entering = (),
    texts: Texts = (),
  ) -> Float[Array, 'batch height width channels']:
    """Returns the map that starts the way up; tokens enter at its first block."""
    x = block_with(entering, x.shape[-1], self.options, 'res_0', x, emb)
    x = attended(texts, self.options, 'attn', x)
    return residual_block(x.shape[-1], self.options, 'res_1')(x, emb)


class UpLevel(nn.Module):
  """The blocks of one resolution on the way up.

  Attributes:
    features: channels of every block.
    attend: an attention block follows each residual block.
    upsample: nearest upsampling by 2 and a convolution, or a residual block that doubles, end the level.
    options: shared by all blocks.
  """

  features: int
  attend: bool
  upsample: bool
  options: BlockOptions

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'batch height width channels'],
    skips: list[Array],
    emb: Float[Array, 'batch embedding'],
    entering: Entering = (),
    texts: Texts = (),
  ) -> Float[Array, 'batch height_out width_out features']:
    """Returns the level's output; each block reads one skip, the last of the list first."""
    for i, skip in enumerate(reversed(skips)):
      x = jnp.concatenate([x, skip], axis=-1)
      x = block_with(entering, self.features, self.options, f'res_{i}', x, emb)
      if self.attend:
        x = attended(texts, self.options, f'attn_{i}', x)
    if self.upsample and self.options.resblock_updown:
      return residual_block(self.features, self.options, 'up', resize='double')(x, emb)
    if self.upsample:
      x = layers.conv3x3(self.features, name='up', dtype=self.options.dtype)(layers.upsample_nearest(x, 2))
    return x
