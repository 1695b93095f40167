"""The operations that cost most in a profile that training has written (`train.profile_steps`).

    python -m benchmarks.costs runs/cifar10/refiner/tensorboard

Sums the times of equal names on the device's own lines of the newest trace; on a CPU, those of its threads.
"""

import argparse
import collections
import gzip
import json
import pathlib
import re

from benchmarks.paired import cli
from vaediff.errors import UserError


def newest(folder: pathlib.Path) -> pathlib.Path:
  """Returns the newest trace below a folder.

  Raises:
    UserError: there is none.
  """
  found = sorted(folder.rglob('*.trace.json.gz'), key=lambda path: path.stat().st_mtime)
  if not found:
    raise UserError(
      f'no *.trace.json.gz below {folder}; train with --config.<stage>.train.profile_steps=(100,110)'
    )
  return found[-1]


def costs(events: list[dict], names: dict[int, str]) -> collections.Counter:
  """Returns microseconds by operation, of the devices where there are any, else of all processes.

  Numbers at the end of a name are left out: fusion.12 and fusion.7 are one kind.
  """
  devices = {pid for pid, name in names.items() if re.search(r'device:(GPU|TPU)', name)}
  total = collections.Counter()
  for event in events:
    if event.get('ph') != 'X' or (devices and event['pid'] not in devices):
      continue
    if 'hlo_op' not in event.get('args', {}):  # of Python and of the runtime
      continue
    total[re.sub(r'[._]\d+$', '', event['name'])] += event.get('dur', 0)
  return total


def table(total: collections.Counter, count: int) -> str:
  """Returns lines of milliseconds, share and name, the dearest first."""
  whole = sum(total.values()) or 1
  lines = [f'{us / 1000:>10.3f} ms {us / whole:>7.1%}  {name}' for name, us in total.most_common(count)]
  return '\n'.join([*lines, f'{whole / 1000:>10.3f} ms in all'])


def run(flags: argparse.Namespace) -> None:
  """Prints the table of a folder."""
  path = newest(flags.folder)
  with gzip.open(path) as file:
    events = json.load(file)['traceEvents']
  names = {
    event['pid']: event['args']['name'] for event in events if event.get('name') == 'process_name'
  }
  print(path.name)
  print(table(costs(events, names), flags.count))


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('folder', type=pathlib.Path)
  parser.add_argument('--count', type=int, default=25, help='lines')
  cli(run, parser)
