"""`--mode=explore`: a page on this machine, on which the samples of a run are changed and looked at.

What is drawn: `explore_drawn`; what can be changed: `explore_controls`; the page: `explore_page`, which alone
imports its library.
"""

import importlib.util
import socket

import jax

from vaediff import checks, experiments
from vaediff.errors import UserError
from vaediff.machine import sharding
from vaediff.modes.explore_drawn import Explorer
from vaediff.run import checkpoint, log
from vaediff.run.config import Run
from vaediff.run.trained import Trained

LIBRARY = 'nicegui'
HOST = '127.0.0.1'
"""No other machine can reach it."""
BOUNDS = {
  'port': checks.between(1, 65535),
  'num_directions': checks.count(0),
  'deviations': checks.above(0),
  'num_encoded': checks.count(4),
  'num_points': checks.between(2, 32),
  'max_upload_bytes': checks.count(1),
  'max_upload_pixels': checks.count(1),
}


def mode(run: Run) -> None:
  """Serves the page until it is interrupted.

  Raises:
    UserError: for a setting that cannot be, a library that is missing, a port that is taken, or a run of
      which nothing can be drawn.
  """
  if jax.process_count() > 1:
    raise UserError(f'--mode=explore runs in one process, and this job has {jax.process_count()}')
  settings = run.config.explore
  checks.check(settings, BOUNDS, 'config.explore.')
  check_installed()
  explorer, first = open_run(run)
  check_port(settings.port)
  explorer.offer(first)  # what can be said is said before the page is there
  from vaediff.modes import explore_page  # the only place that needs the library

  log.say(f'{run.workdir.resolve()}: http://localhost:{settings.port} (end it with Ctrl-C)')
  explore_page.serve(explorer, first, HOST, settings.port, opens=settings.open)


def check_installed() -> None:
  """Raises UserError where the library of the page is not installed."""
  if importlib.util.find_spec(LIBRARY) is None:
    raise UserError(
      f"--mode=explore shows a page by {LIBRARY}, which is not installed: pip install -e '.[explore]'"
    )


def check_port(port: int) -> None:
  """Raises UserError for a port of this machine that cannot be listened to."""
  with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as one:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      one.bind((HOST, port))
    except OSError as error:
      raise UserError(
        f'config.explore.port is {port}, which cannot be listened to ({error.strerror}): another program, or '
        'another explorer, has it; choose another one'
      ) from error


def open_run(run: Run) -> tuple[Explorer, str]:
  """Returns the explorer of a run, and the stage that is shown first: the last of those that are chosen.

  Raises:
    UserError: when no stage is trained that draws images.
  """
  config, mesh = run.config, sharding.make_mesh(run.config.mesh)
  draws = (stage for stage in config.stages if experiments.build(config, stage).draws_images)
  trained = tuple(stage for stage in draws if checkpoint.latest_step(run.workdir / stage) is not None)

  def open_stage(stage: str) -> Trained:
    return Trained(config, run.workdir, stage, mesh)

  explorer = Explorer(config, run.workdir, trained, open_stage)
  chosen = [stage for stage in run.stages if stage in trained]
  if chosen:
    return explorer, chosen[-1]
  raise UserError(
    f'{run.workdir} has no trained stage that draws images among {", ".join(run.stages)}; train one, or name '
    'another with --stages'
  )
