"""Where things lie that no field names: the one place that asks for a home folder, and that reads `~`."""

import os
import pathlib
from collections.abc import Mapping

from vaediff.errors import UserError


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
