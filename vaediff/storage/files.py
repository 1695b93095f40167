"""Files that are written at once, read with one message for all that can be wrong, and locked.

A kill leaves the old file or the new one, never half of it. The system releases a lock with the process that
holds it, however it ends. In a bucket (`buckets`) a file is written here and sent as one object, and a lock
is an object that is renewed (`leases`).
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vaediff.errors import UserError
from vaediff.storage import buckets, leases

LONGEST = 300
"""Characters of a reason."""
LOCK = '.lock'
"""Name of the file of a lock."""
REMOVE = 'remove it and run the same command again: it is made anew'
"""What to do about a damaged file that is derived from others."""

OF_THE_SYSTEM = tuple(
  getattr(errno, name)
  for name in (
    'EACCES', 'EPERM', 'EIO', 'ENOMEM', 'EMFILE', 'ENFILE', 'ENOSPC', 'EDQUOT', 'EROFS', 'ESTALE',
    'ETIMEDOUT', 'ENOTCONN', 'EHOSTDOWN', 'EREMOTEIO', 'EBUSY', 'EAGAIN', 'ENXIO', 'ENODEV',
  )
  if hasattr(errno, name)
)  # fmt: skip
"""Errors that say nothing about the content of a file: what cannot be read now may be whole."""
IN_WORDS = (*map(os.strerror, OF_THE_SYSTEM), 'PERMISSION_DENIED', 'RESOURCE_EXHAUSTED', 'UNAVAILABLE')
"""How libraries say them."""


class Damaged(UserError):
  """A file that is there and can be read, but does not hold what it should."""


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a path of this machine to write to, which takes the place of `path` once that is done.

  The folder is made.

  Raises:
    UserError: when the file cannot be written: names it and the system's reason, such as a full disk.
  """
  remote = isinstance(path, buckets.BucketPath)
  folder = buckets.scratch(path) if remote else path.parent
  temporary = folder / f'.{path.name}.{os.getpid()}.tmp'
  try:
    folder.mkdir(parents=True, exist_ok=True)
    try:
      yield temporary
      if remote:
        path.upload(temporary)
      else:
        os.replace(temporary, path)
    finally:
      temporary.unlink(missing_ok=True)
  except OSError as error:
    raise UserError(
      f'{path} cannot be written: {reason(error)}; what was there before is unchanged'
    ) from error


def reason(error: BaseException) -> str:
  """Returns the first line of what the system or a library says, without a full stop.

  Of a long one the words of the system, such as 'No space left on device', and its beginning.
  """
  text = (error.strerror if isinstance(error, OSError) else '') or str(error).strip() or type(error).__name__
  line = text.splitlines()[0].rstrip('.')
  if len(line) <= LONGEST:
    return line
  said = next((words for words in map(os.strerror, OF_THE_SYSTEM) if words in line), '')
  return f'{said} ({line[:LONGEST]} ...)' if said else line[:LONGEST]


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a text file."""
  with replacing(path) as temporary:
    temporary.write_text(text, encoding='utf-8')


def write_json(path: pathlib.Path, value: Any, **options: Any) -> None:
  """Writes a JSON file, indented; `options` are those of `json.dumps`."""
  write_text(path, json.dumps(value, indent=2, **options))


def write_npz(path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
  """Writes arrays as npz, uncompressed."""
  with replacing(path) as temporary, open(temporary, 'wb') as file:
    np.savez(file, **arrays)


@contextlib.contextmanager
def reading(path: pathlib.Path, mend: str = REMOVE) -> Iterator[None]:
  """Turns whatever reading a file raises into one message, by its cause.

  Args:
    path: of the file, for the message.
    mend: what to do where the file is damaged, or missing if that is told apart from `REMOVE`.

  Raises:
    Damaged: for content that is not what it should be.
    UserError: when the file is missing, or the system does not let it be read (permission, input/output,
      memory): that is no damage, and the file stays.
  """
  try:
    yield
  except UserError:
    raise
  except FileNotFoundError as error:
    raise UserError(f'{path} does not exist' + ('' if mend == REMOVE else f'; {mend}')) from error
  except (OSError, MemoryError) as error:
    if isinstance(error, OSError) and error.errno is None:  # numpy's and zipfile's own, of malformed content
      raise Damaged(f'{path} is damaged ({reason(error)}); {mend}') from error
    raise UserError(f'{path} cannot be read: {reason(error)}. The file was left as it is') from error
  except Exception as error:  # parsers raise almost anything of malformed bytes
    raise Damaged(f'{path} is damaged ({reason(error)}); {mend}') from error


def read_json(path: pathlib.Path, mend: str = REMOVE) -> Any:
  """Returns the value of a JSON file; raises as `reading`."""
  with reading(path, mend):
    return json.loads(path.read_text(encoding='utf-8'))


def read_npz(path: pathlib.Path, mend: str = REMOVE) -> dict[str, np.ndarray]:
  """Returns the arrays of an npz file, whose checksums are compared; raises as `reading`."""
  with reading(path, mend), path.open('rb') as file:
    if not zipfile.is_zipfile(file):  # np.load would take a pickle for one
      raise ValueError('it is no npz file')
    file.seek(0)
    with np.load(file, allow_pickle=False) as stored:
      return {name: stored[name] for name in stored.files}


def said_by_the_system(error: BaseException | None) -> str:
  """Returns what the system did not let be done, of an error and of those that caused it; '' for nothing."""
  seen = set()
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in OF_THE_SYSTEM):
      return reason(error)
    if not isinstance(error, UserError) and any(text in str(error) for text in IN_WORDS):
      return reason(error)
    error = error.__cause__ or error.__context__
  return ''


def first_forbidden(folder: pathlib.Path) -> str:
  """Returns the first file or folder under a folder that may not be read; '' where all may. Opens none."""
  for root, names, paths in os.walk(folder):
    for path in (os.path.join(root, name) for name in (*names, *paths)):
      if os.access(path, os.F_OK) and not os.access(path, os.R_OK):
        return path
  return '' if os.access(folder, os.R_OK) or not os.access(folder, os.F_OK) else str(folder)


def first_unreadable(folder: pathlib.Path) -> str:
  """Returns which file of a folder the system does not let be read, and why; '' where all can be."""

  def refused(error: OSError):
    raise error

  try:
    for root, _, names in os.walk(folder, onerror=refused):
      for name in sorted(names):
        with open(pathlib.Path(root) / name, 'rb') as file:
          while file.read(2**20):
            pass
  except OSError as error:
    return f'{error.filename}: {reason(error)}' if error.errno in OF_THE_SYSTEM else ''
  return ''


@contextlib.contextmanager
def lock(folder: pathlib.Path, what: str, *, wait: bool = False) -> Iterator[bool]:
  """Holds a folder for this process; the system releases it with the process.

  Args:
    folder: made if it is not there; the lock is its file `LOCK`, which says who holds it.
    what: is done with the folder, for the message to others.
    wait: for the one who holds it; else that is an error. Gives whether it had to wait.

  Raises:
    UserError: when another process holds it: names host and process. Or the folder cannot be written.
  """
  path, waited = folder / LOCK, False
  if isinstance(folder, buckets.BucketPath):
    with contextlib.ExitStack() as held:
      try:
        waited = held.enter_context(leases.lease(path, what, wait=wait))
      except OSError as error:
        raise UserError(f'{folder} cannot be written: {reason(error)}') from error
      yield waited
      return
  try:
    folder.mkdir(parents=True, exist_ok=True)
    file = open(path, 'a+', encoding='utf-8')  # noqa: SIM115 (held until the end of the block)
  except OSError as error:
    raise UserError(f'{folder} cannot be written: {reason(error)}') from error
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      if error.errno not in (errno.EACCES, errno.EAGAIN):
        raise UserError(f'{path} cannot be locked: {reason(error)}') from error
      if not wait:
        raise UserError(
          f'{folder} is in use by {holder(path)}. Wait until it ends, stop it, or use another folder'
        ) from error
      fcntl.flock(file, fcntl.LOCK_EX)
      waited = True
    file.truncate(0)
    file.write(f'process {os.getpid()} on host {socket.gethostname()} ({what})')
    file.flush()
    yield waited


def holder(path: pathlib.Path) -> str:
  """Returns who holds a lock, as its file says."""
  with contextlib.suppress(OSError):
    return path.read_text(encoding='utf-8', errors='replace').strip() or 'another process'
  return 'another process'
