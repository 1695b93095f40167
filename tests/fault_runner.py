"""Starts runs of `vaediff.main` as forks of one process that has imported everything: seconds less for each.

Reads a JSON object per line: {"argv": [...], "log": file} starts a run and is answered by its process id,
{"wait": id} by its exit status (negative: of the signal that ended it). With "powerless" permissions hold for
it though it is root's.
"""

import ctypes
import json
import os
import pathlib
import signal
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from vaediff.machine import runtime  # noqa: E402

runtime.set_environment()

import grain  # noqa: E402, F401 (with the next two: what a run imports when it comes to it)
import tensorboardX  # noqa: E402, F401
import tensorflow_datasets  # noqa: E402, F401

from vaediff import main  # noqa: E402


def drop_capabilities():
  """Makes this process, and those that it starts, root without what root may do beyond others."""
  version_3, number = 0x20080522, {'x86_64': 126, 'aarch64': 91}[os.uname().machine]
  header, nothing = (ctypes.c_uint32 * 2)(version_3, 0), (ctypes.c_uint32 * 6)()
  if ctypes.CDLL(None, use_errno=True).syscall(number, header, nothing):
    raise OSError(ctypes.get_errno(), 'capset')


def run(argv, log, powerless):
  """Never returns: the process ends as the run does."""
  if powerless:
    drop_capabilities()
  target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  for number in (1, 2):
    os.dup2(target, number)
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  sys.argv = ['vaediff.main', *argv]
  signal.signal(signal.SIGINT, signal.default_int_handler)
  status = 1
  try:
    main.cli()
    status = 0
  except SystemExit as error:
    status = error.code if isinstance(error.code, int) else int(error.code is not None)
  except BaseException:
    import traceback

    traceback.print_exc()
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


for line in sys.stdin:
  asked = json.loads(line)
  if 'wait' in asked:
    answer = os.waitstatus_to_exitcode(os.waitpid(asked['wait'], 0)[1])
  else:
    answer = os.fork()
    if not answer:
      run(asked['argv'], asked['log'], asked['powerless'])
  print(answer, flush=True)
