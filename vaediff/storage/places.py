"""Where things lie: the one place that asks for a home folder, reads `~`, and knows a bucket by its name."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Mapping

from vaediff.errors import UserError
from vaediff.storage import buckets


def anywhere(path: str | os.PathLike[str], meant: str = 'workdir') -> pathlib.Path:
  """Returns a path that may lie in a bucket, as `gs://bucket/run`; else as `expanded`.

  Every run's folder that a user names comes through here.

  Raises:
    UserError: see there; or it is in a store of another kind, or the store's package is not installed.
  """
  if isinstance(path, buckets.BucketPath):
    return path
  text = os.fspath(path)
  return buckets.parse(text, meant) if buckets.is_bucket(text) else expanded(path, meant)


def fetched(path: str, meant: str) -> pathlib.Path:
  """Returns a path of this machine for what is only read: a file or folder in a bucket is copied first.

  The copy lies in the user's caches and is kept; each call gets what has changed since.

  Raises:
    UserError: as `anywhere`; or there is nothing, or it cannot be read or stored.
  """
  from vaediff.storage import files, identity  # NumPy's, which the start of the process does without

  there = anywhere(path, meant)
  if not isinstance(there, buckets.BucketPath):
    return there
  here = cache(f'{meant} as a folder of this machine') / 'vaediff' / 'buckets'
  here = here / identity.digest(str(there)) / there.name
  try:
    with files.lock(here.parent, f'fetches {there}', wait=True):
      if not there.exists():
        raise UserError(f'{meant} is {str(there)!r}, and there is nothing')
      buckets.mirror(there, here)
  except OSError as error:
    raise UserError(
      f'{meant}={str(there)!r} cannot be copied to {here}: {files.reason(error)}. Mend that, or set '
      'XDG_CACHE_HOME to a folder that has room'
    ) from error
  return here


def move(folder: pathlib.Path, target: pathlib.Path) -> None:
  """Moves a folder to one that is empty or not there: at once, or in a bucket object by object.

  Raises:
    OSError: when that fails; the target then has nothing of it.
  """
  if not isinstance(folder, buckets.BucketPath):
    os.replace(folder, target)
    return
  try:
    folder.rename(target)
  except BaseException:
    remove(target)
    raise


def remove(folder: pathlib.Path) -> None:
  """Removes a folder and all in it, as far as that is possible."""
  if not isinstance(folder, buckets.BucketPath):
    shutil.rmtree(folder, ignore_errors=True)
    return
  with contextlib.suppress(OSError):
    folder.remove()


def expanded(path: str | os.PathLike[str], meant: str) -> pathlib.Path:
  """Returns a path whose `~` is the home folder, or that of another user for `~name`.

  Args:
    path: as a user writes it.
    meant: the field, flag or variable that holds it, for the message.

  Raises:
    UserError: when there is no such home folder, or the path holds a byte that no path can hold.
  """
  text = os.fspath(path)
  if '\0' in text:
    raise UserError(f'{meant} is {text!r}, which holds a NUL byte: no path can')
  if buckets.is_bucket(text):
    raise UserError(
      f'{meant} is {text!r}: it must be a folder of this machine. In a bucket can be run folders (--workdir, '
      '--out and fields named workdir) and data.path'
    )
  if not text.startswith('~'):
    return pathlib.Path(text)
  try:
    return pathlib.Path(text).expanduser()
  except RuntimeError as error:
    raise UserError(
      f'{meant} is {text!r}, and the home folder of this user is not known: HOME is not set and the system '
      'has no entry for the user. Set HOME, or give the whole path'
    ) from error


def home(instead: str) -> pathlib.Path:
  """Returns the home folder.

  Args:
    instead: what could be given so that no home folder is needed, for the message.

  Raises:
    UserError: when there is none.
  """
  try:
    return pathlib.Path.home()
  except RuntimeError as error:
    raise UserError(
      'the home folder of this user is not known: HOME is not set and the system has no entry for the user. '
      f'Set HOME, or give {instead}'
    ) from error


def cache(instead: str, environment: Mapping[str, str] = os.environ) -> pathlib.Path:
  """Returns where caches of this user lie: $XDG_CACHE_HOME, or ~/.cache where that is not set or empty.

  Args:
    instead: see `home`.
    environment: of the process.

  Raises:
    UserError: when neither is known.
  """
  given = environment.get('XDG_CACHE_HOME', '')
  if given:
    return expanded(given, 'XDG_CACHE_HOME')
  return home(f'XDG_CACHE_HOME, or {instead}') / '.cache'
