"""Paths as a user wrote them: the home folder put in, and a message for whatever the system says of them."""

import os
import pathlib
import stat

from vaediff.errors import UserError
from vaediff.files import reason


def expand(text: str, field: str) -> pathlib.Path:
  """Returns a path with `~` and `~name` put in.

  Raises:
    UserError: naming the field, when there is no such home folder, or the text cannot be a path.
  """
  try:
    path = pathlib.Path(text).expanduser()
  except RuntimeError as error:
    raise UserError(
      f'{field}={text!r}: the home folder is not known ({reason(error)}); write the whole path, from / on'
    ) from error
  if '\0' in text:
    raise UserError(f'{field}={text!r} holds a zero byte, which no path can; write the path without it')
  return path


def is_file(path: pathlib.Path) -> bool:
  """Returns whether there is a file, not a pipe or device; raises as `mode_of`."""
  return stat.S_ISREG(mode_of(path))


def is_folder(path: pathlib.Path) -> bool:
  """Returns whether there is a folder; raises as `mode_of`."""
  return stat.S_ISDIR(mode_of(path))


def mode_of(path: pathlib.Path) -> int:
  """Returns the mode of what lies at a path, through links; 0 where there is nothing.

  Raises:
    UserError: when the system does not let us look: that is not the same as nothing.
  """
  try:
    return os.stat(path).st_mode
  except (FileNotFoundError, NotADirectoryError):
    return 0
  except OSError as error:
    raise UserError(
      f"'{path}' cannot be looked at: {reason(error)}. Make it readable, or name another"
    ) from error
