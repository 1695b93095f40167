"""Checkpoints in a bucket: which are complete, and how those come there that Orbax cannot write there itself.

Orbax writes to Google's store (`gs://`) as every process of a job needs it, and marks a complete checkpoint
by an object in it. Of other stores it knows none: there one process saves into a folder of this machine, and
a thread sends the checkpoint, `DONE` at last. What is read is fetched first.
"""

import os
import pathlib
import secrets
import shutil
import threading
from collections.abc import Callable

import jax

from vaediff.errors import UserError
from vaediff.storage import buckets
from vaediff.storage.buckets import BucketPath

NATIVE = ('gs',)
"""Schemes of the stores that Orbax writes to."""
DONE = 'commit_success.txt'
"""The last object of a complete checkpoint, by Orbax's name for it."""


def finished_steps(folder: pathlib.Path) -> list[int]:
  """Returns the steps of the complete checkpoints in a `checkpoints` folder, ascending."""
  if not folder.is_dir():
    return []
  found = [child for child in folder.iterdir() if child.name.isdigit()]
  if isinstance(folder, BucketPath):  # no folder there is renamed once it is complete
    found = [child for child in found if (child / DONE).exists()]
  return sorted(int(child.name) for child in found)


def is_spooled(folder: pathlib.Path) -> bool:
  """Returns whether a folder's files are to be sent by us."""
  return isinstance(folder, BucketPath) and folder.scheme not in NATIVE


def local(folder: pathlib.Path) -> pathlib.Path:
  """Returns a folder with the files of a complete checkpoint that Orbax can read.

  What was fetched before by this process is compared with what is there by size and version.
  """
  return buckets.fetched(folder) if is_spooled(folder) else folder


def of(folder: pathlib.Path, keep: int) -> 'Spool | None':
  """Returns what sends the checkpoints of a folder; None where Orbax writes there itself."""
  return Spool(folder, keep) if is_spooled(folder) else None


class Spool:
  """The checkpoints of one stage, in a folder of this machine and on their way from there.

  Args:
    folder: `<stage>/checkpoints` in a bucket.
    keep: how many of the latest stay there.

  Attributes:
    here: what Orbax works in. It begins with the newest complete checkpoint.

  Raises:
    UserError: when this is a job of several processes: each has its own disk.
    OSError: when the store does not answer as it should.
  """

  def __init__(self, folder: BucketPath, keep: int):
    if jax.process_count() > 1:
      raise UserError(
        f'{folder}: checkpoints of {jax.process_count()} processes go to {NATIVE[0]}:// or to a file '
        f'system that all share; {folder.scheme}:// takes those of one process'
      )
    self._there, self._keep = folder, keep
    self._thread, self._error = None, None
    self.here = buckets.scratch(folder / secrets.token_hex(4))
    for step in finished_steps(folder)[-1:]:
      shutil.copytree(local(folder / str(step)), self.here / str(step), copy_function=os.link)

  def send(self, step: int, finish: Callable[[], None]) -> None:
    """Sends a checkpoint in a thread, once `finish` has returned: it is on this machine then."""
    self._thread = threading.Thread(target=self._send, args=(step, finish))
    self._thread.start()

  def wait(self) -> None:
    """Waits for what is being sent; raises what that has raised, once."""
    if self._thread is not None:
      self._thread.join()
    self._thread, error, self._error = None, self._error, None
    if error is not None:
      raise error

  def _send(self, step: int, finish: Callable[[], None]) -> None:
    try:
      finish()
      there, here = self._there / str(step), self.here / str(step)
      there.remove(first=(DONE,))  # what a save that was not finished has left
      for path in sorted(here.rglob('*')):
        if path.is_file() and path != here / DONE:
          (there / path.relative_to(here)).upload(path)
      (there / DONE).put(secrets.token_hex(8).encode())
      for old in finished_steps(self._there)[: -self._keep]:
        (self._there / str(old)).remove(first=(DONE,))
    except Exception as error:  # raised where it is waited for
      self._error = error
