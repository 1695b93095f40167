"""One job of many processes: joining, preemption, and not waiting for ever. The engine is `jax.distributed`.

Exit statuses, for launchers: 0 finished; 2 the user has something to mend; 75 preempted, a checkpoint is
saved; 76 another process is lost, or nothing moved for too long; 130 stopped by Ctrl-C; 1 a mistake of the
program, with its trace. After 75 and 76 the same command is worth starting again by itself.
"""

import contextlib
import itertools
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from vaediff.errors import UserError

PREEMPTED = 75
LOST = 76
STOPPED = 130
MODES = ('auto', 'on', 'off')


class Preempted(Exception):
  """The scheduler wants the machine back, or the user has pressed Ctrl-C; all that was done is saved.

  Attributes:
    status: to exit with.
  """

  def __init__(self, message: str, status: int = PREEMPTED):
    super().__init__(message)
    self.status = status


def join(mode: str, config: ConfigDict, environment: Mapping[str, str] = os.environ) -> None:
  """Joins the other processes of this job, if there are any; must be called before JAX is used.

  Args:
    mode: 'auto' joins when the environment speaks of other processes, 'on' always, 'off' never.
    config: the section `processes`: time-outs in seconds.
    environment: where the others are found: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID
      (or JOB_COMPLETION_INDEX of Kubernetes), Slurm's variables, or TPU metadata.

  Raises:
    UserError: for variables that are incomplete. When the others do not come in time, the process ends with
      the status `LOST`.
  """
  if mode == 'off':
    return
  arguments = arguments_from(environment)
  if mode == 'auto' and arguments is None:
    return
  try:
    with _or_leave(config.join_timeout_seconds, arguments or {}):
      jax.distributed.initialize(
        **(arguments or {}),
        initialization_timeout=config.join_timeout_seconds + GRACE_SECONDS,
        heartbeat_timeout_seconds=config.heartbeat_timeout_seconds,
      )
  except (ValueError, KeyError, IndexError) as error:
    raise UserError(
      f'--distributed={mode}, but no other processes are known ({_first_line(error)}). Set '
      'JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID for each of them, or use '
      '--distributed=off for one process by itself'
    ) from error
  except RuntimeError as error:  # a time-out: the others may be on their way, so the job may be started again
    leave(_not_found(arguments or {}, _first_line(error)))


GRACE_SECONDS = 60
"""JAX ends the process with a trace of C++ when its own time is over: ours comes before it."""


@contextlib.contextmanager
def _or_leave(seconds: int, arguments: Mapping[str, Any]) -> Iterator[None]:
  """Ends the process with a message and the status `LOST` when what is inside takes longer."""
  timer = threading.Timer(seconds, leave, [_not_found(arguments, f'{seconds} seconds are over')])
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def _not_found(arguments: Mapping[str, Any], why: str) -> str:
  address = arguments['coordinator_address'] if 'coordinator_address' in arguments else ''
  at = f' at {address}' if address else ''
  return (
    f'the processes of this job did not find each other{at}: {why}. Check that all of them run, and that '
    'host '
    'and port of JAX_COORDINATOR_ADDRESS can be reached (config.processes.join_timeout_seconds)'
  )


def _first_line(error: BaseException) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0]


def arguments_from(environment: Mapping[str, str]) -> dict[str, Any] | None:
  """Returns the arguments for `jax.distributed.initialize`, or None when this process is alone.

  Raises:
    UserError: for variables that are incomplete, no numbers, or no address.
  """
  address = environment.get('JAX_COORDINATOR_ADDRESS', '')
  if address:
    _check_address(address)
    count = _number(environment, 'JAX_NUM_PROCESSES')
    own = 'JAX_PROCESS_ID' if environment.get('JAX_PROCESS_ID') else 'JOB_COMPLETION_INDEX'
    process = _number(environment, own, 'JAX_PROCESS_ID')
    if not 0 <= process < count:
      raise UserError(f'{own}={process} must be in 0..{count - 1}: JAX_NUM_PROCESSES is {count}')
    return {'coordinator_address': address, 'num_processes': count, 'process_id': process}
  if _of_slurm(environment, 'SLURM_NTASKS', 1) > 1 and environment.get('SLURM_PROCID'):
    if _of_slurm(environment, 'SLURM_PROCID', 0) >= _of_slurm(environment, 'SLURM_NTASKS', 1):
      raise UserError(
        f'SLURM_PROCID={environment["SLURM_PROCID"]} must be below '
        f'SLURM_NTASKS={environment["SLURM_NTASKS"]}; '
        'use --distributed=off for one process by itself'
      )
    tasks_here = (environment.get('SLURM_STEP_TASKS_PER_NODE') or '').split('(')[0].split(',')[0]
    gpus = _of_slurm(environment, 'SLURM_GPUS_ON_NODE', 0)
    if tasks_here == '1' and gpus:  # JAX would take one GPU per task, whatever a task may see
      return {'local_device_ids': list(range(gpus))}
    return {}
  if len((environment.get('TPU_WORKER_HOSTNAMES') or '').split(',')) > 1:
    return {}
  return None


def _check_address(address: str) -> None:
  """Raises UserError unless it is a host, as a name, a number or [an IPv6 number], and a port."""
  match = re.fullmatch(r'(?:[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.%]+\]):(\d{1,5})', address)
  if not match or not 1 <= int(match.group(1)) <= 65535:
    raise UserError(
      f'JAX_COORDINATOR_ADDRESS is {address!r}; write host:port with a port in 1..65535, as '
      '10.0.0.1:8476, or '
      'unset it for one process by itself'
    )


def _of_slurm(environment: Mapping[str, str], name: str, default: int) -> int:
  text = environment.get(name, '')
  if not text:
    return default
  if not re.fullmatch(r'[0-9]{1,9}', text):
    raise UserError(
      f"Slurm's variable {name} is {text!r}; a number is needed. Start the program with srun, unset the "
      'variable, '
      'or use --distributed=off for one process by itself'
    )
  return int(text)


def _number(environment: Mapping[str, str], name: str, instead: str = '') -> int:
  text = environment.get(name, '')
  if not re.fullmatch(r'[0-9]{1,9}', text):
    raise UserError(
      f'JAX_COORDINATOR_ADDRESS is set, so {instead or name} must be a number too; it is {text!r}'
    )
  return int(text)


def agree(value: bool) -> bool:
  """Returns whether the value is true in every process; all must call it."""
  if jax.process_count() == 1:
    return value
  return bool(np.all(multihost_utils.process_allgather(np.array(value))))


def wait_for_all(name: str) -> None:
  """Returns once every process has come here; `name` says where, in the error when one does not."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


ASKED = itertools.count(1)
"""How often `Preemption.reached` has asked, in all stages: the same number in every process."""


class Preemption:
  """Notices SIGTERM, and the first Ctrl-C; with many processes, all agree on the step to stop after.

  The second Ctrl-C is KeyboardInterrupt, as it is elsewhere.
  """

  def __init__(self):
    self._noticed = False  # no lock, which a second signal would wait for
    self._before = {}
    self.status = PREEMPTED
    """Exit status of a process that was asked to end."""
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      self._before = {
        number: signal.signal(number, self._notice) for number in (signal.SIGTERM, signal.SIGINT)
      }

  def _notice(self, number: int, frame: Any) -> None:
    del frame
    if number == signal.SIGINT:
      self.status = STOPPED
      signal.signal(signal.SIGINT, signal.default_int_handler)
      with contextlib.suppress(OSError):
        print('\nstopping after this step, saving; Ctrl-C again stops at once', file=sys.stderr, flush=True)
    self._noticed = True

  def reached(self) -> bool:
    """Returns whether to save and stop after this step; every process must ask after every step."""
    if jax.process_count() > 1:  # JAX's own handler tells the other processes
      # of all stages: JAX names a step to stop after, and the steps of the next stage begin anew
      return multihost_utils.reached_preemption_sync_point(next(ASKED))
    return self._noticed

  def close(self) -> None:
    """Gives both signals back their former meaning."""
    for number, before in self._before.items():
      signal.signal(number, before)


def beat(what: str) -> None:
  """Says that something was done, such as a step or a drawn batch: whoever watches this process waits on."""
  for watchdog in WATCHING:
    watchdog.beat(what)


class Watchdog:
  """Ends the process with a message when nothing has moved for too long: a hung peer gives no error.

  Args:
    seconds: longest time without `beat`; 0 = never.
    name: what is being watched, for the message.
    last_words: called before the end, at most `PATIENCE` seconds are waited for it: returns what is kept.
  """

  def __init__(self, seconds: float, name: str, last_words: Callable[[], str] = str):
    self._seconds, self._name, self._last_words = seconds, name, last_words
    self._silence, self._stop = 0.0, threading.Event()
    self._last = 'its start'
    if seconds:
      WATCHING.append(self)
      threading.Thread(target=self._watch, name='watchdog', daemon=True).start()

  def beat(self, what: str) -> None:
    """Says that something was done."""
    self._silence, self._last = 0.0, what

  def close(self) -> None:
    """Ends the watch: a silence is no longer a fault."""
    self._stop.set()
    if self in WATCHING:
      WATCHING.remove(self)

  def _watch(self) -> None:
    # Counts its own ticks, not the clock: a process that was suspended has not been silent.
    tick = min(5.0, self._seconds / 4)
    while not self._stop.wait(tick):
      self._silence += tick
      if self._silence >= self._seconds:
        leave(
          f'{self._name}: nothing has moved for {self._seconds:g} seconds since {self._last} '
          '(config.processes.silence_timeout_seconds); another process or a device hangs or is lost. '
          f'The run goes on from its last checkpoint when started again{self._kept()}'
        )

  def _kept(self) -> str:
    said = []
    waiting = threading.Thread(target=lambda: said.append(self._last_words()), daemon=True)
    waiting.start()
    waiting.join(PATIENCE)
    return f': {said[0]}' if said and said[0] else ''


WATCHING: list[Watchdog] = []
"""Those of this process that are not closed."""
PATIENCE = 30.0
"""Seconds that a save under way has before a process that hangs is ended."""


def leave(message: str, status: int = LOST) -> NoReturn:
  """Ends the process with a message; one of many at once, since an orderly exit would wait for its peers."""
  with contextlib.suppress(OSError, ValueError):  # where the log is full or closed, leaving comes first
    print(f'error: {message}', file=sys.stderr, flush=True)
  if status != LOST and not jax.distributed.is_initialized():
    sys.exit(status)
  with contextlib.suppress(OSError, ValueError, AttributeError):
    sys.stdout.flush()
  os._exit(status)
