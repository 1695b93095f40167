"""What the rest of the package opens: random access to images that are ready for the model.

    source = open_source(config.data, 'train')
    source.read(np.array([3, 1, 4]))  # {'image': uint8 [3, H, W, C], 'label': int32 [3]}
    source.captions  # of a set with captions, where data.caption_feature names them: a text for each image

`open_source` picks the reader of `data.source`; with `data.materialize` its images are read back
from the `cache`, else they are decoded, cropped and resized whenever they are read.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import ml_collections
import numpy as np
from absl import logging
from jaxtyping import Int32, UInt8

from vaediff import checks
from vaediff.data import arrays, cache, paths, words
from vaediff.data.folder import FolderReader
from vaediff.data.idx import IdxReader
from vaediff.data.npz import NpzReader
from vaediff.data.parquet import ParquetReader
from vaediff.data.readers import MAX_CLASSES, Reader, check_classes, read_fitted
from vaediff.data.resize import CHANNELS, CROPS, RESIZES, image_shape
from vaediff.data.synthetic import COUNTS, NUM_CLASSES, synthetic_arrays, synthetic_caption
from vaediff.errors import UserError
from vaediff.storage import places

SPLITS = ('train', 'eval')
IMAGE, LABEL = 'image', 'label'
"""What a batch holds of each example."""
BOUNDS = {
  'source': checks.one_of(('tfds', 'idx', 'image_folder', 'parquet', 'npz', 'synthetic')),
  'channels': checks.one_of(CHANNELS),
  'crop': checks.one_of(CROPS),
  'resize': checks.one_of(RESIZES),
  'image_size': checks.between(1, 2**13),
  'crop_size': checks.between(0, 2**16),
  'num_classes': checks.between(0, MAX_CLASSES),
  'num_threads': checks.between(0, 1024),
  'prefetch': checks.between(0, 2**16),
}


@runtime_checkable
class Source(Protocol):
  """Images of one split by index, all of one shape."""

  image_shape: tuple[int, int, int]
  """Height, width, channels."""
  label_names: tuple[str, ...]
  """One name per class; empty when the classes have no names."""
  num_classes: int
  """0 when the images have no labels."""
  fingerprint: str
  """What these images are: of all their bytes and labels, in order, wherever they come from."""
  captions: tuple[str, ...]
  """Of each image; empty where none are read: `data.caption_feature`."""
  captions_digest: str
  """What these captions are; '' where there are none."""

  def __len__(self) -> int: ...

  def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Returns 'image', uint8 [n, H, W, C], and 'label', int32 [n], of these examples, in order."""


def batch_structs(
  config: ml_collections.ConfigDict, count: int, length: int = 0
) -> dict[str, tuple[tuple[int, ...], type]]:
  """Returns shape and type of the arrays of a batch of `count` examples, without opening the data.

  With a `length` captions are among them, as so many tokens each.
  """
  size, channels = config.image_size, config.channels
  structs = {IMAGE: ((count, size, size, channels), np.uint8), LABEL: ((count,), np.int32)}
  return structs | {words.TOKENS: ((count, length), np.int32)} if length else structs


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArraySource:
  """A source in memory, or memory-mapped."""

  images: UInt8[np.ndarray, 'examples height width channels']
  labels: Int32[np.ndarray, ' examples']
  label_names: tuple[str, ...]
  num_classes: int
  known_fingerprint: str = ''
  """'' = found when it is asked for."""
  captions: tuple[str, ...] = ()
  """See `Source`."""

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """See `Source`."""
    return self.images.shape[1:]

  @functools.cached_property
  def fingerprint(self) -> str:
    """See `Source`."""
    if self.known_fingerprint:
      return self.known_fingerprint
    return arrays.of_split(arrays.digest_of(self.images), arrays.digest_of(self.labels))

  @functools.cached_property
  def captions_digest(self) -> str:
    """See `Source`."""
    return arrays.digest_of_texts(self.captions) if self.captions else ''

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
  fingerprint: str
  """See `Source`; found in the one pass over all images that precedes (see `cache`)."""
  captions: tuple[str, ...] = ()
  """See `Source`; found in that pass."""

  @functools.cached_property
  def captions_digest(self) -> str:
    """See `Source`."""
    return arrays.digest_of_texts(self.captions) if self.captions else ''

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """See `Source`."""
    return image_shape(self.data)

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
      images[row], labels[row], _ = read_fitted(self.reader, self.data, index)
    return {'image': images, 'label': labels}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beside:
  """A source of which every batch holds more, such as captions as tokens: a row of each array per image."""

  source: Source
  arrays: Mapping[str, np.ndarray]

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """See `Source`."""
    return self.source.image_shape

  @property
  def label_names(self) -> tuple[str, ...]:
    """See `Source`."""
    return self.source.label_names

  @property
  def num_classes(self) -> int:
    """See `Source`."""
    return self.source.num_classes

  @property
  def fingerprint(self) -> str:
    """See `Source`."""
    return self.source.fingerprint

  @property
  def captions(self) -> tuple[str, ...]:
    """See `Source`."""
    return self.source.captions

  @property
  def captions_digest(self) -> str:
    """See `Source`."""
    return self.source.captions_digest

  def __len__(self) -> int:
    return len(self.source)

  def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """See `Source`."""
    return self.source.read(indices) | {name: rows[indices] for name, rows in self.arrays.items()}


def with_tokens(source: Source, tokenizer: words.Tokenizer, length: int) -> Source:
  """Returns a source whose batches hold the captions as `length` tokens each.

  Raises:
    UserError: when there are no captions, or one has words that the tokenizer does not know, or too many.
  """
  if not source.captions:
    raise UserError(
      'captions are read, and these images have none: set data.caption_feature to the field that holds them'
    )
  tokens = tokenizer.encode(source.captions, length, 'the captions of the images')
  return Beside(source=source, arrays={words.TOKENS: tokens})


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
  check_classes(source.num_classes, data)
  return source


def _open(data: ml_collections.ConfigDict, split: str, log: Callable[[str], None]) -> Source:
  """Does what `open_source` says, but for the number of classes."""
  _check(data)
  if split not in SPLITS:
    raise ValueError(f'{split=} must be one of {SPLITS}')
  if data.source == 'synthetic':
    images, labels = synthetic_arrays(split, data.image_size, data.channels)
    names = tuple(str(label) for label in range(NUM_CLASSES))
    captions = tuple(map(synthetic_caption, labels.tolist())) if data.caption_feature else ()
    return ArraySource(
      images=images, labels=labels, label_names=names, num_classes=NUM_CLASSES, captions=captions
    )
  readers = {name: _open_reader(data, name, log) for name in SPLITS}
  folder = cache.ensure(data, readers, log)
  if data.materialize:
    images, labels, meta = cache.load(folder, split)
    return ArraySource(
      images=images,
      labels=labels,
      label_names=tuple(meta['label_names']),
      num_classes=meta['num_classes'],
      known_fingerprint=meta['splits'][split]['fingerprint'],
      captions=cache.load_captions(folder, split),
    )
  return DecodedSource(
    reader=readers[split],
    data=data,
    fingerprint=cache.read_meta(folder)['splits'][split]['fingerprint'],
    captions=cache.load_captions(folder, split),
  )


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
    told = f', captions such as {source.captions[0]!r}' if source.captions else ''
    log(f'{split}: {len(source)} images of {width}x{height}x{channels}, {classes}{told}')


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
    place = places.anywhere(data.path, 'data.path')
    there = bool(data.path) and paths.mode_of(place) != 0
  text = (
    f"{data.name or data.source} ({data.source}), '{data.train_split}' and '{data.eval_split}', at"
    f" {size}, from '{place}': {'there' if there else 'not there yet'}"
  )
  if data.materialize:
    stored = 'there' if cache.is_stored(data) else 'not made yet'
    text += f"\nresized copy in '{cache.cache_prefix(data).parent}': {stored}"
  return text


def _check(data: ml_collections.ConfigDict) -> None:
  checks.check(data, BOUNDS, 'data.')
  for field in ('name', 'path', 'data_dir', 'caption_feature'):
    if '\0' in data[field]:
      raise UserError(f'data.{field}={data[field]!r} holds a zero byte; write it without')


def _open_reader(data: ml_collections.ConfigDict, split: str, log: Callable[[str], None]) -> Reader:
  if data.source == 'tfds':
    from vaediff.data.tfds_reader import TfdsReader  # Takes seconds to import; others need it not.

    return TfdsReader(data, split, log)
  readers = {'idx': IdxReader, 'npz': NpzReader, 'image_folder': FolderReader, 'parquet': ParquetReader}
  return readers[data.source](data, split)
