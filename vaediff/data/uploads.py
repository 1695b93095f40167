"""Images that a user hands over as the bytes of a file: within limits, as large as those of the data."""

import io
import pathlib
import warnings

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict
from PIL import Image

from vaediff.data import folder, resize
from vaediff.errors import UserError

LONGEST_NAME = 80
"""Letters of a file's name in messages."""


def read(
  name: str, content: bytes, data: ConfigDict, *, max_bytes: int, max_pixels: int
) -> UInt8[np.ndarray, 'size size channels']:
  """Returns the image of a file's bytes as the data has them: its central square, resampled to its size.

  Grey becomes colour, or colour grey, as the data is; a smaller image is enlarged by repeating its pixels
  where that is a whole number of times. Nothing is written, and the name opens nothing.

  Args:
    name: of the file, for messages.
    content: its bytes.
    data: `image_size` and `channels`.
    max_bytes: most that a file may have.
    max_pixels: most that an image may have; seen in its first bytes, before anything is unpacked.

  Raises:
    UserError: for what is too large, or is no image.
  """
  shown = ''.join(c if c.isprintable() else '?' for c in name)[:LONGEST_NAME] or 'the file'
  if len(content) > max_bytes:
    raise UserError(
      f'{shown} has {len(content):,} bytes; at most {max_bytes:,} are read. Take a smaller one, or raise '
      'config.explore.max_upload_bytes'
    )
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # PIL warns of bombs at a size of its own
      with Image.open(io.BytesIO(content), formats=folder.FORMATS) as opened:
        width, height = opened.size
  except Image.DecompressionBombError as error:
    message = f'{shown} has too many pixels; at most {max_pixels:,} are read. Make it smaller'
    raise UserError(message) from error
  except Exception as error:  # PIL's decoders raise almost anything on damaged files.
    raise UserError(f'{shown} is no image: give a {", ".join(folder.FORMATS)} file') from error
  if width * height > max_pixels:
    raise UserError(
      f'{shown} has {width:,} x {height:,} pixels; at most {max_pixels:,} are read. Make it smaller, or '
      'raise config.explore.max_upload_pixels'
    )
  image = resize.center_crop(folder.decode(pathlib.Path(shown), data.channels, content), 0)
  size = data.image_size
  if image.shape[0] == size:
    return image
  whole = size % image.shape[0] == 0
  return resize.resize(image, size, 'nearest' if whole else 'lanczos')
