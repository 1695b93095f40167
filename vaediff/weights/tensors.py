"""Weights as files: fingerprints, safetensors, and the folder they are kept in."""

import contextlib
import hashlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from vaediff.errors import UserError
from vaediff.storage import files, places


def folder(weights_dir: str = '') -> pathlib.Path:
  """Returns where weights are kept: `weights_dir`, or $VAEDIFF_WEIGHTS, or ~/.cache/vaediff/weights."""
  if weights_dir:
    return places.expanded(weights_dir, 'config.evaluate.weights_dir')
  if os.environ.get('VAEDIFF_WEIGHTS', ''):
    return places.expanded(os.environ['VAEDIFF_WEIGHTS'], 'VAEDIFF_WEIGHTS')
  return places.cache('config.evaluate.weights_dir, or VAEDIFF_WEIGHTS') / 'vaediff' / 'weights'


def fingerprint(tensors: Mapping[str, np.ndarray]) -> str:
  """Returns the sha256 of the tensors' names, shapes, types and little-endian bytes, hexadecimal.

  It depends on the values alone, not on the file format: a .pth file and the safetensors file converted
  from it have the same.
  """
  digest = hashlib.sha256()
  for name in sorted(tensors):
    value = np.asarray(tensors[name])  # ascontiguousarray would make a scalar a vector
    digest.update(f'{name} {value.shape} {value.dtype.name}\n'.encode())
    digest.update(value.astype(value.dtype.newbyteorder('<')).tobytes())
  return digest.hexdigest()


def save(path: pathlib.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
  """Writes a safetensors file at once: a kill leaves the old file or the new one."""
  arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
  # bytes first: the library would make a file that its owner alone can read, and folders are shared
  with files.replacing(path) as temporary:
    temporary.write_bytes(safetensors.numpy.save(arrays, metadata=dict(metadata)))


def load(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Returns the tensors of a safetensors file, and its metadata.

  Raises:
    UserError: when the file is missing or damaged.
  """
  with _opened(path) as file:
    return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def load_shapes(path: pathlib.Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
  """Returns the shapes of the tensors of a safetensors file, and its metadata; raises as `load`."""
  with _opened(path) as file:
    names = list(file.keys())  # noqa: SIM118
    return {name: tuple(file.get_slice(name).get_shape()) for name in names}, file.metadata() or {}


def load_some(path: pathlib.Path, names: Iterable[str]) -> dict[str, np.ndarray]:
  """Returns some of the tensors of a safetensors file; raises as `load`."""
  with _opened(path) as file:
    return {name: file.get_tensor(name) for name in names}


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
  if path.is_dir():
    raise UserError(f'{path} is a folder, not a safetensors file')
  with files.reading(path, 'fetch or convert it again'):
    try:
      with safetensors.safe_open(path, framework='numpy') as file:
        yield file
    except safetensors.SafetensorError as error:
      raise files.Damaged(f'{path} is not a readable safetensors file: {error}') from error
