"""What all readers share: the interface, the splits of one list of images, and fitting one image.

A reader holds one split of a data set as stored, images of any size; `cache` and `sources` crop,
resize and store what it reads. Constructing a reader is cheap and checks that the files are there;
pixels are read at the first use.
"""

import abc
import hashlib
import itertools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from vaediff.data.resize import fit
from vaediff.errors import UserError
from vaediff.storage import files

MAX_CLASSES = 32_768  # Of labels: every measurement by class has a row for each; ImageNet-21k has 21,841.
MAX_HASHED = 2**28  # Bytes of files that are told apart by content; larger ones by size and time.
Stretch = tuple[str, int, int]
"""A run of stored images: of which list or file, from, and up to without."""


class Example(NamedTuple):
  """One image as stored.

  Attributes:
    image: uint8 [height, width, channels].
    label: 0 where there are none.
    caption: '' where there are none.
  """

  image: np.ndarray
  label: int
  caption: str = ''


class Reader(abc.ABC):
  """The images of one split as stored."""

  label_names: tuple[str, ...]
  """One name per class; empty when the classes have no names."""
  num_classes: int
  """0 when the images have no labels."""
  has_captions: bool = False
  """Whether what is read has captions: those of `data.caption_feature`."""

  @abc.abstractmethod
  def __len__(self) -> int: ...

  @abc.abstractmethod
  def fingerprint(self) -> Any:
    """Returns what tells these files from others, as JSON: versions, or their content, or their times."""

  @abc.abstractmethod
  def stretches(self) -> Sequence[Stretch]:
    """Returns which of the stored images these are; those of another split of the same data set compare."""

  @abc.abstractmethod
  def read(self, index: int) -> Example:
    """Returns one image with its label and caption."""

  @abc.abstractmethod
  def locate(self, index: int) -> str:
    """Returns where one image comes from, for error messages."""


def read_fitted(reader: Reader, data: ml_collections.ConfigDict, index: int) -> Example:
  """Returns one image, [size, size, channels] as `data` asks for, with its label and caption.

  Raises:
    UserError: the image is broken or does not fit; the message says where it comes from.
  """
  example = reader.read(index)
  label = example.label
  if not 0 <= label < max(1, reader.num_classes):
    raise UserError(
      f'{reader.locate(index)}: its label is {label}, but this data set has {reader.num_classes} classes, 0'
      f' to {reader.num_classes - 1}: mend the label, or use a split with labels'
    )
  try:
    return example._replace(image=fit(example.image, data))
  except UserError as error:
    raise UserError(f'{reader.locate(index)}: {error}') from error


def check_readers(readers: Mapping[str, Reader], data: ml_collections.ConfigDict) -> None:
  """Raises UserError when splits share images, or what they hold does not fit the section `data`.

  Args:
    readers: of the data set, by split.
    data: the section of the config.

  Raises:
    UserError: for captions or classes that are not as `data` says, for more than `MAX_CLASSES` classes, or
      for an image that is in two splits; names the fields of the config.
  """
  for reader in readers.values():
    check_captions(reader, data)
    check_classes(reader.num_classes, data)
    if reader.num_classes > MAX_CLASSES:
      raise UserError(
        f'data.path={data.path!r} (data.name={data.name!r}): the labels are of {reader.num_classes} classes,'
        f' and may be of {MAX_CLASSES}; number the classes from 0 on, without gaps, or leave the labels out'
      )
  for (first, one), (second, other) in itertools.combinations(readers.items(), 2):
    shared = sum(
      max(0, min(stop, other_stop) - max(start, other_start))
      for where, start, stop in one.stretches()
      for there, other_start, other_stop in other.stretches()
      if where == there
    )
    if shared:
      fields = [f'data.{split}_split={data[f"{split}_split"]!r}' for split in (first, second)]
      raise UserError(
        f'{fields[0]} and {fields[1]} share {shared} images: what is measured on images of the training says'
        " nothing of others. Use two splits, or slices such as 'train[:95%]' and 'train[95%:]'"
      )


def check_captions(reader: Reader, data: ml_collections.ConfigDict) -> None:
  """Raises UserError where captions are asked for of images that have none."""
  if data.caption_feature and not reader.has_captions:
    raise UserError(
      f'data.caption_feature={data.caption_feature!r}, but images of data.source={data.source!r} have no'
      f' captions'
      " here: they are read of 'tfds', 'parquet' and 'image_folder'; leave it empty, or store the images so"
    )


def check_classes(known: int, data: ml_collections.ConfigDict) -> None:
  """Raises UserError where the labels are of more classes than the config says."""
  if 0 < data.num_classes < known:
    raise UserError(
      f'data.num_classes is {data.num_classes}, but the labels of these images are of {known} classes; set it'
      f' to {known}, or to 0 where no label is read'
    )


def parse_split(expression: str, field: str) -> tuple[str, str, str]:
  """Returns name, start and stop of a split such as 'train[10%:]'; the ends may be empty.

  Raises:
    UserError: naming the config field, when the expression is malformed.
  """
  match = re.fullmatch(r'(\w+)(?:\[(-?[0-9]{1,15}%?)?:(-?[0-9]{1,15}%?)?\])?', expression)
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
    UserError: naming the config field, when nothing is selected, or a bound lies outside.
  """

  def position(text: str, default: int) -> int:
    if not text:
      return default
    value, most = (int(text[:-1]), 100) if text.endswith('%') else (int(text), count)
    if abs(value) > most:
      raise UserError(
        f'data.{field}={expression!r}: {text} lies outside of the {count} images; write numbers from -{count}'
        f' to {count}, or per cent from -100% to 100%'
      )
    return round(value * count / 100) if text.endswith('%') else value

  _, start, stop = parse_split(expression, field)
  positions = range(count)[position(start, 0) : position(stop, count)]
  if not positions:
    raise UserError(
      f'data.{field}={expression!r} selects none of the {count} images; write a slice that holds some, such'
      " as 'train[:95%]'"
    )
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


def shuffled_stretch(expression: str, field: str, count: int) -> list[Stretch]:
  """Returns which places of the shuffled list of `select_shuffled` a slice selects."""
  positions = select(expression, field, count)
  return [('train', positions.start, positions.stop)]


def stamps(found: Sequence[pathlib.Path]) -> list[list[Any]]:
  """Returns what tells files from others: names and content, or names, sizes and times of large ones.

  Raises:
    UserError: a file is gone, or the system does not let it be read.
  """
  stamped = []
  for file in found:
    with files.reading(file):
      stamped.append([file.name, file.stat().st_size, file.stat().st_mtime_ns])
  if sum(size for _, size, _ in stamped) > MAX_HASHED:
    return stamped
  for row, file in zip(stamped, found, strict=True):
    with files.reading(file), open(file, 'rb') as content:
      row[1:] = [hashlib.file_digest(content, 'sha256').hexdigest()]
  return stamped
