"""Folders in buckets, `gs://bucket/run` or `s3://bucket/run`: paths whose files are objects of a store.

A `BucketPath` is a `pathlib.Path`: it is read from as any other (`read_bytes`, `open`, `exists`, `iterdir`,
`glob`, `stat`), so that what reads a run need not know where it lies. `epath.Path` is none, and passes on
what libraries raise: a broken connection would look like damage, or like nothing there. Here every error of a
store is an `OSError` with a number, and only what the store says is not there counts as missing.

Written is whole objects alone, by `put` and `upload`: an object is there once all of its bytes are, and what
was there before is there until then. Nothing can be appended to, mapped into memory or renamed at once; who
needs that works in a folder of this machine (`Beside`, `fetched`), of which this file keeps the copy.

What talks to a store is `fsspec` with `gcsfs` or `s3fs`: the extra `[cloud]`.
"""

import atexit
import contextlib
import datetime
import errno
import fnmatch
import functools
import hashlib
import io
import os
import pathlib
import shutil
import stat
import tempfile
import types
from collections.abc import Iterator
from typing import Any

from vaediff.errors import UserError

SCHEMES = ('gs', 's3')  # of the stores that a user can name
SEPARATOR = '://'
KNOWN = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
"""Errors that libraries of stores raise for what they say."""
NUMBERS = (errno.ENOENT, errno.EEXIST, errno.EACCES, errno.EISDIR, errno.ENOTDIR)


class BucketPath(pathlib.PosixPath):
  """A path in a bucket, `<scheme>://<bucket>/<path>`. A folder is there as long as an object lies in it."""

  def __str__(self) -> str:
    text = super().__str__()
    scheme, colon, rest = text.partition(':/')
    return f'{scheme}{SEPARATOR}{rest.lstrip("/")}' if colon else text

  def __fspath__(self) -> str:
    return str(self)

  def __repr__(self) -> str:
    return f'BucketPath({str(self)!r})'

  @property
  def scheme(self) -> str:
    """Of the store, as 'gs'."""
    return self.parts[0].removesuffix(':')

  @property
  def _fs(self) -> Any:
    return filesystem(self.scheme)

  def _found(self, name: str) -> 'BucketPath':
    """Returns the path of an object that the store has named, with or without the scheme."""
    return type(self)(f'{self.scheme}{SEPARATOR}{name.partition(SEPARATOR)[2] or name.lstrip("/")}')

  def _info(self) -> dict[str, Any] | None:
    """Returns what the store says of an object or folder; None where there is none."""
    try:
      with saying(self):
        return self._fs.info(str(self))
    except FileNotFoundError:
      return None

  def absolute(self) -> 'BucketPath':
    """Returns the path: it is."""
    return self

  def resolve(self, strict: bool = False) -> 'BucketPath':
    """Returns the path: there are no links."""
    return self

  def expanduser(self) -> 'BucketPath':
    """Returns the path: there are no homes."""
    return self

  def exists(self, **_: Any) -> bool:
    """Returns whether there is such an object or folder; raises OSError where the store does not say."""
    return self._info() is not None

  def is_file(self, **_: Any) -> bool:
    """Returns whether there is such an object."""
    found = self._info()
    return found is not None and found['type'] == 'file'

  def is_dir(self, **_: Any) -> bool:
    """Returns whether an object lies below."""
    found = self._info()
    return found is not None and found['type'] == 'directory'

  def is_symlink(self) -> bool:
    """Returns False: a bucket has no links."""
    return False

  def stat(self, **_: Any) -> Any:
    """Returns size, time and mode; raises FileNotFoundError where there is nothing."""
    found = self._info()
    if found is None:
      raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
    seconds = changed(found)
    return types.SimpleNamespace(
      st_size=int(found['size'] or 0),
      st_mtime=seconds,
      st_mtime_ns=int(seconds * 1e9),
      st_mode=(stat.S_IFDIR if found['type'] == 'directory' else stat.S_IFREG) | 0o644,
    )

  def read_bytes(self) -> bytes:
    """Returns the content of an object."""
    with saying(self):
      return self._fs.cat_file(str(self))

  def read_text(self, encoding: str | None = None, errors: str | None = None, **_: Any) -> str:
    """Returns the content of an object as text, UTF-8 by default."""
    return self.read_bytes().decode(encoding or 'utf-8', errors or 'strict')

  def open(self, mode: str = 'r', *_: Any, encoding: str | None = None, **__: Any) -> Any:
    """Opens an object, which is read at once."""
    if set(mode) - set('rbt'):
      raise io.UnsupportedOperation(f'{self}: an object of a bucket is written whole, by `put` or `upload`')
    content = io.BytesIO(self.read_bytes())
    return content if 'b' in mode else io.TextIOWrapper(content, encoding=encoding or 'utf-8')

  def iterdir(self) -> Iterator['BucketPath']:
    """Yields what lies in a folder; raises FileNotFoundError where there is nothing."""
    with saying(self):
      names = self._fs.ls(str(self), detail=False)
    for name in sorted(names):
      found = self._found(name.rstrip('/'))
      if found != self:  # a folder may have an object of its own name
        yield found

  def glob(self, pattern: str, **_: Any) -> Iterator['BucketPath']:
    """Yields the objects below a folder that match part by part, in order; no folders."""
    wanted = pathlib.PurePosixPath(pattern).parts
    for path in self.objects():
      parts = path.relative_to(self).parts
      if len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted)):
        yield path

  def rglob(self, pattern: str, **_: Any) -> Iterator['BucketPath']:
    """Yields the objects below a folder whose last name matches, in order."""
    yield from (path for path in self.objects() if fnmatch.fnmatchcase(path.name, pattern))

  def objects(self) -> dict['BucketPath', tuple[int, float, str]]:
    """Returns of every object below a folder its size, when it was written, and what tells versions apart.

    Of an object it is that one; {} where there is none.
    """
    if self._info() is None:  # libraries leave out what they cannot list: here the store must answer
      return {}
    with saying(self):
      found = self._fs.find(str(self), detail=True)
    listed = {
      self._found(name): info if 'size' in info else self._info() or {'size': 0}
      for name, info in found.items()
      if not name.endswith('/')
    }
    return {path: (int(info['size'] or 0), changed(info), version(info)) for path, info in listed.items()}

  def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
    """Does nothing: a folder comes with what lies in it."""

  def unlink(self, missing_ok: bool = False) -> None:
    """Removes an object."""
    try:
      with saying(self):
        self._fs.rm_file(str(self))
    except FileNotFoundError:
      if not missing_ok:
        raise

  def remove(self, first: tuple[str, ...] = ()) -> None:
    """Removes all objects below a folder; those of the names `first` before the others."""
    for path in sorted(self.objects(), key=lambda path: (path.name not in first, str(path))):
      path.unlink(missing_ok=True)

  def rename(self, target: os.PathLike[str] | str) -> 'BucketPath':
    """Copies all objects below a folder to another, in the store, then removes them; returns the other."""
    target = type(self)(target)
    found = self.objects()
    for path in found:
      with saying(path):
        self._fs.cp_file(str(path), str(target / path.relative_to(self)))
    for path in found:
      path.unlink(missing_ok=True)
    return target

  def put(self, content: bytes) -> None:
    """Writes an object, which takes the place of one that is there once it is whole."""
    with saying(self):
      self._fs.pipe_file(str(self), content)

  def create(self, content: bytes) -> bool:
    """Writes an object if there is none, and returns whether it did: of several who try, one does."""
    try:
      with saying(self):
        self._fs.pipe_file(str(self), content, mode='create')
    except OSError:
      if self.exists():
        return False
      raise
    return True

  def upload(self, file: pathlib.Path) -> None:
    """Writes an object of a file of this machine."""
    with saying(self):
      self._fs.put_file(str(file), str(self))

  def download(self, file: pathlib.Path) -> None:
    """Writes a file of this machine, which has the object's time; the folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with saying(self):
      self._fs.get_file(str(self), str(file))


@contextlib.contextmanager
def saying(path: pathlib.Path) -> Iterator[None]:
  """Turns whatever a store raises into an OSError with a number and the path."""
  try:
    yield
  except UserError:
    raise
  except KNOWN as error:
    number = next(n for kind, n in zip(KNOWN, NUMBERS, strict=True) if isinstance(error, kind))
    said = _first_line(error)  # such as that there is no such bucket
    text = f'{os.strerror(number)} ({said})' if ' ' in said else os.strerror(number)
    raise OSError(number, text, str(path)) from error
  except Exception as error:  # of connections, credentials, the store's own
    text = f'the store does not answer as it should ({type(error).__name__}: {_first_line(error)})'
    raise OSError(errno.EREMOTEIO, text, str(path)) from error


def _first_line(error: Exception) -> str:
  return (str(error).strip().splitlines() or [''])[0]


def is_bucket(text: str) -> bool:
  """Returns whether a text names a place in a store, of whatever kind."""
  return SEPARATOR in text


def parse(text: str, meant: str) -> BucketPath:
  """Returns the path that a text names.

  Args:
    text: as `gs://bucket/folder`.
    meant: the field or flag that holds it, for the message.

  Raises:
    UserError: for a store of another kind, or without a bucket.
  """
  scheme, _, rest = text.partition(SEPARATOR)
  if scheme not in SCHEMES or not rest.strip('/'):
    known = ' or '.join(f'{name}://bucket/folder' for name in SCHEMES)
    raise UserError(f'{meant} is {text!r}; a folder in a bucket is written as {known}')
  filesystem(scheme)
  return BucketPath(text)


@functools.cache
def filesystem(scheme: str) -> Any:
  """Returns what talks to the stores of a scheme.

  Raises:
    UserError: when its package is not installed.
  """
  os.environ.setdefault('EPATH_USE_TF', 'false')  # Orbax's paths: by fsspec as ours, with TensorFlow or not
  import fsspec

  try:
    # other processes write into the same folders: nothing that was listed before is believed
    return fsspec.filesystem(scheme, use_listings_cache=False)
  except (ImportError, ValueError) as error:
    raise UserError(
      f"{scheme}://... takes packages that are not installed: pip install -e '.[cloud]' ({error})"
    ) from error


def changed(info: dict[str, Any]) -> float:
  """Returns when an object was written, in seconds since 1970; 0 where the store does not say."""
  for name in ('LastModified', 'updated', 'mtime', 'created'):
    value = info.get(name)
    if isinstance(value, str):
      with contextlib.suppress(ValueError):
        value = datetime.datetime.fromisoformat(value)
    if isinstance(value, datetime.datetime):
      return value.timestamp()
    if isinstance(value, int | float):
      return float(value)
  return 0.0


def version(info: dict[str, Any]) -> str:
  """Returns what is another for another content of an object."""
  return str(next((info[name] for name in ('ETag', 'etag', 'md5Hash', 'generation') if info.get(name)), ''))


@functools.cache
def _scratch() -> pathlib.Path:
  folder = pathlib.Path(tempfile.mkdtemp(prefix='vaediff-'))
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  return folder


def scratch(path: pathlib.Path) -> pathlib.Path:
  """Returns the folder of this machine that belongs to a path for the time of this process; it is made.

  All are below the system's folder for temporary files ($TMPDIR), and are removed at the end of the process.
  """
  digest = hashlib.sha256(str(path).encode()).hexdigest()[:16]
  folder = _scratch() / digest / path.name
  folder.mkdir(parents=True, exist_ok=True)
  return folder


class Beside:
  """A folder of this machine whose files are copied to a folder in a bucket; of another, that folder itself.

  Attributes:
    here: to write to.
  """

  def __init__(self, folder: pathlib.Path):
    self._there = folder if isinstance(folder, BucketPath) else None
    self.here = folder if self._there is None else scratch(folder)
    self._known: dict[pathlib.Path, tuple[int, int]] = {}

  def pull(self, name: str) -> None:
    """Gets a file that is there from the bucket."""
    if self._there is not None and (self._there / name).exists():
      (self._there / name).download(self.here / name)
      self._known[self.here / name] = _state(self.here / name)

  def push(self, last: str = '') -> None:
    """Copies all files that have changed; the one of the name `last` after the others. Raises OSError."""
    if self._there is None:
      return
    files = [path for path in sorted(self.here.rglob('*')) if path.is_file()]
    for path in sorted(files, key=lambda path: path.name == last):
      state = _state(path)
      if self._known.get(path) != state:
        (self._there / path.relative_to(self.here)).upload(path)
        self._known[path] = state


def fetched(folder: pathlib.Path) -> pathlib.Path:
  """Returns a folder of this machine with the files of a folder in a bucket; of another, that folder itself.

  What was fetched before by this process is not fetched again where it is the same.
  """
  if not isinstance(folder, BucketPath):
    return folder
  here = scratch(folder)
  mirror(folder, here)
  return here


def mirror(there: BucketPath, here: pathlib.Path) -> int:
  """Makes a folder of this machine hold what a folder in a bucket holds; returns how many files were fetched.

  Of an object it is a file. Files have the times of the objects. One is fetched where its size, time or
  version is another than it was: those are kept beside the folder.
  """
  kept = here.with_name(f'.{here.name}.versions')
  before = dict(line.split(' ', 1)[::-1] for line in kept.read_text().splitlines()) if kept.exists() else {}
  found = {str(path.relative_to(there)): facts for path, facts in there.objects().items()}
  here.parent.mkdir(parents=True, exist_ok=True)
  for path in [path for path in sorted(here.rglob('*')) if path.is_file()]:
    if str(path.relative_to(here)) not in found:
      path.unlink()
  count = 0
  for name, (size, seconds, of_content) in found.items():
    file, mark = here / name, f'{size}-{of_content or seconds}'.replace(' ', '')
    unknown = not (of_content or seconds)  # a store that does not tell versions apart
    if unknown or before.get(name) != mark or not file.is_file() or file.stat().st_size != size:
      partial = file.with_name(f'.{file.name}.{os.getpid()}.tmp')
      (there / name).download(partial)
      os.utime(partial, (seconds, seconds))
      os.replace(partial, file)
      count += 1
      before[name] = mark
  kept.write_text(''.join(f'{before[name]} {name}\n' for name in found))
  return count


def _state(path: pathlib.Path) -> tuple[int, int]:
  status = path.stat()
  return status.st_size, status.st_mtime_ns
