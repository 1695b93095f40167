"""What the rest of the package opens: random access to images that are ready for the model.

    source = open_source(config.data, 'train')
    source.read(np.array([3, 1, 4]))  # {'image': uint8 [3, H, W, C], 'label': int32 [3]}

`open_source` picks the reader of `data.source`; with `data.materialize` its images are read back
from the `cache`, else they are decoded, cropped and resized whenever they are read.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import ml_collections
import numpy as np
from absl import logging
from jaxtyping import Int32, UInt8

from vaediff.data import cache
from vaediff.data.folder import FolderReader
from vaediff.data.idx import IdxReader
from vaediff.data.npz import NpzReader
from vaediff.data.readers import Reader, read_fitted
from vaediff.data.resize import CROPS, RESIZES
from vaediff.data.synthetic import COUNTS, NUM_CLASSES, synthetic_arrays
from vaediff.errors import UserError

SPLITS = ('train', 'eval')
IMAGE, LABEL = 'image', 'label'
"""What a batch holds of each example."""
CHOICES = {
  'source': ('tfds', 'idx', 'image_folder', 'npz', 'synthetic'),
  'channels': (1, 3),
  'crop': CROPS,
  'resize': RESIZES,
}
MINIMA = {'image_size': 1, 'crop_size': 0, 'num_threads': 0, 'prefetch': 0}


@runtime_checkable
class Source(Protocol):
  """Images of one split by index, all of one shape."""

  image_shape: tuple[int, int, int]
  """Height, width, channels."""
  label_names: tuple[str, ...]
  """One name per class; empty when the classes have no names."""
  num_classes: int
  """0 when the images have no labels."""

  def __len__(self) -> int: ...

  def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Returns 'image', uint8 [n, H, W, C], and 'label', int32 [n], of these examples, in order."""


def batch_structs(config: ml_collections.ConfigDict, count: int) -> dict[str, tuple[tuple[int, ...], type]]:
  """Returns shape and type of the arrays of a batch of `count` examples, without opening the data."""
  size, channels = config.image_size, config.channels
  return {IMAGE: ((count, size, size, channels), np.uint8), LABEL: ((count,), np.int32)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArraySource:
  """A source in memory, or memory-mapped."""

  images: UInt8[np.ndarray, 'examples height width channels']
  labels: Int32[np.ndarray, ' examples']
  label_names: tuple[str, ...]
  num_classes: int

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """See `Source`."""
    return self.images.shape[1:]

  def __len__(self) -> int:
    return len(self.images)

  def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """See `Source`."""
    return {'image': np.asarray(self.images[indices]), 'label': self.labels[indices]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodedSource:
  """A source that decodes, crops and resizes whenever it is read."""

  reader: Reader
  data: ml_collections.ConfigDict

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """See `Source`."""
    return (self.data.image_size, self.data.image_size, self.data.channels)

  @property
  def label_names(self) -> tuple[str, ...]:
    """See `Source`."""
    return self.reader.label_names

  @property
  def num_classes(self) -> int:
    """See `Source`."""
    return self.reader.num_classes

  def __len__(self) -> int:
    return len(self.reader)

  def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """See `Source`."""
    images = np.empty((len(indices), *self.image_shape), np.uint8)
    labels = np.empty(len(indices), np.int32)
    for row, index in enumerate(indices.tolist()):
      images[row], labels[row] = read_fitted(self.reader, self.data, index)
    return {'image': images, 'label': labels}


def open_source(
  data: ml_collections.ConfigDict, split: str, log: Callable[[str], None] = logging.info
) -> Source:
  """Returns the images of one split, 'train' or 'eval', as `data` describes them.

  With `data.materialize` they are stored resized first (see `cache`), else decoded when read.
  'synthetic' makes up 256 and 64 images, in memory, whatever the splits are called.

  Raises:
    UserError: a field has no such value; or files are missing (the message says how to get them),
      broken, or do not fit the settings.
  """
  source = _open(data, split, log)
  if 0 < data.num_classes < source.num_classes:
    raise UserError(
      f'data.num_classes is {data.num_classes}, but the labels of these images are of {source.num_classes} '
      f'classes; set it to {source.num_classes}, or to 0 where no label is read'
    )
  return source


def _open(data: ml_collections.ConfigDict, split: str, log: Callable[[str], None]) -> Source:
  """Does what `open_source` says, but for the number of classes."""
  _check(data)
  if split not in SPLITS:
    raise ValueError(f'{split=} must be one of {SPLITS}')
  if data.source == 'synthetic':
    images, labels = synthetic_arrays(split, data.image_size, data.channels)
    names = tuple(str(label) for label in range(NUM_CLASSES))
    return ArraySource(images=images, labels=labels, label_names=names, num_classes=NUM_CLASSES)
  readers = {name: _open_reader(data, name, log) for name in SPLITS}
  if data.materialize:
    images, labels, meta = cache.load(cache.ensure(data, readers, log), split)
    return ArraySource(
      images=images,
      labels=labels,
      label_names=tuple(meta['label_names']),
      num_classes=meta['num_classes'],
    )
  if data.source == 'image_folder':
    cache.ensure(data, readers, log)
  source = DecodedSource(reader=readers[split], data=data)
  # Settings that do not fit the images fail here, not in a thread of the loader.
  read_fitted(source.reader, data, 0)
  return source


def prepare(data: ml_collections.ConfigDict, log: Callable[[str], None] = print) -> None:
  """Builds or converts all that later runs read, and logs what there is.

  Raises:
    UserError: as `open_source`.
  """
  log(describe(data))
  for split in SPLITS:
    source = open_source(data, split, log)
    height, width, channels = source.image_shape
    classes = f'{source.num_classes} classes' if source.num_classes else 'no labels'
    log(f'{split}: {len(source)} images of {width}x{height}x{channels}, {classes}')


def describe(data: ml_collections.ConfigDict) -> str:
  """Returns in words which data set this is, where it comes from, and whether it is there now.

  Raises:
    UserError: a field has no such value.
  """
  _check(data)
  size = f'{data.image_size}x{data.image_size}x{data.channels}'
  if data.source == 'synthetic':
    return f'synthetic images of {size}, {COUNTS["train"]} train and {COUNTS["eval"]} eval: no files'
  if data.source == 'tfds':
    place = cache.data_root(data) / data.name.split(':')[0]
    there = any(place.rglob('dataset_info.json'))
  else:
    place = pathlib.Path(data.path).expanduser()
    there = bool(data.path) and place.exists()
  text = (
    f"{data.name or data.source} ({data.source}), '{data.train_split}' and '{data.eval_split}', at"
    f" {size}, from '{place}': {'there' if there else 'not there yet'}"
  )
  if data.materialize:
    stored = 'there' if cache.is_stored(data) else 'not made yet'
    text += f"\nresized copy in '{cache.cache_prefix(data).parent}': {stored}"
  return text


def _check(data: ml_collections.ConfigDict) -> None:
  for field, allowed in CHOICES.items():
    if data[field] not in allowed:
      raise UserError(f'data.{field}={data[field]!r} must be one of {allowed}')
  for field, minimum in MINIMA.items():
    if data[field] < minimum:
      raise UserError(f'data.{field}={data[field]} must be at least {minimum}')


def _open_reader(data: ml_collections.ConfigDict, split: str, log: Callable[[str], None]) -> Reader:
  if data.source == 'tfds':
    from vaediff.data.tfds_reader import TfdsReader  # Takes seconds to import; others need it not.

    return TfdsReader(data, split, log)
  readers = {'idx': IdxReader, 'npz': NpzReader, 'image_folder': FolderReader}
  return readers[data.source](data, split)
