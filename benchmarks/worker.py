"""One side of a pair: a process that builds measurements and runs them when it is told to.

    python -m benchmarks.worker --side=jax|torch_eager|torch_compile --dtype=float32

It is started by `benchmarks.pairing`, reads one JSON object per line, and answers each with one:

  (at the start)                                 -> {"device", "threads", "software"}
  {"build": "networks" | "operations", ...}      -> {"parameters", "first_call_seconds", "seconds"}
  {"run": repetitions}                           -> {"seconds", "idle_cores"}
  {"list": case, "count": images}                -> {"operations": [...]}, by the JAX side alone

`seconds` are per repetition, after one that is not counted: in training and sampling calls follow one
another, and the first takes back the memory that a waiting process has given up. On a CPU every repetition is
waited for, because JAX would run several that do not depend on each other at a time; on a GPU, whose work is
in order, the last of a round is. `idle_cores` is the CPU time per second that the process used while it
waited for the command: what it took from the others.
"""

import argparse
import importlib.metadata
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TextIO

PACKAGES = {
  'jax': ('jax', 'jaxlib', 'flax', 'optax'),
  'torch': ('torch', 'diffusers'),
}
LEAST_IDLE_SECONDS = 0.2
"""A shorter time between two commands is no turn of another side; `idle_cores` is 0 then."""
WARMUPS, SLOW_SECONDS = 3, 1.0
"""Calls after the first two, where these take less than so long, before the one that sets the repetitions."""


def seconds_per_call(built: Any, repetitions: int, wait_for_each: bool) -> float:
  """Returns the time of `repetitions` calls over their number."""
  started = time.perf_counter()
  for _ in range(repetitions):
    result = built.run()
    if wait_for_each:
      built.wait(result)
  built.wait(result)
  return (time.perf_counter() - started) / repetitions


def load(side: str) -> tuple[dict[str, Callable[..., Any]], Any, dict[str, Any]]:
  """Returns what the side builds measurements with, by name, its network module, and its description."""
  if side == 'jax':
    from vaediff.machine import runtime

    runtime.set_environment()
    from benchmarks import jax_side as networks
    from benchmarks import operations_jax as operations

    threads = os.cpu_count()
  else:
    import torch

    from benchmarks import operations_torch as operations
    from benchmarks import torch_side as networks

    threads = torch.get_num_threads()
  packages = PACKAGES['jax' if side == 'jax' else 'torch']
  software = {name: importlib.metadata.version(name) for name in packages}
  if side == 'jax':
    software |= {name: os.environ.get(name, '') for name in ('XLA_FLAGS', 'GLIBC_TUNABLES')}
  builders = {'networks': networks.build, 'operations': operations.build}
  about = {'device': networks.describe_device(), 'threads': threads, 'software': software}
  return builders, operations, about


def answer(side: str, dtype: str, commands: TextIO, answers: TextIO) -> None:
  """Answers commands until there are no more; an error is answered with {"error"} and its text."""
  builders, operations, about = load(side)
  wait_for_each, built = about['device'] == 'cpu', None

  def say(message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + '\n')
    answers.flush()

  def build(command: dict[str, Any]) -> dict[str, Any]:
    nonlocal built
    built = None  # frees the memory of the last one first
    kind = command.pop('build')
    built = builders[kind](**command, dtype=dtype, compiled=side == 'torch_compile')
    first = seconds_per_call(built, 1, True)
    seconds = seconds_per_call(built, 1, True)
    if seconds < SLOW_SECONDS:
      seconds_per_call(built, WARMUPS, True)
      seconds = seconds_per_call(built, 1, True)
    return {'parameters': built.parameters, 'first_call_seconds': first, 'seconds': seconds}

  say(about)
  cpu, wall = time.process_time(), time.perf_counter()
  for line in commands:
    waited = time.perf_counter() - wall
    idle_cores = (time.process_time() - cpu) / waited if waited > LEAST_IDLE_SECONDS else 0.0
    command = json.loads(line)
    try:
      if 'build' in command:
        say(build(command))
      elif 'run' in command:
        seconds_per_call(built, 1, True)
        say({'seconds': seconds_per_call(built, command['run'], wait_for_each), 'idle_cores': idle_cores})
      else:
        say({'operations': operations.operations_of(command['list'], command['count'])})
    except Exception:
      say({'error': traceback.format_exc()})
    cpu, wall = time.process_time(), time.perf_counter()


def main() -> None:
  """Serves commands on what was standard output when it started; what libraries print goes to stderr."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--side', required=True, choices=('jax', 'torch_eager', 'torch_compile'))
  parser.add_argument('--dtype', default='float32')
  flags = parser.parse_args()
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)
  answer(flags.side, flags.dtype, sys.stdin, answers)


if __name__ == '__main__':
  main()
