"""The command line: `python -m vaediff.main --config=... --workdir=... --mode=... --stages=...`."""

import pathlib
import sys

from vaediff.machine import runtime

if __name__ == '__main__':
  runtime.restart_with_huge_pages('vaediff.main')
  runtime.set_environment()

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from vaediff.errors import UserError
from vaediff.machine import distributed
from vaediff.modes import MODES, SWEEPS, WRITERS
from vaediff.run import config as configs
from vaediff.run import students

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
  if len(argv) > 1:
    raise UserError(f'unexpected argument {argv[1]!r}; options are written --name=value')
  if OUT.value and MODE.value not in WRITERS:
    raise UserError(f'--out goes with --mode={" or ".join(WRITERS)}, not with --mode={MODE.value}')
  if CONFIG.value is None:
    raise UserError('give --config=configs/<name>.py, or --workdir=<folder> of an earlier run')
  students.resolve(CONFIG.value)
  configs.validate(CONFIG.value)
  distributed.join(DISTRIBUTED.value, CONFIG.value.processes)
  workdir = pathlib.Path(WORKDIR.value or f'runs/{CONFIG.value.name}')
  if TOPOLOGY.value:
    CONFIG.value.compile.topology = TOPOLOGY.value
  modes = SWEEPS if SWEEP.value else MODES
  if MODE.value not in modes:
    raise UserError(f'--sweep goes with --mode={" or ".join(SWEEPS)}, not with --mode={MODE.value}')
  out = pathlib.Path(OUT.value) if OUT.value else None
  modes[MODE.value](configs.Run(CONFIG.value, workdir, configs.stages_of(CONFIG.value, STAGES.value), out))


def cli() -> None:
  """Runs `main`; a mistake of the user's is one message and exit status 2. Others: `vaediff.distributed`."""
  argv = configs.complete_argv(sys.argv)
  try:
    app.run(main, argv=argv, flags_parser=configs.parse_flags)
  except UserError as error:
    distributed.leave(str(error), 2)
  except (AttributeError, KeyError) as error:
    missing = configs.missing_key(error, argv)
    if missing is None:
      raise
    distributed.leave(str(missing), 2)
  except distributed.Preempted as error:
    print(f'preempted: {error}. Run the same command again to go on', file=sys.stderr)
    sys.exit(error.status)
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1:
      raise
    distributed.leave(
      f'process {jax.process_index()} of {jax.process_count()}: {str(error).splitlines()[0]}. Another '
      'process is lost, or a device failed. The run goes on from its last checkpoint when started again'
    )
  except OSError as error:
    if error.filename is None and error.errno is None:
      raise
    distributed.leave(f'{error.filename or "a file of the run"}: {error.strerror}', 2)


if __name__ == '__main__':
  cli()
