"""A copy of a U-Net's way down and middle that reads an image to follow: ControlNet.

The hint, a control image in [0, 1], is encoded to the width of the first map and joins it. Each map that the
way up of the U-Net would read passes a 1x1 convolution that is zero at first; what comes out is added to the
U-Net's own map (Zhang et al. 2023, arXiv:2302.05543, section 3):

    h_0 = first(x_t) + hint,    residual_i = zero_i(h_i)

so that at first nothing changes. The copy has the U-Net's parameters by the same names, below `unet`; the
tokens of texts are made by the U-Net itself and handed over. Parameters: `unet`, `hint`, `zero_<i>`.

Must not import diffusion, experiments, run, config or data.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vaediff.errors import UserError
from vaediff.models import layers, unet_sizes
from vaediff.models.text_tower import Words
from vaediff.models.unet import UNet
from vaediff.types import Drop, Image, Params, Time, Values

COPY, HINT = 'unet', 'hint'
"""Of its parameters: those of the copy, and of the hint's encoder."""
UP = ('up_', 'norm_out', 'conv_out')
"""How the parts of a U-Net begin that a copy lacks: its way up."""


class HintEncoder(nn.Module):
  """3x3 convolutions, each with a SiLU behind it, and a last one that is zero at first.

  Attributes:
    channels: of each but the last.
    strides: of the same.
    features: channels of the output.
    dtype: compute type.
  """

  channels: tuple[int, ...]
  strides: tuple[int, ...]
  features: int
  dtype: Any

  @nn.compact
  def __call__(self, x: Image) -> Float[Array, 'batch height_out width_out features']:
    """Returns what joins the first map."""
    # as its strides are: one zero before and one behind, whatever the side
    padding = ((1, 1), (1, 1))
    for number, (width, stride) in enumerate(zip(self.channels, self.strides, strict=True)):
      conv = layers.conv3x3(width, name=f'conv_{number}', dtype=self.dtype, strides=stride, padding=padding)
      x = nn.silu(conv(x))
    return layers.conv3x3(self.features, name='out', dtype=self.dtype, zero_init=True)(x)


class ControlNet(nn.Module):
  """What is added to the maps that a U-Net's way up reads.

  Attributes:
    unet: the network that is copied: its fields, without parameters.
    hint_channels: see `HintEncoder`.
    hint_strides: as many; the product is the sides of the control image over those of x_t.
  """

  unet: UNet
  hint_channels: tuple[int, ...]
  hint_strides: tuple[int, ...]

  @nn.compact
  def __call__(
    self,
    x_t: Image,
    t: Time,
    values: Values,
    hint: Float[Array, 'batch hint_height hint_width hint_channels'],
    drop: Drop = {},  # noqa: B006
    words: Mapping[str, Words] = {},  # noqa: B006
    *,
    deterministic: bool = True,
  ) -> list[Array]:
    """Returns the residuals, in the order of `UNet.maps`; the middle's is the last.

    Args:
      x_t: what the U-Net reads, and so are t, values and drop.
      t: time in (0, 1].
      values: by port.
      hint: the control image, in [0, 1].
      drop: by value.
      words: `UNet.words` of the network that the residuals are for.
      deterministic: dropout is off.

    Raises:
      ValueError: an input does not fit the module.
    """
    dtype = jnp.dtype(self.unet.dtype)
    first = min(self.unet.channels, unet_sizes.level_widths(self.unet)[0])
    encoder = HintEncoder(self.hint_channels, self.hint_strides, first, dtype, name=HINT)
    maps = self.unet.maps(x_t, t, values, drop, words, encoder(hint), deterministic=deterministic)
    return [
      layers.dense(x.shape[-1], name=f'zero_{number}', dtype=dtype, zero_init=True)(x)
      for number, x in enumerate(maps)
    ]


def strides_of(factor: int, num_layers: int, chosen: tuple[int, ...] = ()) -> tuple[int, ...]:
  """Returns the strides of a hint's encoder that make its sides `factor` times smaller.

  Where none are chosen the last convolutions halve, as many as are needed.

  Raises:
    UserError: they do not fit: names the fields of the config.
  """
  halvings = factor.bit_length() - 1
  if chosen:
    product = 1
    for stride in chosen:
      product *= stride
    if len(chosen) != num_layers or product != factor:
      raise UserError(
        f'hint.strides is {chosen}: it must have as many numbers as hint.channels, {num_layers}, and their '
        f'product must be {factor}, the sides of the control image over those of the maps that are diffused; '
        'or () = by itself'
      )
    return chosen
  if 2**halvings != factor or halvings > num_layers:
    raise UserError(
      f'hint.channels has {num_layers} convolutions, which cannot halve a control image to 1/{factor} of its '
      'sides, those of the maps that are diffused; give at least '
      f'{max(halvings, 1)}, as (16, 16, 32, 32, 96, 96, 256) with hint.strides = (1, 1, 2, 1, 2, 1, 2)'
    )
  return (1,) * (num_layers - halvings) + (2,) * halvings


def copied(params: Params, base: Params) -> Params:
  """Returns the parameters of a ControlNet whose copy has those of the U-Net `base`."""
  return {**params, COPY: {name: base[name] for name in params[COPY]}}


def moved(params: Params, base: Params, tuned: Params) -> Params:
  """Returns the parameters of a ControlNet for a U-Net that its own was fine-tuned to.

  control + (tuned - base), of every leaf of the copy; the hint's encoder and the zero convolutions stay.
  """
  names = params[COPY].keys()
  before, after = ({name: network[name] for name in names} for network in (base, tuned))
  return {**params, COPY: jax.tree.map(lambda c, t, b: c + (t - b), params[COPY], after, before)}


def is_up(name: str) -> bool:
  """Returns whether a part of a U-Net's parameters, by its top name, belongs to the way up."""
  return name.startswith(UP)
