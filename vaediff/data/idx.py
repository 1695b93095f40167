"""Images as stored, from idx files: the format of MNIST and its relatives.

Big-endian: two zero bytes, a type byte (8 = uint8), the number of axes, the length of each axis as
int32, then the values (LeCun, Cortes and Burges, The MNIST database).
"""

import functools
import gzip
import pathlib
import zlib
from typing import Any

import ml_collections
import numpy as np

from vaediff.data.readers import Reader, parse_split, select, stamp
from vaediff.errors import UserError

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
    folder = pathlib.Path(data.path).expanduser()
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
    return images[part, :, :, None], labels[part]

  @functools.cached_property
  def num_classes(self) -> int:
    """See `Reader`."""
    return len(self.label_names) or int(read_idx(self._classes_file, 1).max()) + 1

  def __len__(self) -> int:
    return len(self._content[1])

  def fingerprint(self) -> Any:
    """See `Reader`."""
    return [stamp(file) for file in (self._images_file, self._labels_file, self._classes_file)]

  def read(self, index: int) -> tuple[np.ndarray, int]:
    """See `Reader`."""
    images, labels = self._content
    return images[index], int(labels[index])

  def locate(self, index: int) -> str:
    """See `Reader`."""
    return f'{self._images_file}, image {index} of {self._expression}'


def find_idx(folder: pathlib.Path, name: str) -> pathlib.Path:
  """Returns the idx file `name`, plain or .gz.

  Raises:
    UserError: neither is in the folder.
  """
  for file in (folder / name, folder / f'{name}.gz'):
    if file.is_file():
      return file
  raise UserError(
    f"data.path: no {name} or {name}.gz in '{folder}'; data.source='idx' needs the four files of an"
    ' MNIST-like data set. For Fashion-MNIST on Debian or Ubuntu: apt-get install'
    " dataset-fashion-mnist, then data.path='/usr/share/datasets/fashion-mnist'"
  )


def read_idx(file: pathlib.Path, num_axes: int) -> np.ndarray:
  """Returns the uint8 array of an idx file.

  Raises:
    UserError: wrong magic number, or fewer or more bytes than the header announces.
  """
  try:
    content = gzip.decompress(file.read_bytes()) if file.suffix == '.gz' else file.read_bytes()
  except (OSError, EOFError, zlib.error) as error:
    raise UserError(f'{file} cannot be read ({error}): fetch it again') from error
  magic = bytes([0, 0, 8, num_axes])
  if content[:4] != magic:
    raise UserError(
      f'{file} starts with 0x{content[:4].hex()}, but an idx file of {num_axes} uint8 axes with'
      f' 0x{magic.hex()}: it is another kind of file, or damaged'
    )
  header = 4 + 4 * num_axes
  shape = np.frombuffer(content[4:header].ljust(header - 4, b'\0'), '>i4').tolist()
  expected = header + int(np.prod(shape, dtype=np.int64))
  if len(content) != expected:
    raise UserError(
      f'{file} holds {len(content)} bytes, but its header announces {expected} (shape {shape}):'
      ' it is truncated or damaged, fetch it again'
    )
  return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
