"""Files as torch.save writes them, made of nested dicts of arrays without PyTorch."""

import contextlib
import io
import pickle
import struct
import sys
import types
import zipfile

import numpy as np

STORAGES = {
  'float32': 'FloatStorage',
  'float64': 'DoubleStorage',
  'int64': 'LongStorage',
  'float16': 'HalfStorage',
}
MAGIC, VERSION, SYSTEM = 0x1950A86A20F9469CFC6C, 1001, {'little_endian': True}


def _module(name, **members):
  module = types.ModuleType(name)
  for key, value in members.items():
    value.__module__, value.__qualname__, value.__name__ = name, key, key
    setattr(module, key, value)
  return module


@contextlib.contextmanager
def _torch():
  """Stand-ins of the names that a pickle of tensors has."""
  types_of = {name: type(name, (), {}) for name in STORAGES.values()}
  made = {
    'torch': _module('torch', **types_of),
    'torch._utils': _module('torch._utils', _rebuild_tensor_v2=lambda *arguments: arguments),
  }
  before = {name: sys.modules.get(name) for name in made}
  sys.modules.update(made)
  try:
    yield made
  finally:
    for name, module in before.items():
      sys.modules.pop(name)
      if module is not None:
        sys.modules[name] = module


class _Storage:
  def __init__(self, key, array):
    self.key, self.array = key, array


def _pickled(content, modules, storages):
  class Pickler(pickle.Pickler):
    def persistent_id(self, value):
      if isinstance(value, _Storage):
        kind = getattr(modules['torch'], STORAGES[value.array.dtype.name])
        return ('storage', kind, value.key, 'cpu', value.array.size)
      return None

    def reducer_override(self, value):
      if not isinstance(value, np.ndarray):
        return NotImplemented
      storage = _Storage(str(len(storages)), np.array(value, order='C'))
      storages.append(storage)
      strides = tuple(stride // storage.array.itemsize for stride in storage.array.strides)
      arguments = (storage, 0, value.shape, strides, False, {})
      return modules['torch._utils']._rebuild_tensor_v2, arguments

  file = io.BytesIO()
  Pickler(file, protocol=2).dump(content)
  return file.getvalue()


def write(path, content, *, legacy=False):
  """Writes what `torch.save(content, path)` would, arrays as tensors."""
  storages = []
  with _torch() as modules:
    body = _pickled(content, modules, storages)
  if not legacy:
    write_zip(path, body, {storage.key: storage.array.tobytes() for storage in storages})
    return
  parts = [pickle.dumps(value, 2) for value in (MAGIC, VERSION, SYSTEM)] + [body]
  parts.append(pickle.dumps([storage.key for storage in storages], 2))
  for storage in storages:
    parts += [struct.pack('<q', storage.array.size), storage.array.tobytes()]
  path.write_bytes(b''.join(parts))


def write_zip(path, body, storages=None):
  """Writes an archive of torch.save around a pickle."""
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('archive/data.pkl', body)
    archive.writestr('archive/version', '3\n')
    for key, content in (storages or {}).items():
      archive.writestr(f'archive/data/{key}', content)
