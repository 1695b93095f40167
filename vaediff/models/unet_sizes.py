"""The sides and widths of a U-Net's maps, and what its fields may be.

Must not import diffusion, experiments, run, config or data.
"""

from typing import Any

from vaediff.errors import UserError
from vaediff.models.token_injection import POSITIONS
from vaediff.models.unet_blocks import VARIANTS


def level_sizes(unet: Any) -> list[int]:
  """Returns the side of the map at each level, in pixels."""
  return [unet.image_size >> level for level in range(len(unet.channel_multipliers))]


def level_widths(unet: Any) -> list[int]:
  """Returns the channels of the map at each level."""
  return [int(multiplier * unet.channels) for multiplier in unet.channel_multipliers]


def map_sides(unet: Any) -> tuple[int, ...]:
  """Returns the sides of what `UNet.maps` returns, in pixels, in its order."""
  sizes = level_sizes(unet)
  found = [sizes[0]]
  for level, size in enumerate(sizes):
    found += [size] * unet.num_res_blocks + sizes[level + 1 : level + 2]
  return (*found, sizes[-1])


def check(unet: Any) -> None:
  """Raises an error where fields of a `unet.UNet` contradict each other; see there."""
  _check_shape(unet)
  _check_attention(unet)
  _check_ports(unet)


def _check_shape(unet: Any) -> None:
  """Raises UserError unless the variant exists and the image can be halved from level to level."""
  if unet.variant not in VARIANTS:
    raise UserError(f"model.variant is '{unet.variant}'; choose one of {', '.join(VARIANTS)}.")
  if unet.channels < 4 or unet.channels % 2:
    raise UserError(f'model.channels is {unet.channels}; it must be even and at least 4.')
  if not unet.channel_multipliers:
    raise UserError('model.channel_multipliers is empty; give one multiplier per level.')
  if not 0.0 <= unet.dropout < 1.0:
    raise UserError(f'model.dropout is {unet.dropout}; it must be in [0, 1).')
  for multiplier in unet.channel_multipliers:
    if multiplier * unet.channels != int(multiplier * unet.channels) or not multiplier * unet.channels >= 4:
      raise UserError(
        f'model.channel_multipliers has {multiplier}, which makes {multiplier * unet.channels} channels of '
        f'model.channels = {unet.channels}; they must be a whole number, at least 4.'
      )
  factor = 2 ** (len(unet.channel_multipliers) - 1)
  below = unet.image_size // factor * factor
  if below != unet.image_size or below == 0:
    nearest = ' or '.join(str(size) for size in (below, below + factor) if size > 0)
    raise UserError(
      f'image_size is {unet.image_size}, but {len(unet.channel_multipliers)} levels '
      f'(model.channel_multipliers) need a multiple of {factor}; nearest: {nearest}.'
    )


def _check_ports(unet: Any) -> None:
  """Raises an error unless maps have the sides of what they join: ValueError beside x_t, UserError inside."""
  sides, bottom = (unet.image_size, unet.image_size), level_sizes(unet)[-1]
  instead = [name for name, port in unet.ports if port.how == 'transformer']
  if len(instead) > 1:
    raise UserError(
      f"{' and '.join(instead)} have how = 'transformer', which takes the place of attention, and is one: "
      "use how = 'attention' for the others"
    )
  for name, port in unet.ports:
    if port.enters == 'concat' and port.shape[:2] != sides:
      raise ValueError(f'{name} has sides {port.shape[:2]}, x_t has {sides}; they must be equal.')
    if port.enters not in POSITIONS or port.how == 'attention' or port.shape[:2] == (bottom, bottom):
      continue
    height, width, _ = port.shape
    factor = unet.image_size // height
    fits = height == width and factor * height == unet.image_size and not factor & (factor - 1)
    advice = f'take log2 f + 1 = {factor.bit_length()} levels for f = {factor}, or' if fits else 'use'
    raise UserError(
      f'{name} has a grid of {height} x {width}, but the bottom level of the U-Net has {bottom} x {bottom}: '
      f"model.channel_multipliers has {len(unet.channel_multipliers)} levels; {advice} how = 'attention', "
      'whose grid is free.'
    )


def _check_attention(unet: Any) -> None:
  """Raises UserError unless every attention resolution occurs and the heads divide its channels."""
  sizes = level_sizes(unet)
  for resolution in unet.attention_resolutions:
    if resolution not in sizes:
      raise UserError(
        f'model.attention_resolutions names {resolution}, which never occurs; the maps have '
        f'sides {", ".join(map(str, sizes))}. These are resolutions, not downsampling rates.'
      )
  for size, width in zip(sizes, level_widths(unet), strict=True):
    attends = size in unet.attention_resolutions or size == sizes[-1]
    if unet.head_channels < 0 or (unet.head_channels and attends and width % unet.head_channels):
      raise UserError(
        f'model.head_channels is {unet.head_channels}, which does not divide the {width} channels of the '
        f'attention at resolution {size}; 0 leaves it to model.num_heads.'
      )
    if unet.head_channels:
      continue
    if unet.num_heads < 1 or (attends and width % unet.num_heads):
      raise UserError(
        f'model.num_heads is {unet.num_heads}, which does not divide the {width} channels of the '
        f'attention at resolution {size}.'
      )
