"""Weights as files: fingerprints, safetensors, and the folder they are kept in."""

import hashlib
import os
import pathlib
from collections.abc import Mapping

import numpy as np
import safetensors
import safetensors.numpy

from vaediff import files
from vaediff.errors import UserError


def folder(weights_dir: str = '') -> pathlib.Path:
  """Returns where weights are kept: `weights_dir`, or $VAEDIFF_WEIGHTS, or ~/.cache/vaediff/weights."""
  chosen = weights_dir or os.environ.get('VAEDIFF_WEIGHTS', '')
  if chosen:
    return pathlib.Path(chosen).expanduser()
  cache = os.environ.get('XDG_CACHE_HOME', '')
  return (pathlib.Path(cache) if cache else pathlib.Path.home() / '.cache') / 'vaediff' / 'weights'


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
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
  except FileNotFoundError as error:
    raise UserError(f'{path} does not exist') from error
  except safetensors.SafetensorError as error:
    raise UserError(f'{path} is not a readable safetensors file: {error}') from error
