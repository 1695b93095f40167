"""Whatever torch.save has written, opened without PyTorch: no code of the file is run, and little of it read.

Training checkpoints hold far more than tensors: callbacks, optimizers, settings of a dozen libraries. What a
pickle names beyond tensors is a class made for that mention alone, whose instances swallow what is done to
them and do nothing (`Opaque`): nothing is looked up, imported or called. The bytes of tensors are read when
they are asked for, one storage after the other: of a file of gigabytes only the wanted networks.

Files of weights that others only measure with are read by `torch_file`, which refuses all it does not know.
"""

import contextlib
import dataclasses
import io
import pathlib
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from vaediff.errors import UserError
from vaediff.storage import files
from vaediff.weights import torch_file
from vaediff.weights.torch_file import AGAIN, STORAGE_TYPES, Storage, Tensor

Reader = Callable[[str], bytes]
"""The key of a storage -> its bytes."""


class Opaque:
  """What stands for anything that a pickle names and tensors do not need.

  Attributes:
    arguments: that it was made with.
    state: that was set, such as the fields of an `argparse.Namespace`.
    entries: of a mapping.
  """

  def __new__(cls, *arguments: Any, **_: Any) -> 'Opaque':
    """Takes any arguments; `__init__` is never called for some."""
    made = object.__new__(cls)
    made.arguments, made.state, made.entries = arguments, None, {}
    return made

  def __call__(self, *_: Any, **__: Any) -> 'Opaque':
    """Returns itself, whatever it is called with."""
    return self

  def __setstate__(self, state: Any) -> None:
    self.state = state

  def __setitem__(self, key: Any, value: Any) -> None:
    self.entries[key] = value

  def append(self, _: Any) -> None:
    """Swallows an element of a list."""

  def extend(self, _: Any) -> None:
    """Swallows elements of a list."""

  def add(self, _: Any) -> None:
    """Swallows an element of a set."""


class Items(dict):
  """An OrderedDict of a pickle; attributes that are set on it, such as `_metadata`, are left out."""

  def __setstate__(self, _: Any) -> None:
    """Swallows them."""


class Broken(NamedTuple):
  """A tensor that cannot be read, which matters only where it is wanted."""

  reason: str


def fields(value: Any) -> dict[Any, Any]:
  """Returns what a mapping holds, or what stands for one, or an object's fields; {} for anything else."""
  if isinstance(value, dict):
    return value
  if not isinstance(value, Opaque):
    return {}
  state = value.state if isinstance(value.state, dict) else {}
  return {**state, **value.entries}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Container:
  """An opened file.

  Attributes:
    path: of the file.
    content: what was saved, with `Tensor` for tensors and `Opaque` for what is not known.
    storages: opens the file for reading storages.
  """

  path: pathlib.Path
  content: Any
  storages: Callable[[], contextlib.AbstractContextManager[Reader]]

  def read(self, tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Returns tensors as arrays; each storage is read once, and let go before the next.

    Raises:
      UserError: when the file is truncated or damaged.
    """
    of_storage: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
      of_storage.setdefault(tensor.storage.key, []).append(name)
    found = {}
    with files.reading(self.path, AGAIN), self.storages() as storage:
      for key, names in of_storage.items():
        content = {key: storage(key)}
        for name in names:
          found[name] = torch_file.to_array(self.path, name, tensors[name], content)
    return {name: found[name] for name in tensors}


class _Unpickler(pickle.Unpickler):
  """Knows what tensors need; all else is opaque. Notes the types of the storages, None where unknown."""

  def __init__(self, file: Any):
    super().__init__(file, encoding='utf-8')
    self.dtypes: dict[str, np.dtype | None] = {}

  def find_class(self, module: str, name: str) -> Any:
    # A pickle can set attributes on what it is given: hence a new class or function each time.
    match module, name:
      case 'collections', 'OrderedDict':
        return type(name, (Items,), {})
      case 'torch', 'Size':
        return tuple
      case 'torch._utils', '_rebuild_tensor' | '_rebuild_tensor_v2':
        return lambda *arguments: _rebuilt(*arguments)
      case 'torch._utils', '_rebuild_parameter' | '_rebuild_parameter_with_state':
        return lambda tensor=None, *_: tensor
      case 'torch.storage', 'UntypedStorage':
        return 'ByteStorage'
      case 'torch', _ if name in STORAGE_TYPES:
        return name
    return type(f'{module}.{name}'.replace('\0', ''), (Opaque,), {})

  def persistent_load(self, pid: Any) -> Storage | Broken:
    kind, storage_type, key, _, numel, view = (*pid, None) if len(pid) == 5 else pid
    if kind != 'storage':
      raise pickle.UnpicklingError(f'{kind!r} is no storage')
    key = str(key)
    dtype = STORAGE_TYPES.get(storage_type) if isinstance(storage_type, str) else None
    if self.dtypes.setdefault(key, dtype) != dtype:
      raise pickle.UnpicklingError(f'storage {key} has two types')
    if dtype is None:
      return Broken(f'a storage of a type that is not known, {getattr(storage_type, "__name__", "")}')
    return Storage(key, dtype, *torch_file.counts([0, numel] if view is None else view[1:]))


def _rebuilt(storage: Any = None, offset: Any = 0, shape: Any = (), strides: Any = (), *_: Any) -> Any:
  """Returns a tensor, or what is wrong with it."""
  if isinstance(storage, Broken):
    return storage
  try:
    if not isinstance(storage, Storage) or len(shape) != len(strides):
      return Broken('a tensor without storage')
    counts = torch_file.counts
    return Tensor(storage, *counts([offset]), counts(tuple(shape)), counts(tuple(strides)))
  except (TypeError, pickle.UnpicklingError) as error:
    return Broken(str(error)[:100])


def opened(path: pathlib.Path) -> Container:
  """Returns what a file holds; of its tensors no more than where they lie.

  Raises:
    UserError: when the file is missing, damaged, or not written by PyTorch.
  """
  if path.is_dir():
    raise UserError(f'{path} is a folder, not a file of torch.save')
  with files.reading(path, AGAIN), path.open('rb') as file:
    is_zip = file.read(4) == torch_file.ZIP_MAGIC
  return _opened_zip(path) if is_zip else _opened_legacy(path)


@contextlib.contextmanager
def _in_zip(path: pathlib.Path) -> Iterator[None]:
  """Turns what a broken archive raises into one message."""
  try:
    yield
  except UserError:
    raise
  except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, NotImplementedError, RuntimeError, OSError,
          ValueError, MemoryError) as error:  # fmt: skip
    raise UserError(f'{path} is truncated or damaged ({error}): fetch it again') from error


def _opened_zip(path: pathlib.Path) -> Container:
  with _in_zip(path), zipfile.ZipFile(path) as archive:
    folder = torch_file.check_archive(path, archive, path.stat().st_size)
    unpickler = _Unpickler(io.BytesIO(archive.read(f'{folder}data.pkl')))
    content = torch_file.unpickled(unpickler, path)

  @contextlib.contextmanager
  def storages() -> Iterator[Reader]:
    with _in_zip(path), zipfile.ZipFile(path) as archive:
      yield lambda key: archive.read(f'{folder}data/{key}')

  return Container(path=path, content=content, storages=storages)


def _opened_legacy(path: pathlib.Path) -> Container:
  with files.reading(path, AGAIN), path.open('rb') as file:
    if torch_file.unpickled(_Unpickler(file), path) != torch_file.LEGACY_MAGIC:
      raise UserError(f'{path} is not a file of torch.save: it lacks the magic number')
    for _ in range(2):  # version of the layout, sizes of the writer's types
      torch_file.unpickled(_Unpickler(file), path)
    unpickler = _Unpickler(file)
    content = torch_file.unpickled(unpickler, path)
    keys = torch_file.unpickled(_Unpickler(file), path)
    places = _places(path, file, keys if isinstance(keys, list) else [keys], unpickler.dtypes)

  @contextlib.contextmanager
  def storages() -> Iterator[Reader]:
    with path.open('rb') as file:

      def read(key: str) -> bytes:
        first, length = places[key]
        file.seek(first)
        return file.read(length)

      yield read

  return Container(path=path, content=content, storages=storages)


def _places(
  path: pathlib.Path, file: Any, keys: list[Any], dtypes: Mapping[str, np.dtype | None]
) -> dict[str, tuple[int, int]]:
  """Returns where each storage of the older layout begins, and its length in bytes."""
  places, size = {}, path.stat().st_size
  for key in map(str, keys):
    if key not in dtypes:
      raise UserError(f'{path} is damaged: no tensor has the storage {key}; fetch it again')
    if dtypes[key] is None:
      raise UserError(f'{path} holds a storage of a type that is not known, so that it cannot be read on')
    head = file.read(8)
    length = struct.unpack('<q', head)[0] * dtypes[key].itemsize if len(head) == 8 else -1
    if not 0 <= length <= size - file.tell():
      raise UserError(f'{path} is truncated: it ends within storage {key}; fetch it again')
    places[key] = (file.tell(), length)
    file.seek(length, io.SEEK_CUR)
  return places
