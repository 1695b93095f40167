"""A transformer with long skips as the generator of a denoising diffusion GAN.

The backbone is U-ViT (Bao et al. 2023, 2209.12152): the time and the patches of the noisy state are tokens
of one sequence, and the blocks of the first half hand their outputs to those of the second, the last to the
first. In place of each block's learned layer norms are ones that the latent variable z of Xiao et al. 2022
(2112.07804) scales and shifts, so that z makes the denoising distribution multimodal as it does in the
convolutional generator. A 3x3 convolution smooths the borders of the patches.

Must not import diffusion, experiments, run, config or data.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Num

from vaediff.errors import UserError
from vaediff.models import layers
from vaediff.models.ncsnpp import fold_patches, unfold_patches
from vaediff.models.ncsnpp_blocks import LatentMapping
from vaediff.models.unet_blocks import Mlp
from vaediff.types import Latent

NORM_EPSILON = 1e-6
SIZES = {
  'tiny': {'dim': 320, 'depth': 10, 'num_heads': 5},
  'mid': {'dim': 448, 'depth': 10, 'num_heads': 7},
  'large': {'dim': 448, 'depth': 14, 'num_heads': 7},
}
"""Fields of `UVit` by the names of the published sizes, whose widths and depths were not published."""

Tokens = Float[Array, 'batch tokens dim']
Style = Float[Array, 'batch style']

position_init = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockOptions:
  """What all blocks of one network share: see `UVit`."""

  num_heads: int
  mlp_ratio: float
  remat: bool
  dtype: Any


def layer_norm(**options: Any) -> nn.LayerNorm:
  """Returns layer normalisation in float32; Flax's default, E[x^2] - E[x]^2, is lost to rounding."""
  return nn.LayerNorm(epsilon=NORM_EPSILON, dtype=jnp.float32, use_fast_variance=False, **options)


class ModulatedLayerNorm(nn.Module):
  """Layer normalisation (Ba et al. 2016, 1607.06450, eq. 4) whose gain and bias are linear in the style.

  At initialisation the gain is 1 and the bias 0, whatever the style. Statistics are float32.
  """

  @nn.compact
  def __call__(self, x: Tokens, style: Style) -> Tokens:
    """Returns gamma(style) x_normalised + beta(style)."""
    modulation = layers.dense(2 * x.shape[-1], name='modulation', dtype=jnp.float32, zero_init=True)(style)
    gain, bias = jnp.split(modulation[:, None, :], 2, axis=-1)
    h = layer_norm(use_scale=False, use_bias=False)(x)
    return ((1.0 + gain) * h + bias).astype(x.dtype)


class Block(nn.Module):
  """A transformer block, normalised before attention and before the MLP.

  Attributes:
    options: shared by all blocks.
  """

  options: BlockOptions

  @nn.compact
  def __call__(self, x: Tokens, style: Style, skip: Tokens | None = None) -> Tokens:
    """Returns the tokens for the next block; a skip is first joined to them by a linear map."""
    options, dim = self.options, x.shape[-1]
    batch, tokens, heads = x.shape[0], x.shape[1], options.num_heads
    if skip is not None:
      x = layers.dense(dim, name='join', dtype=options.dtype)(jnp.concatenate([x, skip], axis=-1))
    h = ModulatedLayerNorm(name='norm_1')(x, style)
    qkv = layers.dense(3 * dim, name='qkv', dtype=options.dtype, use_bias=False)(h)
    query, key, value = jnp.moveaxis(qkv.reshape(batch, tokens, 3, heads, dim // heads), 2, 0)
    h = layers.attention(query, key, value, scale=(dim // heads) ** -0.5)
    x = x + layers.dense(dim, name='out', dtype=options.dtype)(h.reshape(batch, tokens, dim))
    h = ModulatedLayerNorm(name='norm_2')(x, style)
    h = nn.gelu(layers.dense(round(options.mlp_ratio * dim), name='mlp_0', dtype=options.dtype)(h))
    return x + layers.dense(dim, name='mlp_1', dtype=options.dtype)(h)


class UVit(nn.Module):
  """A U-ViT conditional on t, z and optionally on an image.

  On 16 x 16 latents of 4 channels, with patch_size 2, latent_dim 50 and 4 mapping layers, the `SIZES` have

    tiny    18.70 M parameters, 0.98 GMAC per call   (published: 28.01 M, or 19.4 without a decoder)
    mid     34.32 M parameters, 1.90 GMAC per call   (43.32 or 34.7 M)
    large   46.61 M parameters, 2.60 GMAC per call   (56.17 or 47.5 M)

  Attributes:
    patch_size: side of a patch in pixels; divides the height and the width of x_t.
    dim: width of a token; even, at least 4.
    depth: blocks besides the middle one; even.
    num_heads: attention heads; divides `dim`.
    mlp_ratio: width of the MLPs' hidden layer over `dim`.
    latent_dim: size of z.
    num_mapping_layers: layers of the mapping network after its first.
    out_channels: channels of the output.
    bounded: the output goes through tanh.
    remat: recompute the blocks' activations in the backward pass instead of storing them.
    dtype: 'float32' or 'bfloat16', the type of the arithmetic. Parameters, the mapping network, layer norms,
      softmax, the last convolution and the output are float32.
    mapping_dim: width of the mapping network, whose output every block's norms read.

  Raises:
    UserError: a field has a value that is not allowed.
  """

  patch_size: int
  dim: int
  depth: int
  num_heads: int
  mlp_ratio: float
  latent_dim: int
  num_mapping_layers: int
  out_channels: int
  bounded: bool
  remat: bool
  dtype: str
  mapping_dim: int = 256

  def __post_init__(self):
    layers.check_dtype(self.dtype)
    _check_fields(self)
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    x_t: Float[Array, 'batch height width channels'],
    t: Num[Array, ' batch'],
    z: Latent,
    condition: Float[Array, 'batch height width condition'] | None = None,
    *,
    deterministic: bool = True,
  ) -> Float[Array, 'batch height width out']:
    """Returns x0_hat, float32; within [-1, 1] if `bounded`.

    Args:
      x_t: noisy state, always of the size and the channels that the network was initialised with.
      t: index of the step, 0 ... T - 1 or any other number; embedded as it is.
      z: latent variable, standard normal; only its direction matters.
      condition: concatenated to x_t along the channels.
      deterministic: has no effect; there is no dropout.

    Raises:
      UserError: the patches do not divide the image, or z or the condition does not fit.
    """
    del deterministic
    self._check_inputs(x_t, z, condition)
    dtype = jnp.dtype(self.dtype)
    style = LatentMapping(features=self.mapping_dim, num_layers=self.num_mapping_layers, name='mapping')(z)
    x = x_t if condition is None else jnp.concatenate([x_t, condition.astype(x_t.dtype)], axis=-1)
    patches = layers.dense(self.dim, name='patches', dtype=dtype)(fold_patches(x, self.patch_size))
    batch, rows, columns, _ = patches.shape
    waves = layers.sinusoidal_embedding(
      t.astype(jnp.float32), self.dim, sin_first=True, last_frequency_included=False
    )
    time = Mlp(features=self.dim, dtype=dtype, name='time_mlp')(waves)
    h = jnp.concatenate([time[:, None, :], patches.reshape(batch, rows * columns, self.dim)], axis=1)
    position = self.param('position', position_init, (1 + rows * columns, self.dim))
    h = self._blocks(h + position[None].astype(dtype), style)
    h = layer_norm(name='norm_out')(h[:, 1:]).astype(dtype)
    h = layers.dense(self.patch_size**2 * self.out_channels, name='pixels', dtype=dtype)(h)
    h = unfold_patches(h.reshape(batch, rows, columns, -1), self.patch_size)
    h = layers.conv3x3(self.out_channels, name='conv_out', dtype=jnp.float32)(h.astype(jnp.float32))
    return jnp.tanh(h) if self.bounded else h

  def _blocks(self, h: Tokens, style: Style) -> Tokens:
    """Returns the tokens after all blocks; each of the second half reads one skip, the last first."""
    options = BlockOptions(
      num_heads=self.num_heads, mlp_ratio=self.mlp_ratio, remat=self.remat, dtype=jnp.dtype(self.dtype)
    )
    block = nn.remat(Block) if self.remat else Block
    skips = []
    for i in range(self.depth // 2):
      h = block(options=options, name=f'in_{i}')(h, style)
      skips.append(h)
    h = block(options=options, name='middle')(h, style)
    for i, skip in enumerate(reversed(skips)):
      h = block(options=options, name=f'out_{i}')(h, style, skip)
    return h

  @nn.nowrap
  def _check_inputs(self, x_t: Array, z: Array, condition: Array | None) -> None:
    """Raises UserError unless the inputs fit the module and each other."""
    _, height, width, _ = x_t.shape
    if height % self.patch_size or width % self.patch_size:
      raise UserError(
        f'x_t is {height} x {width}, which model.patch_size {self.patch_size} does not divide; choose a '
        'patch size that divides both.'
      )
    if z.shape[1] != self.latent_dim:
      raise UserError(f'z has {z.shape[1]} numbers, but model.latent_dim is {self.latent_dim}.')
    if condition is not None and condition.shape[:3] != x_t.shape[:3]:
      raise UserError(
        f'The condition has shape {condition.shape}, x_t has {x_t.shape}; all but the channels must be equal.'
      )


def _check_fields(model: UVit) -> None:
  """Raises UserError unless the fields are in range and fit each other."""
  for field in ('patch_size', 'num_heads', 'latent_dim', 'mapping_dim', 'out_channels'):
    if getattr(model, field) < 1:
      raise UserError(f'model.{field} is {getattr(model, field)}; it must be at least 1.')
  if model.dim < 4 or model.dim % 2:
    raise UserError(f'model.dim is {model.dim}; it must be even and at least 4.')
  if model.dim % model.num_heads:
    raise UserError(f'model.num_heads is {model.num_heads}, which does not divide model.dim {model.dim}.')
  if model.depth < 0 or model.depth % 2:
    raise UserError(f'model.depth is {model.depth}; it must be even and at least 0: half in, half out.')
  if model.mlp_ratio * model.dim < 1:
    raise UserError(f'model.mlp_ratio is {model.mlp_ratio}; it must leave the MLPs at least one unit.')
  if model.num_mapping_layers < 0:
    raise UserError(f'model.num_mapping_layers is {model.num_mapping_layers}; it must be at least 0.')
