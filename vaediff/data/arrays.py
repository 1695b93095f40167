"""Arrays on disk, and digests of what they hold: an array that was changed is noticed when it is opened.

The digest of an array covers its shape, its type and all its bytes in order: sha256 of the sha256 of every
`ROWS` rows, so that threads that make the rows can share the work.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from vaediff.errors import UserError
from vaediff.storage import files, identity
from vaediff.storage.files import Damaged

ROWS = 64  # Of a part.
ALWAYS_READ = 2**28  # Bytes; a larger file is read whole only where its size or time is another than it was.
YOUNG = 2 * 10**9  # Nanoseconds; a file written later may be written again without another time.


def join(shape: tuple[int, ...], dtype: np.dtype | type, parts: Iterable[bytes]) -> str:
  """Returns the digest of an array from the sha256 of each of its parts, in order."""
  header = json.dumps([list(shape), np.dtype(dtype).str]).encode()
  return identity.of_parts([header, *parts])


def digest_of(array: np.ndarray) -> str:
  """Returns the digest of an array in memory."""
  rows = (np.ascontiguousarray(array[i : i + ROWS]) for i in range(0, len(array), ROWS))
  return join(array.shape, array.dtype, (hashlib.sha256(part).digest() for part in rows))


def digest_of_texts(texts: Sequence[str]) -> str:
  """Returns the digest of texts, in order."""
  return identity.digest(list(texts))


def of_split(images: str, labels: str) -> str:
  """Returns the fingerprint of a split of a data set from the digests of its images and labels."""
  return identity.digest({'images': images, 'labels': labels})


def digest_of_file(path: pathlib.Path) -> str:
  """Returns the digest of a .npy file, of what is on disk now; raises as `files.reading`."""
  with files.reading(path):
    return _read_digest(path, _map(path))


def open_array(
  path: pathlib.Path,
  shape: tuple[int, ...],
  dtype: np.dtype | type,
  digest: str,
  mend: str = files.REMOVE,
) -> np.ndarray:
  """Returns a .npy file, memory-mapped, after comparing it with what is known of it.

  A file above `ALWAYS_READ` bytes is read whole only if its size or time is not that of the last time: they
  are kept beside it, where the folder lets us write.

  Args:
    path: of the file.
    shape: that it must have.
    dtype: that it must have.
    digest: that it must have, of `digest_of` or `digest_of_file`.
    mend: what to do where it has another, for the message.

  Raises:
    Damaged: it is missing, malformed, or holds something else.
    UserError: the system does not let it be read.
  """
  with files.reading(path, mend):
    if not path.exists():
      raise Damaged(f'{path} is missing; {mend}')
    array, dtype = _map(path), np.dtype(dtype)
    if array.shape != tuple(shape) or array.dtype != dtype:
      raise ValueError(f'it holds {array.dtype}{list(array.shape)} and not {dtype}{list(shape)}')
    state = _state(path)
    if state['size'] <= ALWAYS_READ or not _was_compared(path, state, digest):
      found = _read_digest(path, array)
      if found != digest:
        raise ValueError(f'it was changed after it was made: its digest is {found} and not {digest}')
      if state['size'] > ALWAYS_READ and time.time_ns() - state['mtime_ns'] > YOUNG:
        with contextlib.suppress(UserError):  # A folder that is only read: it is read whole next time.
          files.write_json(_beside(path), state | {'digest': digest})
  return array


class Writer:
  """Writes a .npy file row by row, from any thread.

  A full disk raises OSError with the file's name; writing to a memory map it would end the process.
  """

  def __init__(self, path: pathlib.Path, shape: tuple[int, ...], dtype: np.dtype | type):
    self._path, self._shape, self._dtype = path, tuple(shape), np.dtype(dtype)
    self._file = open(path, 'wb', buffering=0)  # noqa: SIM115 (closed by __exit__)
    header = {'descr': self._dtype.str, 'fortran_order': False, 'shape': self._shape}
    try:
      np.lib.format.write_array_header_1_0(self._file, header)
    except BaseException:
      self._file.close()
      raise
    self._start = self._file.tell()

  def __enter__(self) -> 'Writer':
    return self

  def __exit__(self, *error: object) -> None:
    self._file.close()

  def write(self, first: int, rows: np.ndarray) -> None:
    """Writes rows, of the array's type, from the row `first` on."""
    if rows.dtype != self._dtype or rows.shape[1:] != self._shape[1:] or first + len(rows) > self._shape[0]:
      raise ValueError(f'{rows.dtype}{rows.shape} at row {first} of {self._dtype}{self._shape}')
    content = memoryview(np.ascontiguousarray(rows)).cast('B') if rows.size else memoryview(b'')
    offset = self._start + first * int(np.prod(self._shape[1:], dtype=np.int64)) * self._dtype.itemsize
    while content:
      try:
        written = os.pwrite(self._file.fileno(), content, offset)
      except OSError as error:
        raise OSError(error.errno, error.strerror, str(self._path)) from error
      content, offset = content[written:], offset + written


def _map(path: pathlib.Path) -> np.memmap:
  array = np.load(path, mmap_mode='r', allow_pickle=False)
  if not isinstance(array, np.memmap) or not array.ndim or not array.flags.c_contiguous:
    raise ValueError('it is no .npy file of rows, one after the other')
  return array


def _read_digest(path: pathlib.Path, array: np.memmap) -> str:
  """Returns the digest of a file, by reading it: a disk that fails ends a process that reads a memory map."""

  def parts() -> Iterator[bytes]:
    row = array.nbytes // max(1, len(array))
    with open(path, 'rb') as file:
      file.seek(array.offset)
      for first in range(0, len(array), ROWS):
        wanted = row * min(ROWS, len(array) - first)
        content = file.read(wanted)
        if len(content) != wanted:
          raise ValueError('it became shorter while it was read')
        yield hashlib.sha256(content).digest()

  return join(array.shape, array.dtype, parts())


def _state(path: pathlib.Path) -> dict[str, int]:
  status = path.stat()
  return {'size': status.st_size, 'mtime_ns': status.st_mtime_ns}


def _beside(path: pathlib.Path) -> pathlib.Path:
  return path.with_name(f'{path.name}.compared.json')


def _was_compared(path: pathlib.Path, state: dict[str, int], digest: str) -> bool:
  try:
    return files.read_json(_beside(path)) == state | {'digest': digest}
  except UserError:  # None, or not readable: the array is read whole, which is never wrong.
    return False
