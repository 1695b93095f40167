"""What the figures were measured on, and where they are kept."""

import json
import os
import pathlib
import platform
import re
from typing import Any

from vaediff.errors import UserError
from vaediff.evaluation import report
from vaediff.storage import files


def cpu_model(cpuinfo: str) -> str:
  """Returns the model that /proc/cpuinfo names; what Python knows where it names none."""
  match = re.search(r'^model name\s*:\s*(.+)$', cpuinfo, re.MULTILINE)
  return match[1].strip() if match else platform.processor() or platform.machine()


def describe(abouts: dict[str, dict[str, Any]], device: str) -> dict[str, Any]:
  """Returns the description of this machine, given what the workers say, side by side.

  Raises:
    UserError: a worker does not run on `device`, 'cpu' or 'gpu'.
  """
  for side, about in abouts.items():
    if (about['device'] == 'cpu') != (device == 'cpu'):
      raise UserError(
        f'--device is {device!r}, but {side} found {about["device"]!r}; install the build of JAX or PyTorch '
        'for that device, or choose the other of cpu, gpu'
      )
  path = pathlib.Path('/proc/cpuinfo')
  cpu = cpu_model(path.read_text() if path.exists() else '')
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  names = {about['device'] for about in abouts.values()} - {'cpu'}
  return {
    'device': ', '.join(sorted(names)) if names else f'{cpu}, {cores} cores',
    'cpu': cpu,
    'cores': cores,
    'system': f'{platform.system()} {platform.machine()}, Python {platform.python_version()}',
    'threads': {side: about['threads'] for side, about in abouts.items()},
  }


def software(abouts: dict[str, dict[str, Any]]) -> dict[str, str]:
  """Returns the versions that the workers use, XLA_FLAGS, and the C library's settings of all sides."""
  return {name: value for about in abouts.values() for name, value in about['software'].items()}


def slug(text: str) -> str:
  """Returns a file name: lower case, words joined by hyphens."""
  return re.sub(r'[^a-z0-9.]+', '-', text.lower().replace('(r)', '').replace('(tm)', '')).strip('-')


def read(path: pathlib.Path) -> dict[str, Any]:
  """Returns the results of earlier runs; {} where there are none."""
  return json.loads(path.read_text()) if path.exists() else {}


def write(path: pathlib.Path, results: dict[str, Any], table: str) -> None:
  """Writes the results, and their table beside them; neither is ever seen half written."""
  report.write_json(path, results)
  files.write_text(path.with_suffix('.md'), table)
