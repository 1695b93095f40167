"""What an image of the data set `shapes` shows, read out of its pixels in closed form.

Every image is m f + (1 - m) b for a mask m and two colours. For each mask of a table (each shape, size and
position, at nine offsets) the best f and b are a least-squares solution of a 2x2 system, per channel; the
mask with the least residual says shape, size and position, f the colour and b the background.
"""

import dataclasses
import itertools

import numpy as np
from jaxtyping import Float32, Float64, Int32, UInt8

from vaediff.data import shapes, sources
from vaediff.errors import UserError

MOST_RMSE = 0.1
"""An image is valid below it: those of the data have a median of about 0.02 and 99 % below 0.08."""
STEP = 1 / 32
"""Between the offsets of the masks, over the side of the image."""
CHUNK = 256
"""Images at a time."""
ATTRIBUTES = 'attributes'
"""Name in batches of what images show, int32 [n, attributes]."""
NUMBERS = tuple(len(names) for names in shapes.NAMES)
"""How many of each attribute there are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
  """What images show.

  Attributes:
    attributes: the number of each of `shapes.ATTRIBUTES`; of any image there is a nearest.
    rmse: of the nearest such image, pixels in [0, 1].
  """

  attributes: Int32[np.ndarray, 'n attributes']
  rmse: Float32[np.ndarray, ' n']

  @property
  def valid(self) -> np.ndarray:
    """Whether each image is one shape on one background at all."""
    return self.rmse < MOST_RMSE


class Oracle:
  """Reads images of one size.

  Args:
    size: of the images, pixels.
    mini: they are of the small set.

  Raises:
    UserError: for a size at which shapes are not told apart.
  """

  def __init__(self, size: int, *, mini: bool = False):
    if size < 16:
      raise UserError(f'shapes are read from images of at least 16 pixels a side, got {size}')
    choices = shapes.MINI if mini else shapes.ALL
    self._choices, self._size = choices, size
    whole = list(itertools.product(choices[0], choices[2], choices[3]))
    offsets = list(itertools.product((-STEP, 0.0, STEP), repeat=2))
    self._which = np.repeat(np.array(whole, np.int32), len(offsets), axis=0)
    masks = [
      shapes.mask(shapes.Scene(attributes=(shape, 0, extent, position, 0), offset=offset), size)
      for shape, extent, position in whole
      for offset in offsets
    ]
    self._masks = np.stack(masks).reshape(len(masks), -1).astype(np.float64) / 255
    both = self._masks.sum(1) - np.square(self._masks).sum(1)  # m . (1 - m)
    front, back = np.square(self._masks).sum(1), np.square(1 - self._masks).sum(1)
    determinant = front * back - np.square(both)
    inverse = np.stack([back, -both, -both, front]) / determinant
    self._inverse = inverse.T.reshape(-1, 2, 2)

  def read(self, image: UInt8[np.ndarray, 'n height width 3']) -> Reading:
    """Returns what images show.

    Raises:
      UserError: when they are of another size.
    """
    if image.shape[1:] != (self._size, self._size, 3):
      raise UserError(f'the images are of {image.shape[1:]} and not of {(self._size, self._size, 3)}')
    parts = [self._read(image[start : start + CHUNK]) for start in range(0, len(image), CHUNK)]
    if not parts:
      return Reading(attributes=np.zeros((0, len(shapes.ATTRIBUTES)), np.int32), rmse=np.zeros(0, np.float32))
    return Reading(
      attributes=np.concatenate([attributes for attributes, _ in parts]),
      rmse=np.concatenate([rmse for _, rmse in parts]),
    )

  def _read(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = (
      (image.astype(np.float64) / 255).reshape(len(image), -1, 3).transpose(2, 0, 1)
    )  # channel, image, pixel
    whole, squared = x.sum(-1), np.square(x).sum((0, 2))
    fronts = x @ self._masks.T  # channel, image, mask
    front_front = np.square(fronts).sum(0)
    front_whole = (fronts * whole[..., None]).sum(0)
    front_back = front_whole - front_front
    back_back = np.square(whole).sum(0)[:, None] - front_whole - front_back
    (a, b), (_, c) = np.moveaxis(self._inverse, 0, -1)
    explained = a * front_front + 2 * b * front_back + c * back_back
    best, rows = explained.argmax(1), np.arange(len(image))
    sides = np.stack([fronts[:, rows, best], whole - fronts[:, rows, best]])  # front or back, channel, image
    front, back = 255 * np.einsum('nij,jcn->inc', self._inverse[best], sides)
    residual = squared - explained[rows, best]
    rmse = np.sqrt(np.maximum(residual, 0) / (3 * self._size**2)).astype(np.float32)
    shape, extent, position = self._which[best].T
    colour = nearest_shade(front, self._choices[1])
    background = nearest(back, self._choices[4])
    return np.stack([shape, colour, extent, position, background], axis=1).astype(np.int32), rmse


def with_attributes(source: sources.Source, *, mini: bool) -> sources.Source:
  """Returns images of the data set whose batches hold what they show."""
  reader = Oracle(source.image_shape[0], mini=mini)
  rows = np.array_split(np.arange(len(source)), -(-len(source) // CHUNK))
  read = [reader.read(source.read(chunk)[sources.IMAGE]).attributes for chunk in rows]
  return sources.Beside(source=source, arrays={ATTRIBUTES: np.concatenate(read)})


def nearest_shade(colour: Float64[np.ndarray, 'n 3'], choices: tuple[int, ...]) -> np.ndarray:
  """Returns the number of the colour of which some shade is nearest, of those that may be."""
  palette = np.array([tuple(shapes.COLOURS.values())[number] for number in choices], np.float64)
  along = (colour @ palette.T) / np.square(palette).sum(1)
  shades = np.clip(along, *shapes.SHADE)[..., None] * palette
  return np.array(choices)[np.square(colour[:, None] - shades).sum(-1).argmin(1)]


def nearest(colour: Float64[np.ndarray, 'n 3'], choices: tuple[int, ...]) -> np.ndarray:
  """Returns the number of the nearest background, of those that may be."""
  palette = np.array([tuple(shapes.BACKGROUNDS.values())[number] for number in choices], np.float64)
  return np.array(choices)[np.square(colour[:, None] - palette).sum(-1).argmin(1)]


def correct(
  asked: Int32[np.ndarray, 'n attributes'], read: Int32[np.ndarray, 'n attributes']
) -> Float64[np.ndarray, 'n attributes']:
  """Returns 1 where an image shows what was asked for, 0 where not, nan where nothing was asked (-1)."""
  return np.where(asked < 0, np.nan, asked == read)
