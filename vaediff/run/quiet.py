"""What libraries print of errors that they raise as well: here each becomes one message of our own.

With `--verbosity` above that of errors everything is printed.
"""

import logging
import sys
from collections.abc import Callable
from typing import Any

import absl.logging


def install() -> None:
  """Installs both filters; more than once is no matter."""
  logger = absl.logging.get_absl_logger()
  if not any(isinstance(one, _SaidHere) for one in logger.filters):
    logger.addFilter(_SaidHere())
    sys.unraisablehook = not_of_closed_loops(sys.unraisablehook)


class _SaidHere(logging.Filter):
  """Drops the tracebacks that Orbax logs."""

  def filter(self, record: logging.LogRecord) -> bool:
    return not (_is_quiet() and record.exc_info and 'orbax' in record.pathname)


def not_of_closed_loops(before: Callable[[Any], None]) -> Callable[[Any], None]:
  """Returns a `sys.unraisablehook` that says nothing of writes that ended after their save had failed.

  Orbax closes the event loop of a save when one write fails; each that is under way then prints a traceback.
  """

  def hook(unraisable: Any) -> None:
    if not (_is_quiet() and str(unraisable.exc_value) == 'Event loop is closed'):
      before(unraisable)

  return hook


def _is_quiet() -> bool:
  return absl.logging.get_verbosity() <= absl.logging.ERROR
