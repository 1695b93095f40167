"""Locks of folders in buckets: an object that says who holds the folder, written anew as long as he runs.

A store cannot release a lock with the process that holds it, so a holder that is killed leaves the object. It
is taken over once nothing has been written to it for `PATIENCE_SECONDS`, by the clock of the one who waits,
or at once where that process ran on this machine and is gone. A holder that finds another's name there, as
after hours without a network, ends itself at once: two that write into one run would mix them.
"""

import contextlib
import json
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from vaediff.errors import UserError
from vaediff.storage.buckets import BucketPath

RENEW_SECONDS = 10.0
"""Between two writes of the one who holds it."""
PATIENCE_SECONDS = 60.0
"""Without a write, after which a holder counts as gone: several times `RENEW_SECONDS`."""
LOST = 76
"""The exit status of a process that has lost its lock: start again, as where another process is lost."""


@contextlib.contextmanager
def lease(path: BucketPath, what: str, *, wait: bool = False) -> Iterator[bool]:
  """Holds the object `path` for this process.

  Args:
    path: of the lock.
    what: is done, for the message to others.
    wait: for the one who holds it; else that is an error. Gives whether it had to wait.

  Raises:
    UserError: when another process holds it: names host and process.
    OSError: when the store does not let it be read or written.
  """
  own = {'holder': f'process {os.getpid()} on host {socket.gethostname()} ({what})', **whereabouts()}
  own['token'] = secrets.token_hex(8)
  waited = _take(path, own, wait)
  ended = threading.Event()
  renewing = threading.Thread(target=_renew, args=(path, own, ended), daemon=True)
  renewing.start()
  try:
    yield waited
  finally:
    ended.set()
    renewing.join()
    with contextlib.suppress(OSError):  # the next one finds that this process is gone
      if _read(path).get('token') == own['token']:
        path.unlink(missing_ok=True)


def whereabouts() -> dict[str, Any]:
  """Returns this process' number and what tells where that number means it: machine, boot and namespace."""
  place = ''
  with contextlib.suppress(OSError):
    boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    place = f'{boot} {os.readlink("/proc/self/ns/pid")}'
  return {'pid': os.getpid(), 'place': place}


def is_gone(found: dict[str, Any]) -> bool:
  """Returns whether a holder is known to have ended: it ran here, and there is no such process."""
  here = whereabouts()
  if not here['place'] or found.get('place') != here['place'] or not isinstance(found.get('pid'), int):
    return False
  try:
    os.kill(found['pid'], 0)
  except ProcessLookupError:
    return True
  except OSError:
    return False
  return False


def _take(path: BucketPath, own: dict[str, Any], wait: bool) -> bool:
  """Writes the object; returns whether that had to wait for another."""
  waited = False
  while not path.create(_content(own)):
    found = _read(path)
    if found.get('token') == own['token']:  # written, but the answer was lost and the store was asked again
      return waited
    if found and not is_gone(found):
      waited = True
      holder = found.get('holder', 'another process')
      _say(f'{path.parent} is held by {holder}; waiting up to {PATIENCE_SECONDS:g} s to see whether it runs')
      if not _is_silent(path, found):
        if not wait:
          raise UserError(
            f'{path.parent} is in use by {holder}. Wait until it ends, stop it, or use another folder'
          )
        continue
      _say(f'{path.parent}: {holder} has not moved for {PATIENCE_SECONDS:g} s; its lock is taken over')
    path.unlink(missing_ok=True)
  return waited


def _is_silent(path: BucketPath, found: dict[str, Any]) -> bool:
  """Returns whether nobody writes the object while we wait; False as soon as somebody does, or it is gone."""
  until = time.monotonic() + PATIENCE_SECONDS
  while time.monotonic() < until:
    time.sleep(min(1.0, PATIENCE_SECONDS / 10))
    if _read(path) != found:
      return False
  return True


def _renew(path: BucketPath, own: dict[str, Any], ended: threading.Event) -> None:
  """Writes the object until the end; a store that does not answer is asked again."""
  number = 0
  while not ended.wait(RENEW_SECONDS):
    try:
      found = _read(path)
      if found and found.get('token') != own['token']:
        _lost(path, found)
      number += 1
      path.put(_content({**own, 'renewed': number}))
    except OSError:
      continue


def _lost(path: BucketPath, found: dict[str, Any]) -> None:
  _say(
    f'error: {path.parent} is held by {found.get("holder", "another process")} now, which took it over when '
    'this process did not move. It ends here, and writes nothing more; the last checkpoint is in the folder'
  )
  os._exit(LOST)


def _content(found: dict[str, Any]) -> bytes:
  return json.dumps(found).encode()


def _read(path: BucketPath) -> dict[str, Any]:
  """Returns what the object holds; {} where there is none, what it is where it is none of ours."""
  try:
    content = path.read_bytes()
  except FileNotFoundError:
    return {}
  try:
    found = json.loads(content)
  except ValueError:
    found = None
  return found if isinstance(found, dict) and found else {'holder': content.decode(errors='replace')[:200]}


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
