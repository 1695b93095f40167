"""What an edit has changed, on the data set `shapes`, whose images can be read exactly, and what it kept.

rmse       of an image of the strip and the picture, pixels in [0, 1]
reached    of the attributes that the caption changes, how many the image shows as asked for
kept       of the others, how many it shows as the picture does
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int32, UInt8
from ml_collections import ConfigDict

from vaediff.data import oracle, shapes
from vaediff.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edited:
  """One edit: a strip of images over eta.

  Attributes:
    etas: of the images.
    rmse: of each.
    rmse_before: of the image at the first eta, before the denoiser was tuned.
    changed: names of the attributes that the caption changes.
    reached: of each image, how many of these it shows as asked for; () = nothing was read.
    kept: of each image, how many of the others it shows as the picture does.
    shows: of each image, in words.
  """

  etas: tuple[float, ...]
  rmse: tuple[float, ...]
  rmse_before: float
  changed: tuple[str, ...] = ()
  reached: tuple[int, ...] = ()
  kept: tuple[int, ...] = ()
  shows: tuple[str, ...] = ()

  @property
  def done(self) -> tuple[bool, ...]:
    """Whether each image shows all that was asked for, and all else as the picture does."""
    others = len(shapes.ATTRIBUTES) - len(self.changed)
    return tuple(
      reached == len(self.changed) and kept == others
      for reached, kept in zip(self.reached, self.kept, strict=True)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
  """What a caption asks for of a picture of the data set.

  Attributes:
    reader: of images of this size.
    picture: the attributes of the picture.
    caption: those that the caption tells; -1 where it does not.
  """

  reader: oracle.Oracle
  picture: Int32[np.ndarray, ' attributes']
  caption: Int32[np.ndarray, ' attributes']

  @property
  def changed(self) -> np.ndarray:
    """Whether each attribute is to be another one."""
    return (self.caption >= 0) & (self.caption != self.picture)


def asked_for(data: ConfigDict, image: UInt8[np.ndarray, 'size size channels'], caption: str) -> Asked | None:
  """Returns what a caption asks for of a picture; None for other data than shapes.

  Raises:
    UserError: for a caption that is none of the data set's.
  """
  if not shapes.is_named(data):
    return None
  told, reader = shapes.told(caption), reader_of(data, len(image))
  return Asked(reader=reader, picture=reader.read(image[None]).attributes[0], caption=told)


@functools.cache
def _reader(size: int, mini: bool) -> oracle.Oracle:
  return oracle.Oracle(size, mini=mini)


def reader_of(data: ConfigDict, size: int) -> oracle.Oracle:
  """Returns what reads images of shapes of this size, made once; raises UserError for too small ones."""
  return _reader(size, shapes.is_mini(data))


def edited(
  etas: Sequence[int | float],
  strip: UInt8[np.ndarray, 'n size size channels'],
  before: UInt8[np.ndarray, 'size size channels'],
  image: UInt8[np.ndarray, 'size size channels'],
  asked: Asked | None,
) -> Edited:
  """Returns what a strip shows.

  Args:
    etas: of its images.
    strip: them.
    before: the image at the first eta, before the denoiser was tuned.
    image: the picture.
    asked: of it; None = nothing is read.
  """
  found = Edited(
    etas=tuple(float(eta) for eta in etas),
    rmse=tuple(rmse(strip, image[None]).tolist()),
    rmse_before=float(rmse(before[None], image[None])[0]),
  )
  if asked is None:
    return found
  read, changed = asked.reader.read(strip).attributes, asked.changed
  return dataclasses.replace(
    found,
    changed=tuple(name for name, own in zip(shapes.ATTRIBUTES, changed, strict=True) if own),
    reached=tuple((read == asked.caption[None])[:, changed].sum(axis=1).tolist()),
    kept=tuple((read == asked.picture[None])[:, ~changed].sum(axis=1).tolist()),
    shows=tuple(shapes.in_words(tuple(row)) for row in read.tolist()),
  )


def rmse(
  a: UInt8[np.ndarray, 'n height width channels'], b: UInt8[np.ndarray, 'm height width channels']
) -> Float[np.ndarray, ' n']:
  """Returns the root mean square difference of each pair of images, pixels in [0, 1]; b may be one."""
  difference = a.astype(np.float64) - b.astype(np.float64)
  return np.sqrt(np.square(difference).mean(axis=(1, 2, 3))) / 255


def rows_of(one: Edited) -> list[dict[str, Any]]:
  """Returns a row for each image of a strip."""
  rows = [{'eta': eta, 'rmse': value} for eta, value in zip(one.etas, one.rmse, strict=True)]
  if one.shows:
    others = len(shapes.ATTRIBUTES) - len(one.changed)
    for row, reached, kept, shows in zip(rows, one.reached, one.kept, one.shows, strict=True):
      row |= {'reached': f'{reached} of {len(one.changed)}', 'kept': f'{kept} of {others}', 'shows': shows}
  return rows


def summary(edits: Sequence[Edited]) -> tuple[list[dict[str, Any]], dict[str, float]]:
  """Returns a row for each eta, means over edits of one length, and figures over all of them.

  The figures: `rmse_first` at the first eta and `rmse_before` it was tuned; `edited`, the share of edits of
  which some image shows all that was asked for and all else as the picture does.
  """
  rows = []
  for number, eta in enumerate(edits[0].etas):
    rows.append(
      {
        'eta': eta,
        'reached': float(np.mean([one.reached[number] == len(one.changed) for one in edits])),
        'all kept': float(np.mean([one.kept[number] + len(one.changed) == len(shapes.ATTRIBUTES)
                                   for one in edits])),
        'both': float(np.mean([one.done[number] for one in edits])),
        'rmse': float(np.mean([one.rmse[number] for one in edits])),
      }
    )  # fmt: skip
  figures = {
    'rmse_first': float(np.mean([one.rmse[0] for one in edits])),
    'rmse_before': float(np.mean([one.rmse_before for one in edits])),
    'edited': float(np.mean([any(one.done) for one in edits])),
  }
  return rows, figures


def with_one_changed(attributes: Sequence[int], number: int, *, mini: bool) -> tuple[int, ...]:
  """Returns a composition with one attribute another: which one, and how, follows from a number.

  It is one that training images have: none of the split `held_out`.

  Raises:
    UserError: for a composition that has no such neighbour.
  """
  choices = shapes.MINI if mini else shapes.ALL
  free = [place for place, names in enumerate(choices) if len(names) > 1]
  place = free[number % len(free)]
  names = choices[place]
  own = names.index(attributes[place]) if attributes[place] in names else 0
  for step in range(len(names) - 1):
    value = names[(own + 1 + (number // len(free) + step) % (len(names) - 1)) % len(names)]
    found = (*attributes[:place], value, *attributes[place + 1 :])
    if not shapes.is_held_out(found):
      return tuple(int(one) for one in found)
  raise UserError(f'{shapes.in_words(tuple(attributes))!r} has no neighbour among compositions of training')
