"""State dicts that PyTorch wrote (.pth), read as NumPy arrays: needs no PyTorch, runs no code of the file.

A pickle may call whatever it names, so the unpickler here knows only the few names that tensors need, as
stand-ins that do no more than note what was asked for; the bytes are looked up afterwards. There are two
layouts: since PyTorch 1.6 a zip archive (data.pkl, and one member per storage), before that five pickles
in a row followed by the storages, each led by its length.
"""

import collections
import hashlib
import io
import math
import pathlib
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from vaediff.errors import UserError
from vaediff.storage import files

AGAIN = 'fetch it again'
MOST_AXES = 16
MOST_UNPACKED = 32
"""Times the size of a file that its members may have together: torch.save compresses nothing."""
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
ZIP_MAGIC = b'PK\x03\x04'
STORAGE_TYPES = {
  'FloatStorage': np.dtype('<f4'),
  'HalfStorage': np.dtype('<f2'),
  'DoubleStorage': np.dtype('<f8'),
  'BFloat16Storage': np.dtype(jnp.bfloat16),
  'LongStorage': np.dtype('<i8'),
  'IntStorage': np.dtype('<i4'),
  'ShortStorage': np.dtype('<i2'),
  'CharStorage': np.dtype('i1'),
  'ByteStorage': np.dtype('u1'),
  'BoolStorage': np.dtype('?'),
}
"""Element types by the name of PyTorch's class, little-endian as they are stored."""


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the tensors of a state dict by name; what else it holds is left out.

  Raises:
    UserError: when the file is missing, damaged, not written by PyTorch, no state dict, or names anything
      that tensors do not need (nothing of the kind is run).
  """
  if path.is_dir():
    raise UserError(f'{path} is a folder, not a file of torch.save')
  with files.reading(path, AGAIN):
    content = path.read_bytes()
  found, storages = _read_zip(path, content) if content[:4] == ZIP_MAGIC else _read_legacy(path, content)
  if not isinstance(found, Mapping):
    raise UserError(
      f'{path} holds a {type(found).__name__}, not a state dict: save model.state_dict() instead'
    )
  tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
  if not tensors:
    raise UserError(
      f'{path} holds no tensors, only {sorted(map(str, found))[:5]}: if the state dict is one of these,'
      ' save it alone'
    )
  with files.reading(path, AGAIN):  # sizes and places are whatever the file says
    return {str(name): to_array(path, str(name), value, storages) for name, value in tensors.items()}


def sha256_of(path: pathlib.Path) -> str:
  """Returns the sha256 of a file's bytes, hexadecimal.

  Raises:
    UserError: when the file cannot be read.
  """
  if path.is_dir():
    raise UserError(f'{path} is a folder, not a file of weights')
  with files.reading(path, AGAIN), path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def check_named_hash(path: pathlib.Path) -> None:
  """Checks a file whose name ends in the beginning of its sha256: `-<8 or more hex digits>.pth`.

  Other names are not checked.

  Raises:
    UserError: when the file's sha256 does not begin so, or it cannot be read.
  """
  named = re.search(r'-([0-9a-fA-F]{8,64})\.pth$', path.name)
  if named is None:
    return
  actual = sha256_of(path)
  if not actual.startswith(named[1].lower()):
    raise UserError(
      f'{path} is damaged, or another file: its sha256 should begin with {named[1]}, as its name says, but is'
      f' {actual}; fetch it again, or rename it if these digits are no hash'
    )


class Storage(NamedTuple):
  """A run of elements, of which a tensor shows a part; `first` is where it begins in the bytes of `key`."""

  key: str
  dtype: np.dtype
  first: int
  numel: int


class Tensor(NamedTuple):
  """Where a tensor's elements lie; offset and strides count elements."""

  storage: Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


def counts(values: Any) -> tuple[int, ...]:
  """Returns the values if all are non-negative integers: a pickle could hold anything in their place."""
  if not isinstance(values, tuple | list) or not all(
    isinstance(value, int) and value >= 0 for value in values
  ):
    raise pickle.UnpicklingError(f'{values!r} are no sizes')
  return tuple(values)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
  if not isinstance(storage, Storage) or len(shape) != len(strides):
    raise pickle.UnpicklingError('a tensor without storage')
  return Tensor(storage, *counts([offset]), counts(shape), counts(strides))


class _Unpickler(pickle.Unpickler):
  """Knows what tensors need, and notes the element types of the storages it meets."""

  def __init__(self, path: pathlib.Path, file: io.BytesIO):
    super().__init__(file, encoding='utf-8')
    self._path = path
    self.dtypes = {}

  def find_class(self, module: str, name: str) -> Any:
    # A pickle can also set attributes on what it is given. Hence new functions each time, text for the
    # storage types, and no class but built-in ones.
    match module, name:
      case 'collections', 'OrderedDict':
        return collections.OrderedDict
      case 'torch', 'Size':
        return tuple
      case 'torch._utils', '_rebuild_tensor' | '_rebuild_tensor_v2':
        return lambda *arguments: _rebuild_tensor(*arguments)
      case 'torch._utils', '_rebuild_parameter':
        return lambda tensor, *_: tensor
      case 'torch.storage', 'UntypedStorage':
        return 'ByteStorage'
      case 'torch', _ if name in STORAGE_TYPES:
        return name
    raise UserError(
      f'{self._path} asks for {module}.{name}, which is refused: only state dicts of plain tensors are read'
      f' (element types {", ".join(STORAGE_TYPES)}); do not trust the file, or save model.state_dict() again'
    )

  def persistent_load(self, pid: Any) -> Storage:
    # Since PyTorch 1.6 without the view: (key of the view, its first element, its length).
    kind, storage_type, key, _, numel, view = (*pid, None) if len(pid) == 5 else pid
    if kind != 'storage':
      raise pickle.UnpicklingError(f'{kind!r} is no storage')
    dtype, key = STORAGE_TYPES[storage_type], str(key)
    if self.dtypes.setdefault(key, dtype) != dtype:
      raise pickle.UnpicklingError(f'storage {key} has two types')
    first, numel = counts([0, numel] if view is None else view[1:])
    return Storage(key, dtype, first, numel)


def unpickled(unpickler: pickle.Unpickler, path: pathlib.Path) -> Any:
  """Returns the next object of a pickle; raises UserError where there is none."""
  try:
    return unpickler.load()
  except UserError:
    raise
  except Exception as error:  # bytes that are no pickle can raise anything
    raise UserError(
      f'{path} is damaged, or no file of torch.save ({type(error).__name__}: {error}): fetch it again'
    ) from error


def _read_zip(path: pathlib.Path, content: bytes) -> tuple[Any, dict[str, bytes]]:
  """Returns what was saved, with `Tensor`s for tensors, and the bytes of the storages by key."""
  try:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
      folder = check_archive(path, archive, len(content))
      unpickler = _Unpickler(path, io.BytesIO(archive.read(f'{folder}data.pkl')))
      found = unpickled(unpickler, path)
      return found, {key: archive.read(f'{folder}data/{key}') for key in unpickler.dtypes}
  except UserError:
    raise
  except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, NotImplementedError, RuntimeError, OSError,
          ValueError, MemoryError) as error:  # fmt: skip
    raise UserError(f'{path} is truncated or damaged ({error}): fetch it again') from error


def check_archive(path: pathlib.Path, archive: zipfile.ZipFile, size: int) -> str:
  """Returns the folder that an archive of torch.save has all in, with its slash; `size` in bytes.

  Raises:
    UserError: when it is none, would grow beyond all measure, or was written by a big-endian machine.
  """
  names = archive.namelist()
  folder = next(
    (name.removesuffix('data.pkl') for name in names if name.split('/')[1:] == ['data.pkl']), None
  )
  if folder is None:
    raise UserError(f'{path} is a zip archive without data.pkl: not a file of torch.save')
  unpacked = sum(member.file_size for member in archive.infolist())
  if unpacked > MOST_UNPACKED * size:
    raise UserError(
      f'{path} would grow from {size} to {unpacked} bytes: it is no file of torch.save, do not use it'
    )
  order = archive.read(f'{folder}byteorder') if f'{folder}byteorder' in names else b'little'
  if order != b'little':
    raise UserError(f'{path} is {order.decode(errors="replace")}-endian, only little is read: save it again')
  return folder


def _read_legacy(path: pathlib.Path, content: bytes) -> tuple[Any, dict[str, bytes]]:
  """Same as `_read_zip` for the layout before PyTorch 1.6."""
  file = io.BytesIO(content)
  if unpickled(_Unpickler(path, file), path) != LEGACY_MAGIC:
    raise UserError(f'{path} is not a file of torch.save: it lacks the magic number')
  # The version of the layout has always been 1001; the sizes of the writer's C types do not matter, as
  # storages are written little-endian by any machine.
  unpickled(_Unpickler(path, file), path)
  unpickled(_Unpickler(path, file), path)
  unpickler = _Unpickler(path, file)
  found = unpickled(unpickler, path)
  keys = unpickled(_Unpickler(path, file), path)
  storages = {}
  for key in map(str, keys if isinstance(keys, list) else [keys]):
    if key not in unpickler.dtypes:
      raise UserError(f'{path} is damaged: no tensor has the storage {key}; fetch it again')
    head = file.read(8)
    length = struct.unpack('<q', head)[0] * unpickler.dtypes[key].itemsize if len(head) == 8 else -1
    if not 0 <= length <= len(content) - file.tell():
      raise UserError(f'{path} is truncated: it ends within storage {key}; fetch it again')
    storages[key] = file.read(length)
  return found, storages


def to_array(path: pathlib.Path, name: str, tensor: Tensor, storages: Mapping[str, bytes]) -> np.ndarray:
  """Returns a tensor's elements in order, of a layout of their own."""
  storage, offset, shape, strides = tensor
  if math.prod(shape) > max(storage.numel, 1) or len(shape) > MOST_AXES:
    raise UserError(
      f'{path}: {name} has the shape {str(shape)[:100]}, more elements than its storage of {storage.numel}; '
      'save a state dict of plain tensors, without expand()'
    )
  last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
  size = storage.dtype.itemsize
  content = memoryview(storages.get(storage.key, b''))[storage.first * size :][: storage.numel * size]
  if len(content) < storage.numel * size or (0 not in shape and last >= storage.numel):
    raise UserError(
      f'{path} is truncated or damaged: {name} reaches past the end of its storage; fetch it again'
    )
  if 0 in shape:
    return np.zeros(shape, storage.dtype)
  flat = np.frombuffer(content, storage.dtype)[offset:]
  return np.lib.stride_tricks.as_strided(
    flat, shape, [stride * size if length > 1 else 0 for length, stride in zip(shape, strides, strict=True)]
  ).copy()
