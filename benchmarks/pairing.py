"""Workers, one per side, that take turns: while one runs, the others wait for a command and use no CPU.

JAX and PyTorch in one process would share neither threads nor caches fairly, and one after the other would
measure the weather: on machines that others use, the speed of the same program drifts by a fifth in minutes.
So every round times all sides within seconds of each other, in an order that turns, and ratios are taken
round by round.
"""

import contextlib
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any, Self

from vaediff.machine import runtime

ROOT = pathlib.Path(__file__).parent.parent
SIDES = ('jax', 'torch_eager', 'torch_compile')
PASSIVE = {'OMP_WAIT_POLICY': 'PASSIVE', 'KMP_BLOCKTIME': '0'}
"""PyTorch's OpenMP threads sleep as soon as they have nothing to do, so that a waiting worker takes no CPU.

PyTorch was no slower for it where this was tried (two cores that other jobs used too: faster). What is set
outside stays, so that `OMP_WAIT_POLICY=ACTIVE python -m benchmarks.paired ...` tries it elsewhere.
"""


class WorkerError(RuntimeError):
  """A worker could not do what it was told; the message is its traceback."""


class Worker:
  """A process of `benchmarks.worker`; use as a context manager."""

  def __init__(self, side: str, dtype: str, device: str):
    """Starts the process and waits until it is ready.

    Raises:
      WorkerError: it ended instead.
    """
    self.side = side
    environment = {**os.environ, 'PYTHONUNBUFFERED': '1', 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
    # huge pages for every side, as `vaediff.main` has them
    environment['GLIBC_TUNABLES'] = runtime.tunables()
    if side != 'jax':
      environment = {**PASSIVE, **environment}
    if device == 'cpu':
      environment |= {'JAX_PLATFORMS': 'cpu', 'CUDA_VISIBLE_DEVICES': ''}
    self._log = tempfile.TemporaryFile(mode='w+')
    self._process = subprocess.Popen(
      [sys.executable, '-m', 'benchmarks.worker', f'--side={side}', f'--dtype={dtype}'],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._log,
      text=True,
      env=environment,
      cwd=ROOT,
    )
    self.about = self._answer()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: Any) -> None:
    with contextlib.suppress(BrokenPipeError):  # of a worker that is gone
      self._process.stdin.close()
    try:
      self._process.wait(timeout=10)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._process.stdout.close()
    self._log.close()

  def ask(self, command: dict[str, Any]) -> dict[str, Any]:
    """Returns the answer to a command.

    Raises:
      WorkerError: the command failed, or the process ended.
    """
    try:
      self._process.stdin.write(json.dumps(command) + '\n')
      self._process.stdin.flush()
    except BrokenPipeError:
      pass  # the missing answer says why
    return self._answer()

  def _answer(self) -> dict[str, Any]:
    line = self._process.stdout.readline()
    if not line:
      self._process.wait()
      self._log.seek(0)
      end = self._log.read()[-4000:]
      raise WorkerError(f'worker {self.side} ended with status {self._process.returncode}:\n{end}')
    message = json.loads(line)
    if 'error' in message:
      raise WorkerError(f'worker {self.side}: {message["error"]}')
    return message


def measure(
  workers: dict[str, Worker], command: dict[str, Any], *, rounds: int, round_seconds: float
) -> dict[str, dict[str, Any]]:
  """Returns what each side took for the measurement that `command` builds.

  Every side builds it and warms up; then `rounds` rounds follow, in each of which every side repeats it for
  about `round_seconds`, the first side of a round being the last of the one before.

  Returns:
    side -> 'parameters', 'first_call_seconds', 'repetitions' per round, 'seconds' per repetition, one for
    each round, and 'idle_cores': the most CPU that it used in a turn of the others. Or 'error', for
    `torch_compile` alone: compilers do not manage everything.

  Raises:
    WorkerError: another side fails.
  """
  results = {}
  for side, worker in workers.items():
    try:
      built = worker.ask(command)
    except WorkerError as error:
      if side != 'torch_compile':
        raise
      results[side] = {'error': str(error)}
      continue
    repetitions = max(1, math.ceil(round_seconds / built.pop('seconds')))
    results[side] = {**built, 'repetitions': repetitions, 'seconds': [], 'idle_cores': 0.0}
  turning = [side for side in workers if 'error' not in results[side]]
  for _ in range(rounds):
    for side in turning:
      told = workers[side].ask({'run': results[side]['repetitions']})
      results[side]['seconds'].append(told['seconds'])
      results[side]['idle_cores'] = max(results[side]['idle_cores'], told['idle_cores'])
    turning.reverse()
  return results
