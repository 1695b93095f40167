"""What all readers share: the interface, the splits of one list of images, and fitting one image.

A reader holds one split of a data set as stored, images of any size; `cache` and `sources` crop,
resize and store what it reads. Constructing a reader is cheap and checks that the files are there;
pixels are read at the first use.
"""

import abc
import pathlib
import re
from typing import Any

import ml_collections
import numpy as np

from vaediff.data.resize import fit
from vaediff.errors import UserError


class Reader(abc.ABC):
  """The images of one split as stored."""

  label_names: tuple[str, ...]
  """One name per class; empty when the classes have no names."""
  num_classes: int
  """0 when the images have no labels."""

  @abc.abstractmethod
  def __len__(self) -> int: ...

  @abc.abstractmethod
  def fingerprint(self) -> Any:
    """Returns what tells these images from others, as JSON: versions, or files and their times."""

  @abc.abstractmethod
  def read(self, index: int) -> tuple[np.ndarray, int]:
    """Returns one image, uint8 [height, width, channels], and its label (0 when there are none)."""

  @abc.abstractmethod
  def locate(self, index: int) -> str:
    """Returns where one image comes from, for error messages."""


def read_fitted(reader: Reader, data: ml_collections.ConfigDict, index: int) -> tuple[np.ndarray, int]:
  """Returns one image, uint8 [size, size, channels] as `data` asks for, and its label.

  Raises:
    UserError: the image is broken or does not fit; the message says where it comes from.
  """
  image, label = reader.read(index)
  try:
    return fit(image, data), label
  except UserError as error:
    raise UserError(f'{reader.locate(index)}: {error}') from error


def parse_split(expression: str, field: str) -> tuple[str, str, str]:
  """Returns name, start and stop of a split such as 'train[10%:]'; the ends may be empty.

  Raises:
    UserError: naming the config field, when the expression is malformed.
  """
  match = re.fullmatch(r'(\w+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?', expression)
  if match is None:
    raise UserError(
      f"data.{field}={expression!r} is no split: write 'train', 'train[:95%]' or 'train[-500:]'"
    )
  return match[1], match[2] or '', match[3] or ''


def select(expression: str, field: str, count: int) -> range:
  """Returns the positions that a split selects out of `count` examples.

  Per cent round to the nearest example, on both sides of a boundary alike: 'train[:95%]' and
  'train[95%:]' share no example and leave none out.

  Raises:
    UserError: naming the config field, when nothing is selected.
  """

  def position(text: str, default: int) -> int:
    if not text:
      return default
    return round(int(text[:-1]) * count / 100) if text.endswith('%') else int(text)

  _, start, stop = parse_split(expression, field)
  positions = range(count)[position(start, 0) : position(stop, count)]
  if not positions:
    raise UserError(f'data.{field}={expression!r} selects none of the {count} images')
  return positions


def select_shuffled(expression: str, field: str, count: int) -> np.ndarray:
  """Returns the indices that a slice of 'train' selects out of one shuffled list of images.

  Files are often sorted by class; slices of a shuffled list are fair samples. The order depends on
  `count` alone, and is the same on every machine: RandomState's stream is frozen (NEP 19).

  Raises:
    UserError: the split is malformed, not named 'train', or selects nothing.
  """
  name, _, _ = parse_split(expression, field)
  if name != 'train':
    raise UserError(
      f"data.{field}={expression!r}: image_folder and npz are one list of images called 'train';"
      " write slices of it, such as 'train[:95%]' and 'train[95%:]'"
    )
  return np.random.RandomState(0).permutation(count)[select(expression, field, count)]


def stamp(file: pathlib.Path) -> list[Any]:
  """Returns name, size in bytes and time of change of a file, which tell whether it changed."""
  status = file.stat()
  return [file.name, status.st_size, status.st_mtime_ns]
