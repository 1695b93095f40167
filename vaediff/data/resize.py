"""From an image of any size to the square the model reads: crop, then resize. On the host, no jax.

PIL's filters are antialiased: the kernel widens with the scale when shrinking. Without that, images
that look alike differ in FID (Parmar et al., On Aliased Resizing, arXiv:2104.11222).
"""

import ml_collections
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vaediff.errors import UserError

FILTERS = {
  'nearest': Image.Resampling.NEAREST,
  'bilinear': Image.Resampling.BILINEAR,
  'bicubic': Image.Resampling.BICUBIC,
  'lanczos': Image.Resampling.LANCZOS,
  'box': Image.Resampling.BOX,
}
SQUASHES = {f'squash_{name}': name for name in FILTERS}
"""Resize both sides by the filter, whatever their lengths: what is not square is distorted."""
CROPS = ('none', 'center')
RESIZES = ('none', 'pad', *FILTERS, *SQUASHES)
CHANNELS = (1, 3)


def image_shape(data: ml_collections.ConfigDict) -> tuple[int, int, int]:
  """Returns (height, width, channels) of the images of a section `data`; they are square."""
  return data.image_size, data.image_size, data.channels


def fit(
  image: UInt8[np.ndarray, 'height width channels'], data: ml_collections.ConfigDict
) -> UInt8[np.ndarray, 'size size channels']:
  """Returns the image cropped and resized to `data.image_size`, with `data.channels` channels.

  Args:
    image: as stored.
    data: `crop` and `crop_size` (0 = the shorter side) choose a centred square; `resize` is 'none'
      (the size must fit already), 'pad' (black, evenly; an odd pixel goes right and down), one of PIL's
      filters (for squares), or 'squash_' and a filter (for any sides: the image is distorted).

  Raises:
    UserError: the image has other channels, is not square, or does not fit without another setting.
  """
  if image.shape[-1] != data.channels:
    raise UserError(
      f'the image has {image.shape[-1]} channels, but data.channels={data.channels}: {_mend(image)}'
    )
  if data.crop == 'center':
    image = center_crop(image, data.crop_size)
  if data.resize == 'pad':
    return pad(image, data.image_size)
  height, width, _ = image.shape
  if height == width == data.image_size:
    return image
  if data.resize == 'none':
    raise UserError(
      f'the image is {width}x{height} (width x height) after data.crop={data.crop!r}, but'
      f" data.image_size={data.image_size} and data.resize='none': set data.resize to one of"
      f' {RESIZES[1:]}, or data.image_size to the size of the images'
    )
  if data.resize in SQUASHES:
    return resize(image, data.image_size, SQUASHES[data.resize])
  if height != width:
    raise UserError(
      f'the image is {width}x{height} (width x height), not square, and data.resize='
      f"{data.resize!r} is for squares: set data.crop='center', or to distort it"
      f" data.resize='squash_{data.resize}'"
    )
  return resize(image, data.image_size, data.resize)


def _mend(image: np.ndarray) -> str:
  """Returns what to do about an image of other channels; it is accepted after that."""
  channels = image.shape[-1]
  if channels in CHANNELS:
    return f'set data.channels={channels}'
  return f'images have {" or ".join(map(str, CHANNELS))}; store them with one of these numbers of channels'


def center_crop(
  image: UInt8[np.ndarray, 'height width channels'], crop_size: int
) -> UInt8[np.ndarray, 'size size channels']:
  """Returns the central square of side `crop_size` (0 = the shorter side).

  Raises:
    UserError: `crop_size` is larger than the image.
  """
  height, width, _ = image.shape
  size = crop_size or min(height, width)
  if size > min(height, width):
    raise UserError(
      f'data.crop_size={size} is larger than an image of {width}x{height} (width x height): use at'
      f' most {min(height, width)}, or 0 for the shorter side'
    )
  top, left = (height - size) // 2, (width - size) // 2
  return image[top : top + size, left : left + size]


def pad(
  image: UInt8[np.ndarray, 'height width channels'], size: int
) -> UInt8[np.ndarray, 'size size channels']:
  """Returns the image in the middle of a black square of side `size`.

  Raises:
    UserError: the image is larger than the square.
  """
  height, width, channels = image.shape
  if max(height, width) > size:
    raise UserError(
      f'the image is {width}x{height} (width x height), larger than data.image_size={size}, and'
      f" data.resize='pad' only enlarges: set data.resize to one of {tuple(FILTERS)}"
    )
  top, left = (size - height) // 2, (size - width) // 2
  square = np.zeros((size, size, channels), np.uint8)
  square[top : top + height, left : left + width] = image
  return square


def resize(
  image: UInt8[np.ndarray, 'height width channels'], size: int, name: str
) -> UInt8[np.ndarray, 'size size channels']:
  """Returns the image resampled to a square by PIL's filter `name`, antialiased when shrinking."""
  grey = image.shape[-1] == 1
  picture = Image.fromarray(image[..., 0] if grey else np.ascontiguousarray(image))
  resized = np.asarray(picture.resize((size, size), FILTERS[name]))
  return resized[..., None] if grey else resized


def on_white(image: Image.Image) -> Image.Image:
  """Returns the image (of any mode) as RGB, what is transparent shown white."""
  rgba = image.convert('RGBA')
  white = Image.new('RGBA', rgba.size, 'white')
  return Image.alpha_composite(white, rgba).convert('RGB')
