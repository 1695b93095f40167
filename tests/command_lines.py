"""Command lines by the dozen: the package is imported once, and each is a process forked from there."""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
FORK = """
import json, os, sys
from vaediff import main
lines = json.loads(sys.argv[1])
for index, arguments in enumerate(lines):
  if os.fork() == 0:
    said = os.open(f'{sys.argv[2]}/{index}.txt', os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(said, 1), os.dup2(said, 2)
    sys.argv[1:] = arguments
    if index == len(lines) - 1:
      main.cli()
      sys.exit()  # the last of them ends as Python does
    status = 0
    try:
      main.cli()
    except SystemExit as end:
      if end.code is not None and not isinstance(end.code, int):
        raise  # a message: Python says it
      status = end.code or 0
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)  # what Python takes down at its end is not the test's, and takes most of the time
  print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def run_all(folder, lines):
  """Returns exit status and messages of `vaediff.main` with each line of arguments."""
  command = [sys.executable, '-c', FORK, json.dumps(lines), str(folder)]
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
  statuses = [int(line) for line in result.stdout.split()]
  said = [(folder / f'{index}.txt').read_text() for index in range(len(lines))]
  return list(zip(statuses, said, strict=True))
