"""What lies at a path that a user named, and a message for whatever the system says of it."""

import pathlib
import stat

from vaediff.errors import UserError
from vaediff.storage.files import reason


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
    return path.stat().st_mode
  except (FileNotFoundError, NotADirectoryError):
    return 0
  except OSError as error:
    raise UserError(
      f"'{path}' cannot be looked at: {reason(error)}. Make it readable, or name another"
    ) from error
