"""Images as stored, from idx files: the format of MNIST and its relatives.

Big-endian: two zero bytes, a type byte (8 = uint8), the number of axes, the length of each axis as
int32, then the values (LeCun, Cortes and Burges, The MNIST database).
"""

import contextlib
import functools
import gzip
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import IO, Any

import ml_collections
import numpy as np

from vaediff.data import paths
from vaediff.data.readers import Example, Reader, Stretch, parse_split, select, stamps
from vaediff.errors import UserError
from vaediff.storage import files, places

PREFIXES = {'train': 'train', 'test': 't10k'}
LABEL_NAMES = {
  'mnist': tuple('0123456789'),
  'fashion_mnist': (
    'T-shirt/top',
    'Trouser',
    'Pullover',
    'Dress',
    'Coat',
    'Sandal',
    'Shirt',
    'Sneaker',
    'Bag',
    'Ankle boot',
  ),
}
"""Class names of well-known data sets, which the files themselves do not hold."""
MEND = 'fetch it again'
MOST_DEFLATED = 1032  # times: zlib makes nothing smaller


class IdxReader(Reader):
  """Four idx files (images and labels, train and t10k), plain or .gz, in the folder `data.path`."""

  def __init__(self, data: ml_collections.ConfigDict, split: str):
    self._field = f'{split}_split'
    self._expression = data[self._field]
    name, _, _ = parse_split(self._expression, self._field)
    if name not in PREFIXES:
      raise UserError(
        f'data.{self._field}={self._expression!r}: idx data sets have the splits {tuple(PREFIXES)}'
      )
    if not data.path:
      raise UserError("data.path='' is no folder; data.source='idx' needs one with the four files")
    folder = places.fetched(data.path, 'data.path')
    self._images_file = find_idx(folder, f'{PREFIXES[name]}-images-idx3-ubyte')
    self._labels_file = find_idx(folder, f'{PREFIXES[name]}-labels-idx1-ubyte')
    # The classes are those of the training labels, so that both splits agree on their number.
    self._classes_file = find_idx(folder, 'train-labels-idx1-ubyte')
    self.label_names = LABEL_NAMES.get(data.name, ())

  @functools.cached_property
  def _content(self) -> tuple[np.ndarray, np.ndarray]:
    images, labels = read_idx(self._images_file, 3), read_idx(self._labels_file, 1)
    if len(images) != len(labels):
      raise UserError(
        f'{self._images_file} holds {len(images)} images, but {self._labels_file} {len(labels)}'
        ' labels: they belong to different data sets, fetch both again'
      )
    part = select(self._expression, self._field, len(images))
    return images[part.start : part.stop, :, :, None], labels[part.start : part.stop]

  @functools.cached_property
  def num_classes(self) -> int:
    """See `Reader`."""
    return len(self.label_names) or int(read_idx(self._classes_file, 1).max()) + 1

  def __len__(self) -> int:
    return len(self._content[1])

  def fingerprint(self) -> Any:
    """See `Reader`."""
    return stamps([self._images_file, self._labels_file, self._classes_file])

  def stretches(self) -> Sequence[Stretch]:
    """See `Reader`."""
    part = select(self._expression, self._field, idx_shape(self._images_file, 3)[0])
    return [(str(self._images_file), part.start, part.stop)]

  def read(self, index: int) -> Example:
    """See `Reader`."""
    images, labels = self._content
    return Example(images[index], int(labels[index]))

  def locate(self, index: int) -> str:
    """See `Reader`."""
    return f'{self._images_file}, image {index} of {self._expression}'


def find_idx(folder: pathlib.Path, name: str) -> pathlib.Path:
  """Returns the idx file `name`, plain or .gz.

  Raises:
    UserError: neither is in the folder.
  """
  for file in (folder / name, folder / f'{name}.gz'):
    if paths.is_file(file):
      return file
  raise UserError(
    f"data.path: no {name} or {name}.gz in '{folder}'; data.source='idx' needs the four files of an"
    ' MNIST-like data set. For Fashion-MNIST on Debian or Ubuntu: apt-get install'
    " dataset-fashion-mnist, then data.path='/usr/share/datasets/fashion-mnist'"
  )


def read_idx(file: pathlib.Path, num_axes: int) -> np.ndarray:
  """Returns the uint8 array of an idx file; raises as `idx_shape`, or when bytes are missing."""
  shape = idx_shape(file, num_axes)
  expected = math.prod(shape)
  with _opened(file) as stream:
    stream.seek(4 + 4 * num_axes)
    content = stream.read(expected)
    rest = sum(len(more) for more in iter(lambda: stream.read(2**20), b''))
  if len(content) + rest != expected:
    header = 4 + 4 * num_axes
    raise files.Damaged(
      f'{file} holds {header + len(content) + rest} bytes, but its header announces {header + expected}'
      f' (shape {list(shape)}): it is truncated or damaged, {MEND}'
    )
  return np.frombuffer(content, np.uint8).reshape(shape)


def idx_shape(file: pathlib.Path, num_axes: int) -> tuple[int, ...]:
  """Returns the lengths of the axes of an idx file, from its header.

  Raises:
    UserError: it is another kind of file, empty, or its header is of no file of this size.
  """
  header = 4 + 4 * num_axes
  with _opened(file) as stream:
    start = stream.read(header)
  magic = bytes([0, 0, 8, num_axes])
  if start[:4] != magic:
    raise files.Damaged(
      f'{file} starts with 0x{start[:4].hex()}, but an idx file of {num_axes} uint8 axes with'
      f' 0x{magic.hex()}: it is another kind of file, or damaged; {MEND}'
    )
  if len(start) < header:
    raise files.Damaged(f'{file} ends within its header, after {len(start)} bytes: it is truncated, {MEND}')
  shape = tuple(np.frombuffer(start[4:], '>i4').tolist())
  most = file.stat().st_size * (MOST_DEFLATED if file.suffix == '.gz' else 1)
  if min(shape) < 1 or math.prod(shape) > most and math.prod(shape) > 2**28:
    raise files.Damaged(
      f'{file}: its header announces the shape {list(shape)}, which a file of {file.stat().st_size} bytes'
      f' cannot hold: it is empty or damaged, {MEND}'
    )
  return shape


@contextlib.contextmanager
def _opened(file: pathlib.Path) -> Iterator[IO[bytes]]:
  opened = gzip.open if file.suffix == '.gz' else open
  with files.reading(file, MEND), opened(file, 'rb') as stream:
    yield stream
