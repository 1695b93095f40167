"""The U-Net denoiser of DiffuseVAE (Pandey et al. 2022, 2201.00308), in its two published variants.

The network reads the noisy state x_t, the time t, and the values of its ports (`models.ports`), such as
the VAE's reconstruction, concatenated along the channels, and its latent code, added to the time
embedding. What its output means (x0, eps or v) is the caller's business.

Resolutions halve from level to level. A level has `num_res_blocks` residual blocks on the way down
and one more on the way up, each followed by attention at the chosen resolutions; between the two
ways are a residual, an attention and a residual block.

Must not import diffusion, experiments, run, config or data.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vaediff.models import layers, unet_sizes
from vaediff.models import ports as entering
from vaediff.models.text_attention import Texts
from vaediff.models.text_tower import Words
from vaediff.models.token_injection import Entering
from vaediff.models.unet_blocks import VARIANTS, BlockOptions, DownLevel, Middle, Mlp, UpLevel
from vaediff.types import Drop, Image, Params, Time, Values

# t in (0, 1] becomes the step index 0 ... 999 of the thousand-step schedule that the embedding was
# designed for, whatever the schedule in use.
TIME_STEPS = 1000


class UNet(nn.Module):
  """A U-Net for square maps, conditional on what its ports name.

  Attributes:
    variant: 'openai' or 'ddim'; see `unet_blocks.VARIANTS`.
    image_size: side of x_t in pixels; divisible by 2^(levels - 1).
    image_channels: channels of x_t and of the prediction.
    channels: base width; even, at least 4.
    channel_multipliers: width of each level over `channels`, highest resolution first; whole, or below 1 as
      the half with which ADM's network of 512 pixels begins.
    num_res_blocks: residual blocks per level on the way down.
    attention_resolutions: sides, in pixels, of the maps that get attention (not downsampling
      rates); the middle of the network, at the lowest resolution, always has it.
    num_heads: attention heads; divides the channels wherever there is attention.
    dropout: rate in [0, 1), on when `deterministic` is False.
    scale_shift_norm: the embedding scales and shifts group norms (AdaGN) instead of being added.
    ports: what it is conditioned on, and where that enters; see `models.ports`.
    remat: recompute the blocks' activations in the backward pass instead of storing them.
    learned_variance: the output has `image_channels` more, zero at first, that say where the variance of a
      step is between its two bounds (Nichol and Dhariwal 2021, 2102.09672).
    resblock_updown: residual blocks halve and double maps (ADM: Dhariwal and Nichol 2021, 2105.05233).
    head_channels: channels of each attention head, in place of `num_heads`; 0 = by `num_heads`.
    coordinates: the first map also reads where each pixel is: row and column, from -1 to 1, by a linear map
      (CoordConv: Liu et al. 2018, 1807.03247), so that a word such as "left" needs no path to an edge.
    dtype: 'float32' or 'bfloat16', the type of the arithmetic. Parameters, group norm statistics,
      softmax, the last convolution and the output are float32.

  Raises:
    UserError: the fields contradict each other.
  """

  variant: str
  image_size: int
  image_channels: int
  channels: int
  channel_multipliers: tuple[int | float, ...]
  num_res_blocks: int
  attention_resolutions: tuple[int, ...]
  num_heads: int
  dropout: float
  scale_shift_norm: bool
  remat: bool
  dtype: str
  ports: entering.Named = ()
  learned_variance: bool = False
  resblock_updown: bool = False
  head_channels: int = 0
  coordinates: bool = False

  def __post_init__(self):
    layers.check_dtype(self.dtype)
    unet_sizes.check(self)
    super().__post_init__()

  def __call__(
    self,
    x_t: Image,
    t: Time,
    values: Values = {},  # noqa: B006
    drop: Drop = {},  # noqa: B006
    residuals: Sequence[Array | None] | None = None,
    *,
    deterministic: bool = True,
  ) -> Float[Array, 'batch height width outputs']:
    """Returns the network's prediction, float32, unbounded; behind it the channels of a learned variance.

    Args:
      x_t: noisy state.
      t: time in (0, 1]; embedded as the step index 1000 t - 1.
      values: what it is conditioned on, one for each port.
      drop: by value: where True, the learned stand-in is read; values that are not named are kept.
      residuals: added to what `maps` returns, in its order, before the way up reads it; None = nothing.
      deterministic: dropout is off; otherwise the 'dropout' key is needed.

    Raises:
      ValueError: an input does not fit the module.
    """
    return self._run(x_t, t, values, drop, residuals=residuals, deterministic=deterministic)

  def features(
    self,
    x_t: Image,
    t: Time,
    values: Values = {},  # noqa: B006
    drop: Drop = {},  # noqa: B006
  ) -> list[Array]:
    """Returns the maps of the way down, one per level, and that of the middle; their type is `dtype`.

    A level's map is that of its last block, at the level's own resolution. Nothing of the way up is computed,
    and dropout is off. Arguments and errors are those of `__call__`.
    """
    return self._run(x_t, t, values, drop, until='features')

  def words(self, x_t: Image, t: Time, values: Values, drop: Drop = {}) -> dict[str, Words]:  # noqa: B006
    """Returns the tokens of the texts that it reads, by port; arguments and errors as `__call__`."""
    return self._run(x_t, t, values, drop, until='words')

  def maps(
    self,
    x_t: Image,
    t: Time,
    values: Values,
    drop: Drop,
    words: Mapping[str, Words],
    added: Array,
    *,
    deterministic: bool,
  ) -> list[Array]:
    """Returns all that the way up reads: the first map, those of the way down, last the middle's.

    The tokens of texts are given, as `words` returns them, of this network or another: it then has no tower.
    What is `added` joins the first map. The other arguments, and errors, are those of `__call__`.
    """
    run = self._run
    return run(x_t, t, values, drop, words=words, added=added, until='maps', deterministic=deterministic)

  @nn.compact
  def _run(
    self,
    x_t: Array,
    t: Array,
    values: Values,
    drop: Drop,
    *,
    deterministic: bool = True,
    until: str = '',
    residuals: Sequence[Array | None] | None = None,
    words: Mapping[str, Words] | None = None,
    added: Array | None = None,
  ) -> Any:
    """Returns what the method named by `until` does, or `__call__`; Flax wants one method."""
    expected = (self.image_size, self.image_size, self.image_channels)
    if x_t.shape[1:] != expected:
      raise ValueError(f'The U-Net reads x_t of shape {expected}, got {x_t.shape[1:]}.')
    entering.check(self.ports, values, drop)
    variant = VARIANTS[self.variant]
    dtype = jnp.dtype(self.dtype)
    options = BlockOptions(
      variant=variant,
      num_heads=self.num_heads,
      head_channels=self.head_channels,
      dropout=self.dropout,
      deterministic=deterministic,
      scale_shift_norm=self.scale_shift_norm,
      resblock_updown=self.resblock_updown,
      remat=self.remat,
      dtype=dtype,
    )

    def waves(position: Array) -> Array:
      return layers.sinusoidal_embedding(
        position,
        self.channels,
        sin_first=variant.sin_first,
        last_frequency_included=variant.last_frequency_included,
      )

    emb = Mlp(features=4 * self.channels, dtype=dtype, name='time_mlp')(waves(TIME_STEPS * t - 1.0))
    emb = entering.embed(self, self.ports, emb, values, drop, waves, dtype)
    texts = entering.texts(self, self.ports, values, drop, dtype, words)
    if until == 'words':
      return {text.name: text.words for text in texts}
    emb = entering.with_texts(emb, texts, dtype)
    x = entering.join(self, self.ports, x_t, values, drop)
    h = self._first(x, dtype)
    inside = entering.inside(self, self.ports, values, drop)
    skips, features = self._down(h if added is None else h + added, emb, options, inside, texts)
    if until == 'features':
      return features
    maps = with_residuals([*skips, features[-1]], residuals)
    if until == 'maps':
      return maps
    h = self._up(maps[-1], maps[:-1], emb, options, inside['decoder'], texts)
    h = nn.silu(layers.GroupNorm(epsilon=variant.norm_epsilon, name='norm_out')(h))
    return self._conv_out(variant.zero_init)(h.astype(jnp.float32))

  def _first(self, x: Array, dtype: Any) -> Array:
    """Returns the first map, of all that is read beside each other."""
    # A first level that is narrower than the base width begins so; no wider one does.
    h = layers.conv3x3(min(self.channels, unet_sizes.level_widths(self)[0]), name='conv_in', dtype=dtype)(x)
    if not self.coordinates:
      return h
    kernel = self.param('coordinates', layers.uniform_fan_in, (2, h.shape[-1]))
    return h + (layers.coordinates(*h.shape[1:3]) @ kernel)[None].astype(dtype)

  def _conv_out(self, zero_init: bool) -> nn.Conv:
    """Returns the last convolution, whose channels of the variance start at zero in any case."""
    outputs = 2 * self.image_channels if self.learned_variance else self.image_channels
    if zero_init or not self.learned_variance:
      return layers.conv3x3(outputs, name='conv_out', dtype=jnp.float32, zero_init=zero_init)
    init = _zero_behind(self.image_channels)
    return nn.Conv(outputs, kernel_size=(3, 3), kernel_init=init, dtype=jnp.float32, name='conv_out')

  def _down(
    self, h: Array, emb: Array, options: BlockOptions, inside: Mapping[str, Entering], texts: Texts
  ) -> tuple[list[Array], list[Array]]:
    """Returns the maps that the way up reads back, and those of `features`."""
    sizes, widths = unet_sizes.level_sizes(self), unet_sizes.level_widths(self)
    bottom = len(sizes) - 1
    skips, features = [h], []
    for level, width in enumerate(widths):
      outputs = DownLevel(
        features=width,
        num_blocks=self.num_res_blocks,
        attend=sizes[level] in self.attention_resolutions,
        downsample=level < bottom,
        options=options,
        name=f'down_{level}',
      )(skips[-1], emb, inside['encoder'] if level == bottom else (), texts)
      features.append(outputs[self.num_res_blocks - 1])
      skips += outputs
    features.append(Middle(options=options, name='middle')(skips[-1], emb, inside['middle'], texts))
    return skips, features

  def _up(
    self,
    h: Array,
    skips: list[Array],
    emb: Array,
    options: BlockOptions,
    tokens: Entering,
    texts: Texts,
  ) -> Array:
    """Returns the map after all levels of the way up, at full resolution; tokens enter at the first."""
    sizes, widths = unet_sizes.level_sizes(self), unet_sizes.level_widths(self)
    for level in reversed(range(len(sizes))):
      # A level reads back what it wrote, and the map that entered it.
      first = len(skips) - self.num_res_blocks - 1
      h = UpLevel(
        features=widths[level],
        attend=sizes[level] in self.attention_resolutions,
        upsample=level > 0,
        options=options,
        name=f'up_{level}',
      )(h, skips[first:], emb, tokens if level == len(sizes) - 1 else (), texts)
      skips = skips[:first]
    return h


def with_residuals(maps: list[Array], residuals: Sequence[Array | None] | None) -> list[Array]:
  """Returns maps with what is added to each; None = nothing is.

  Raises:
    ValueError: there are not as many.
  """
  if residuals is None:
    return maps
  if len(residuals) != len(maps):
    raise ValueError(f'The U-Net has {len(maps)} maps that residuals are added to, got {len(residuals)}.')
  return [x if one is None else x + one for x, one in zip(maps, residuals, strict=True)]


def convert_formulation(params: Params, *, to: int, image_channels: int) -> Params:
  """Returns the parameters of the same denoiser under DiffuseVAE's other formulation.

  Formulation 2 reads x_t = y_t + x0_vae where Formulation 1 reads y_t, and both read x0_vae
  (Pandey et al. 2022, 2201.00308, sections on the two formulations). The first convolution is
  linear, W1 (y_t + x0_vae) + W2 x0_vae = W1 y_t + (W1 + W2) x0_vae, so that the kernel [W1, W2] on
  [x_t, x0_vae] equals [W1, W1 + W2] on [y_t, x0_vae]. There and back is the identity up to the
  rounding of one addition. For an example whose condition is dropped it holds if the shift, too,
  is the learned stand-in.

  Args:
    params: of a `UNet` that concatenates one image; not changed.
    to: the formulation wanted, 1 or 2; `params` are taken to be of the other.
    image_channels: channels of x_t.

  Raises:
    ValueError: `to` is neither 1 nor 2, or the first convolution does not read two images.
  """
  if to not in (1, 2):
    raise ValueError(f'There are formulations 1 and 2, not {to}.')
  kernel = params['conv_in']['kernel']
  if kernel.shape[2] != 2 * image_channels:
    raise ValueError(
      f'The first convolution reads {kernel.shape[2]} channels; [x_t, x0_vae] has '
      f'{2 * image_channels}. Only a network that concatenates one image can be converted.'
    )
  on_state, on_image = kernel[:, :, :image_channels], kernel[:, :, image_channels:]
  on_image = on_image + on_state if to == 1 else on_image - on_state
  kernel = jnp.concatenate([on_state, on_image], axis=2)
  return {**params, 'conv_in': {**params['conv_in'], 'kernel': kernel}}


def prediction_alone(params: Params, like: Params) -> Params:
  """Returns the parameters of a denoiser without its learned variance, where `like` has none.

  The first half of the last convolution's channels is the prediction. `params` are not changed, and returned
  as they are if the two have as many channels.
  """
  if 'conv_out' not in params or params['conv_out']['bias'].shape == like['conv_out']['bias'].shape:
    return params
  half = params['conv_out']['bias'].shape[0] // 2
  return {**params, 'conv_out': {name: leaf[..., :half] for name, leaf in params['conv_out'].items()}}


def _zero_behind(channels: int) -> nn.initializers.Initializer:
  """Returns the usual initialiser of the first output channels, and zeros behind them."""

  def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    kernel = layers.uniform_fan_in(key, (*shape[:-1], channels), dtype)
    return jnp.concatenate([kernel, jnp.zeros((*shape[:-1], shape[-1] - channels), dtype)], axis=-1)

  return init
