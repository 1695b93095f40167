"""Images as stored, from one npz file (`numpy.savez`)."""

import functools
import math
import os
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np

from vaediff.data import paths
from vaediff.data.readers import (
  Example,
  Reader,
  Stretch,
  parse_split,
  select_shuffled,
  shuffled_stretch,
  stamps,
)
from vaediff.data.resize import CHANNELS
from vaediff.errors import UserError
from vaediff.storage import files, places

KEYS = {'images': 'labels', 'image': 'label', 'x_train': 'y_train', 'arr_0': 'arr_1'}
"""Names of the images, and of the labels that belong to them ('labels' is always understood)."""
MEND = 'write it again with numpy.savez(file, images=..., labels=...)'
MOST_DEFLATED = 1032  # times: zlib makes nothing smaller


class NpzReader(Reader):
  """The images of `data.path`, in a fixed shuffled order, of which `data.*_split` are slices."""

  label_names: tuple[str, ...] = ()

  def __init__(self, data: ml_collections.ConfigDict, split: str):
    self._file = places.fetched(data.path, 'data.path')
    self._field = f'{split}_split'
    self._expression = data[self._field]
    parse_split(self._expression, self._field)
    if not data.path or not paths.is_file(self._file):
      raise UserError(f"data.path={data.path!r} is no file; data.source='npz' needs a .npz file")

  @functools.cached_property
  def _content(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    images, labels = load_npz(self._file)
    indices = select_shuffled(self._expression, self._field, len(images))
    if labels is None:
      return images[indices], np.zeros(len(indices), np.int32), indices, 0
    return images[indices], labels[indices], indices, int(labels.max()) + 1

  @property
  def num_classes(self) -> int:
    """See `Reader`."""
    return self._content[3]

  def __len__(self) -> int:
    return len(self._content[0])

  def fingerprint(self) -> Any:
    """See `Reader`."""
    return stamps([self._file])

  def stretches(self) -> Sequence[Stretch]:
    """See `Reader`."""
    return shuffled_stretch(self._expression, self._field, count_npz(self._file))

  def read(self, index: int) -> Example:
    """See `Reader`."""
    images, labels, _, _ = self._content
    return Example(images[index], int(labels[index]))

  def locate(self, index: int) -> str:
    """See `Reader`."""
    return f'{self._file}, image {self._content[2][index]}'


def load_npz(file: pathlib.Path) -> tuple[np.ndarray, np.ndarray | None]:
  """Returns the images, uint8 [N, H, W, C], and labels of an npz file.

  Nothing is read before its header is known to be sane.

  Raises:
    UserError: the file is damaged, has no images under a known name, or not as uint8.
  """
  with files.reading(file, MEND), zipfile.ZipFile(file) as archive:
    found = {name.removesuffix('.npy'): name for name in archive.namelist()}
    key = _image_key(file, found)
    shape, dtype = _header(file, archive, found[key])
    _check_images(file, key, shape, dtype)
    label_key = next((k for k in ('labels', KEYS[key]) if k in found), None)
    if label_key is not None:
      _check_labels(file, label_key, *_header(file, archive, found[label_key]), shape[0])
    images = _read(archive, found[key])
    images = images[..., None] if images.ndim == 3 else images
    if label_key is None:
      return images, None
    labels = _read(archive, found[label_key])
  if labels.min() < 0:
    raise UserError(
      f'{file}: the smallest of {label_key!r} is {labels.min()}, but classes are numbered from 0 on: number'
      ' them anew, or leave the labels out'
    )
  return images, labels


def count_npz(file: pathlib.Path) -> int:
  """Returns how many images an npz file holds, from its header; raises as `load_npz`."""
  with files.reading(file, MEND), zipfile.ZipFile(file) as archive:
    found = {name.removesuffix('.npy'): name for name in archive.namelist()}
    return _header(file, archive, found[_image_key(file, found)])[0][0]


def _image_key(file: pathlib.Path, found: dict[str, str]) -> str:
  key = next((k for k in KEYS if k in found), None)
  if key is None:
    raise UserError(f'{file} holds {sorted(found)}, but images are looked for under {tuple(KEYS)}')
  return key


def _header(file: pathlib.Path, archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype]:
  """Returns shape and type of an array of the archive, after comparing them with the bytes that are there."""
  with archive.open(name) as member:
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
      shape, _, dtype = np.lib.format.read_array_header_1_0(member)
    elif version == (2, 0):
      shape, _, dtype = np.lib.format.read_array_header_2_0(member)
    else:
      raise ValueError(f'{name} is of npy version {version[0]}.{version[1]}, and not 1.0 or 2.0')
    start = member.tell()
  info = archive.getinfo(name)
  if dtype.hasobject:
    return shape, dtype  # Its size says nothing; it is refused by its type.
  size = math.prod(shape) * dtype.itemsize
  if min(shape, default=0) < 0 or start + size != info.file_size:
    raise ValueError(
      f'the header of {name} announces {dtype}{list(shape)}, {start + size} bytes, and it holds'
      f' {info.file_size}'
    )
  if info.file_size > max(1, info.compress_size) * MOST_DEFLATED:
    raise ValueError(f'{name} cannot hold {info.file_size} bytes in {info.compress_size} compressed ones')
  memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  if size > memory:
    raise UserError(
      f'{file}: {name} needs {size} bytes of memory, and this machine has {memory}; store the images as files'
      " and use data.source='image_folder'"
    )
  return shape, dtype


def _read(archive: zipfile.ZipFile, name: str) -> np.ndarray:
  with archive.open(name) as member:
    array = np.lib.format.read_array(member, allow_pickle=False)
    if member.read(1):  # At its end zipfile compares the checksum.
      raise ValueError(f'{name} holds more than its header announces')
  return array


def _check_images(file: pathlib.Path, key: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
  """Raises UserError where these are no images; what it advises is accepted."""
  what = f'{file}: {key!r} is {dtype}{list(shape)}, but must be uint8 [N, H, W] or [N, H, W, C], C = 1 or 3. '
  advice = []
  if len(shape) == 4 and shape[-1] not in CHANNELS:
    advice.append(_channels_advice(shape))
  elif len(shape) not in (3, 4):
    advice.append('Give it these axes')
  if dtype != np.uint8:
    advice.append(
      'Convert x in [0, 1] with np.round(255 * x).astype(np.uint8), x in [-1, 1] with np.round(127.5 * (x +'
      ' 1)).clip(0, 255).astype(np.uint8), and x in [0, 255] with np.round(x).astype(np.uint8)'
    )
  if advice:
    raise UserError(what + '. '.join(advice))
  if not math.prod(shape):
    raise UserError(f'{file} holds no image: {key!r} is {dtype}{list(shape)}; {MEND}')


def _channels_advice(shape: tuple[int, ...]) -> str:
  if shape[1] in CHANNELS:
    return 'Move the channels from the front to the end: x.transpose(0, 2, 3, 1)'
  if shape[1] in (2, 4):
    return (
      'Move the channels from the front to the end and leave out alpha:'
      f' x[:, :{shape[1] - 1}].transpose(0, 2, 3, 1)'
    )
  if shape[-1] in (2, 4):
    return f'Leave out alpha, the last channel: x[..., :{shape[-1] - 1}]'
  return f'Choose 1 or 3 of the {shape[-1]} channels, such as x[..., :3]'


def _check_labels(file: pathlib.Path, key: str, shape: tuple[int, ...], dtype: np.dtype, count: int) -> None:
  if shape == (count,) and dtype.kind in 'iu':
    return
  raise UserError(
    f'{file}: {key!r} is {dtype}{list(shape)}, but must be one non-negative integer per image, [{count}].'
    ' Convert a column with y[:, 0], one-hot rows with y.argmax(-1), whole numbers of another type with'
    ' y.astype(np.int32)'
  )
