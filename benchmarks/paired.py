"""The same networks in JAX (this project) and in PyTorch, in turns: seconds, and their ratio.

    pip install -e '.[benchmarks]'
    python -m benchmarks.paired --cases=all --rounds=5
    python -m benchmarks.paired --cases=unet_small,unet_cifar10/forward --device=gpu --dtype=bfloat16

First a process of its own checks that each pair is the same network (`benchmarks.equality`). Then, case by
case, one worker per side is started, and they take turns (`benchmarks.pairing`). What each side runs is said
in `jax_side` and `torch_side`. Results go to `benchmarks/results/<device>.json` and `.md` (bfloat16:
`<device>-bfloat16`) as soon as a measurement is done; those of other cases in the file are kept.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from benchmarks import machine, pairing, table
from benchmarks.cases import CASES, DTYPES, select
from vaediff.errors import UserError

RESULTS = pathlib.Path(__file__).parent / 'results'
DEVICES = ('cpu', 'gpu')


def make_parser(description: str, cases: str, round_seconds: float) -> argparse.ArgumentParser:
  """Returns the flags that `paired` and `operations` share, with their defaults."""
  parser = argparse.ArgumentParser(description=description)
  parser.add_argument('--cases', default=cases, help="comma list of <case> or <case>/<task>; 'all'")
  parser.add_argument('--rounds', type=int, default=5, help='turns of every side')
  parser.add_argument('--round_seconds', type=float, default=round_seconds, help='of one turn, about')
  parser.add_argument('--sides', default=','.join(pairing.SIDES), help='comma list; jax is always one')
  parser.add_argument('--dtype', default='float32', help=', '.join(DTYPES))
  parser.add_argument('--device', default='cpu', help=', '.join(DEVICES))
  parser.add_argument('--results', type=pathlib.Path, default=RESULTS, help='folder')
  return parser


def check(flags: argparse.Namespace) -> tuple[str, ...]:
  """Returns the sides to measure.

  Raises:
    UserError: a flag has a value that is not allowed, or PyTorch or diffusers is not installed.
  """
  if flags.rounds < 1:
    raise UserError(f'--rounds is {flags.rounds}; it must be at least 1')
  if not flags.round_seconds > 0:
    raise UserError(f'--round_seconds is {flags.round_seconds}; it must be above 0')
  for name, value, valid in (('dtype', flags.dtype, DTYPES), ('device', flags.device, DEVICES)):
    if value not in valid:
      raise UserError(f'--{name} is {value!r}; valid: {", ".join(valid)}')
  chosen = [side.strip() for side in flags.sides.split(',') if side.strip()]
  for side in chosen:
    if side not in pairing.SIDES:
      raise UserError(f'--sides names {side!r}; valid: {", ".join(pairing.SIDES)}')
  sides = tuple(side for side in pairing.SIDES if side in (*chosen, 'jax'))
  if len(sides) == 1:
    raise UserError(f"--sides is {flags.sides!r}, which leaves nothing to compare; add 'torch_eager'")
  for package in ('torch', 'diffusers'):
    if importlib.util.find_spec(package) is None:
      raise UserError(
        f"the package '{package}' is not installed, and the benchmarks compare with it; run "
        "pip install -e '.[benchmarks]'"
      )
  return sides


def check_equality(cases: list[str]) -> dict[str, dict[str, Any]]:
  """Returns case -> parameters and largest difference of the outputs.

  Raises:
    UserError: a pair is not the same network.
  """
  command = [sys.executable, '-m', 'benchmarks.equality', f'--cases={",".join(cases)}']
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'CUDA_VISIBLE_DEVICES': ''}
  done = subprocess.run(command, env=environment, cwd=pairing.ROOT, capture_output=True, text=True)
  if done.returncode:
    raise UserError(f'the pairs are not the same networks: {done.stderr[-4000:]}')
  return json.loads(done.stdout)


def run(flags: argparse.Namespace) -> None:
  """Measures, and writes results and table after every measurement."""
  sides, chosen = check(flags), select(flags.cases)
  print(f'are the pairs the same networks? {", ".join(chosen)}', flush=True)
  equality = check_equality(list(chosen))
  for name, tasks in chosen.items():
    with contextlib.ExitStack() as stack:
      start = lambda side, stack=stack: stack.enter_context(pairing.Worker(side, flags.dtype, flags.device))
      workers = {side: start(side) for side in sides}
      abouts = {side: worker.about for side, worker in workers.items()}
      here, software = machine.describe(abouts, flags.device), machine.software(abouts)
      for task in tasks:
        count = CASES[name].batch_size(task, flags.device)
        print(f'measuring {name}/{task}', flush=True)
        command = {'build': 'networks', 'name': name, 'task': task, 'count': count}
        measured = pairing.measure(workers, command, rounds=flags.rounds, round_seconds=flags.round_seconds)
        counts = {side: value['parameters'] for side, value in measured.items() if 'error' not in value}
        if set(counts.values()) != {CASES[name].parameters}:
          raise UserError(f'case {name}: {CASES[name].parameters} parameters expected, got {counts}')
        entry = {'images': count, **equality[name], 'software': software, 'sides': measured}
        _add(flags, here, f'{name}/{task}', entry)
  print(table.networks(machine.read(_path(flags, here))))


def _path(flags: argparse.Namespace, here: dict[str, Any]) -> pathlib.Path:
  suffix = '' if flags.dtype == 'float32' else f'-{flags.dtype}'
  return flags.results / f'{machine.slug(here["device"])}{suffix}.json'


def _add(flags: argparse.Namespace, here: dict[str, Any], name: str, entry: dict[str, Any]) -> None:
  """Writes one measurement beside those that the file has, in the order of the cases."""
  path = _path(flags, here)
  known = machine.read(path)
  measurements = {**(known['measurements'] if known else {}), name: entry}
  order = [f'{case}/{task}' for case in CASES for task in CASES[case].batch_sizes]
  measurements = {key: measurements[key] for key in order if key in measurements}
  results = {'machine': here, 'dtype': flags.dtype, 'measurements': measurements}
  machine.write(path, results, table.networks(results))


def cli(run_: Any, parser: argparse.ArgumentParser) -> None:
  """Runs with the flags of the command line; a mistake of the user's is one message and exit status 2."""
  try:
    run_(parser.parse_args())
  except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
  except pairing.WorkerError as error:
    print(error, file=sys.stderr)
    sys.exit(1)


if __name__ == '__main__':
  cli(run, make_parser(__doc__.splitlines()[0], 'all', 1.0))
