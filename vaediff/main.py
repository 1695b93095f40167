"""The command line: `python -m vaediff.main --config=... --workdir=... --mode=... --stages=...`."""

import contextlib
import errno
import os
import signal
import sys
from typing import NoReturn

from vaediff.machine import runtime

if __name__ == '__main__':
  runtime.start('vaediff.main')

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from vaediff.errors import UserError
from vaediff.machine import distributed
from vaediff.modes import MODES, SWEEPS, WRITERS, checked
from vaediff.run import command_line
from vaediff.run import config as configs
from vaediff.storage import files, places

CONFIG = config_flags.DEFINE_config_file('config', help_string='Config file, as configs/digits.py:debug.')
WORKDIR = flags.DEFINE_string('workdir', '', 'Run folder; default runs/<config name>.')
MODE = flags.DEFINE_enum('mode', 'train', list(MODES), 'What to do.')
STAGES = flags.DEFINE_string(
  'stages', '', 'Comma list of stages; default all (train) or the last (the rest).'
)
DISTRIBUTED = flags.DEFINE_enum(
  'distributed', 'auto', list(distributed.MODES), 'Join the other processes of this job.'
)
TOPOLOGY = flags.DEFINE_string(
  'topology', '', "With --mode=compile: slices, as 'v5e:4x4,v5e:16x16'; default config.compile.topology."
)
OUT = flags.DEFINE_string('out', '', f'With {"|".join(WRITERS)}: where to write; default the run folder.')
SWEEP = flags.DEFINE_bool('sweep', False, 'With --mode=evaluate: over config.evaluate.sweep.')


def main(argv: list[str]) -> None:
  """Checks the config and calls the function of the mode."""
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.ERROR)  # --verbosity=0 shows what the libraries say
  run = asked_for(argv)
  modes = SWEEPS if SWEEP.value else MODES
  distributed.join(DISTRIBUTED.value, run.config.processes)
  if MODE.value != 'prepare':
    runtime.check_devices()
  checked.check(run, MODE.value)
  modes[MODE.value](run)


def asked_for(argv: list[str]) -> configs.Run:
  """Returns what the command line asks for, its config whole; nothing of JAX has been started yet.

  Raises:
    UserError: for the first thing in it that cannot be.
  """
  if len(argv) > 1:
    raise UserError(f'unexpected argument {argv[1]!r}; options are written --name=value')
  if OUT.value and MODE.value not in WRITERS:
    raise UserError(f'--out goes with --mode={" or ".join(WRITERS)}, not with --mode={MODE.value}')
  config = CONFIG.value
  if config is None:
    raise UserError('give --config=configs/<name>.py, or --workdir=<folder> of an earlier run')
  if SWEEP.value and MODE.value not in SWEEPS:
    raise UserError(f'--sweep goes with --mode={" or ".join(SWEEPS)}, not with --mode={MODE.value}')
  checked.complete(config)
  if TOPOLOGY.value:
    config.compile.topology = TOPOLOGY.value
  if not WORKDIR.value and not config.name:
    raise UserError("config.name is '' and would name the run folder, runs/<name>; give --workdir=<folder>")
  workdir = places.anywhere(WORKDIR.value or f'runs/{config.name}', '--workdir')
  if workdir.exists() and not workdir.is_dir():
    raise UserError(f'--workdir is {workdir}, which is a file; give a folder')
  out = places.anywhere(OUT.value, '--out') if OUT.value else None
  return configs.Run(config, workdir, configs.stages_of(config, STAGES.value), out)


def cli() -> None:
  """Runs `main`; what the user must mend is one message and exit status 2. Others: `vaediff.distributed`."""
  started = signal.getsignal(signal.SIGINT) is runtime.interrupted
  if started:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.unraisablehook = runtime.interrupting_again(sys.unraisablehook)
  try:
    argv = command_line.complete_argv(sys.argv)
    try:
      app.run(main, argv=argv, flags_parser=command_line.parse_flags)
    except (AttributeError, KeyError) as error:
      missing = command_line.missing_key(error, argv)
      if missing is None:
        raise
      raise missing from error
  except Exception as error:  # SystemExit is none
    end_with(error)
  except KeyboardInterrupt:
    with contextlib.suppress(KeyboardInterrupt):
      print('interrupted', file=sys.stderr)
    leave_quietly(distributed.STOPPED)
  except SystemExit as error:
    flush_or_say(error)
    raise
  finally:
    if started:
      signal.signal(signal.SIGINT, runtime.interrupted)  # while Python ends, too, a trace says nothing


def end_with(error: Exception) -> NoReturn:
  """Ends the process with the message and the status of an error; raises what is a mistake of the program."""
  match error:
    case UserError():
      distributed.leave(str(error), 2)
    case distributed.Preempted():
      print(f'preempted: {error}. Run the same command again to go on', file=sys.stderr)
      sys.exit(error.status)
    case jax.errors.JaxRuntimeError() if 'RESOURCE_EXHAUSTED' in str(error):
      distributed.leave(f'the memory of the device is not enough: {first_line(error)}. {SMALLER}', 2)
    case jax.errors.JaxRuntimeError() if jax.process_count() > 1:
      distributed.leave(
        f'process {jax.process_index()} of {jax.process_count()}: {first_line(error)}. Another '
        'process is lost, or a device failed. The run goes on from its last checkpoint when started again'
      )
    case MemoryError():
      distributed.leave(f'the memory of this machine is not enough: {first_line(error)}. {SMALLER}', 2)
    case RecursionError():
      distributed.leave(
        f'something that was read is nested too deeply: {first_line(error)}. Look at the config, '
        'config.json and '
        'the files that it names', 2,
      )  # fmt: skip
    case OSError() if is_of_stdout(error):
      with contextlib.suppress(OSError, ValueError):
        print(f'error: {stdout_is_gone(error)}', file=sys.stderr)
      leave_quietly(2)
    case OSError() if error.filename is not None or error.errno is not None:
      distributed.leave(f'{error.filename or "a file of the run"}: {files.reason(error)}', 2)
  raise error


SMALLER = (
  'Lower config.<stage>.train.batch_size, or raise train.microbatches; for pictures and figures lower '
  'config.<stage>.sample.batch_size or config.evaluate.batch_size'
)
"""What to do where memory is not enough."""


def first_line(error: BaseException) -> str:
  """Returns the first line of what an error says."""
  return files.reason(error)


def is_of_stdout(error: OSError) -> bool:
  """Returns whether it was the standard output that could not be written."""
  if error.filename is not None or error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF):
    return False
  if error.errno == errno.EPIPE:
    return True
  try:
    sys.stdout.write('\n')
    sys.stdout.flush()
  except (OSError, ValueError):
    return True
  return False


def stdout_is_gone(error: OSError) -> str:
  """Returns what to say about it."""
  why = files.reason(error)
  return f'the standard output cannot be written: {why}. Send it to a file on a disk that has room, > log.txt'


def flush_or_say(ending: SystemExit) -> None:
  """Writes what the standard output still holds; where it cannot, a program that did all else says so."""
  try:
    if sys.stdout:
      sys.stdout.flush()
  except (OSError, ValueError) as error:
    if ending.code in (None, 0) and isinstance(error, OSError):
      with contextlib.suppress(OSError, ValueError):
        print(f'error: {stdout_is_gone(error)}', file=sys.stderr)
      leave_quietly(2)
    leave_quietly(ending.code if isinstance(ending.code, int) else 1)


def leave_quietly(status: int) -> NoReturn:
  """Ends the process; what the standard output cannot take is thrown away, and Python's end is silent."""
  for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
    try:
      if stream:
        stream.flush()
    except (OSError, ValueError):
      with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
  sys.exit(status)


if __name__ == '__main__':
  cli()
