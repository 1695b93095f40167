"""Configs: load from the command line or from a run, check, store.

A config is an `ml_collections.ConfigDict`; every key is declared in `configs/base.py` or, by experiment, in
`configs/stages`. Overrides read `--config.refiner.optim.learning_rate=1e-4`. A run stores its config as
`config.json`, so `--workdir` alone is enough after training.
"""

import contextlib
import dataclasses
import inspect
import json
import os
import pathlib
import re
import runpy
import sys
import traceback
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from vaediff import checks, files
from vaediff.errors import UserError
from vaediff.run import earlier

FILE = 'config.json'
STORED = pathlib.Path(__file__).with_name('stored_config.py')
"""The config file that stands for the config of a run."""
BOUNDS = {
  'data.image_size': checks.at_least(1),
  'data.channels': checks.at_least(1),
  'data.num_classes': checks.at_least(0),
  'data.crop_size': checks.at_least(0),
  'data.num_threads': checks.at_least(0),
  'data.prefetch': checks.at_least(1),
  'processes.join_timeout_seconds': checks.at_least(1),
  'processes.heartbeat_timeout_seconds': checks.at_least(1),
  'processes.silence_timeout_seconds': checks.at_least(0),
  'seed': checks.seed(),
  'reconstruct.num_images': checks.at_least(1),
  'interpolate.num_encoded': checks.at_least(4),
  'interpolate.num_points': checks.at_least(2),
  'interpolate.num_rows': checks.at_least(1),
  'restore.num_images': checks.at_least(1),
  'benchmark.num_repeats': checks.at_least(1),
  'benchmark.sample_batch_size': checks.at_least(1),
  'benchmark.num_warmups': checks.at_least(1),
  'benchmark.num_sample_repeats': checks.at_least(1),
}
"""Of every config."""
STAGE_BOUNDS = {
  'train.num_steps': checks.at_least(1),
  'train.batch_size': checks.at_least(1),
  'train.microbatches': checks.at_least(1),
  'train.log_every_steps': checks.at_least(1),
  'train.save_every_steps': checks.at_least(1),
  'train.eval_every_steps': checks.at_least(1),
  'train.grid_every_steps': checks.at_least(0),
  'train.grid_images': checks.at_least(1),
  'train.eval_images': checks.at_least(0),
  'train.keep_checkpoints': checks.at_least(1),
  'train.on_bad_step': checks.one_of(('stop', 'skip')),
  'train.spike_factor': checks.zero_or_above(1),
  'train.best_every_steps': checks.at_least(1),
  'train.best_images': checks.at_least(1),
  'sample.num_images': checks.at_least(1),
  'sample.batch_size': checks.at_least(1),
  'sample.seed': checks.seed(),
}
"""Of every stage; those of one experiment are its own (`experiments.build`)."""


@dataclasses.dataclass(frozen=True)
class Run:
  """What a mode is called with.

  Attributes:
    config: complete and checked.
    workdir: the run's folder.
    stages: of `config.stages`, in their order.
    out: folder for what the mode writes; None = the run's.
  """

  config: ConfigDict
  workdir: pathlib.Path
  stages: tuple[str, ...]
  out: pathlib.Path | None = None


def complete_argv(argv: list[str]) -> list[str]:
  """Returns the arguments with `--config` filled in from `--workdir` where it is not given.

  Also lets config files import their neighbours (`from configs import base`) from any working directory.
  """
  given = _given(argv, 'config')
  if given:
    root = str(pathlib.Path(given[-1].split(':')[0]).resolve().parent.parent)
    if root not in sys.path:
      sys.path.insert(0, root)
    return argv
  workdirs = _given(argv, 'workdir')
  if not workdirs:
    return argv
  return [argv[0], f'--config={STORED}:{workdirs[-1]}', *argv[1:]]


def _given(argv: list[str], flag: str) -> list[str]:
  """Returns the values of `--flag=value` and of `--flag value`."""
  after = [value for arg, value in zip(argv, argv[1:], strict=False) if arg == f'--{flag}']
  return [arg.split('=', 1)[1] for arg in argv if arg.startswith(f'--{flag}=')] + after


def stored_file(argv: list[str]) -> pathlib.Path | None:
  """Returns the `config.json` that arguments of `complete_argv` stand for; None where they name a config."""
  workdirs = [arg.partition(f'{STORED}:')[2] for arg in argv if arg.startswith(f'--config={STORED}:')]
  return pathlib.Path(workdirs[0]) / FILE if workdirs else None


def missing_key(error: AttributeError | KeyError, argv: list[str]) -> UserError | None:
  """Returns the error for a key that this version reads and a stored config does not have, or None.

  None where no config raised the error, or the config is not one that a run stored.
  """
  stored, frames = stored_file(argv), traceback.extract_tb(error.__traceback__)
  if stored is None or frames[-1].filename != inspect.getfile(ConfigDict):
    return None
  return UserError(
    f'the stored config {stored} has no key {_key_of(error)!r}: the run is of an earlier version. Add the '
    'key to that file, in the section and with the default that it has in configs, or pass '
    '--config=configs/<name>.py'
  )


def _key_of(error: AttributeError | KeyError) -> str:
  """Returns the first word of what ml_collections says: the name of the key."""
  words = re.search(r'\w+', str(error.args[0]))
  return words.group() if words else str(error)


def parse_flags(argv: list[str]) -> list[str]:
  """Parses absl flags and config overrides; returns what is left.

  Raises:
    UserError: for an unknown flag or config key (says which comes near), a value of the wrong type, or a
      config file that cannot be loaded.
  """
  try:
    rest = flags.FLAGS(argv)
    if flags.FLAGS['config'].value is not None:
      flags.FLAGS['config'].value.keys()  # a file that could not be loaded fails at its first use
    return rest
  except flags.Error as error:
    text = str(error).replace('flag --', '--', 1)
    if 'Traceback' in text:  # raised inside get_config: its own message is the last line
      text = text.strip().splitlines()[-1].split(': ', 1)[-1]
    raise UserError(text) from error
  except (AttributeError, KeyError) as error:
    name = _key_of(error)
    argument = next((arg for arg in argv if name in arg), name)
    near = re.search(r'Did you mean "\w+"', str(error.args[0]))
    hint = f'{near.group()}? ' if near else ''
    hint = (argument.startswith(f'--config.{name}.') and _no_such_stage(name, argv)) or hint
    stored = stored_file(argv)
    newer = f'. A run of an earlier version lacks newer keys: add them to {stored}' if stored else ''
    raise UserError(
      f'{argument}: the config has no key {name!r}. {hint}Keys are declared in configs/base.py and, by '
      f'experiment, in configs/stages{newer}'
    ) from error
  except OSError as error:
    raise UserError(
      f'the config file cannot be loaded: {str(error).splitlines()[-1].strip()}. Give the path of a file, as '
      '--config=configs/digits.py, or with variants --config=configs/digits.py:z,debug'
    ) from error


def _no_such_stage(name: str, argv: list[str]) -> str:
  """Returns what to do about a stage that runs can have and this one has not; '' for what is no stage."""
  files = sys.modules.get('configs.base')  # imported by the config file that is asked for, never from here
  if files is None or name not in files.known.BY_NAME:
    return ''
  variants = files.variants_with(name)
  others = f' Variants with it: {", ".join(variants)}.' if variants else ''
  path, _, variant = _given(argv, 'config')[-1].partition(':')
  stages = ', '.join(runpy.run_path(path)['get_config'](variant).stages)
  return f'This run has no stage {name!r}; its stages are {stages}.{others} '


def read(workdir: str | os.PathLike[str]) -> ConfigDict:
  """Returns the config stored in a run, by this version or an earlier one.

  Where `config.json` is missing it is that of the checkpoint saved last: the file is a copy.

  Raises:
    UserError: when there is none, or it is no stored config.
  """
  path = pathlib.Path(workdir) / FILE
  if path.exists():
    mend = 'where the run has checkpoints, remove it: it is made again from what they hold'
    stored = files.read_json(path, mend)
  else:
    stored = _newest_in_checkpoints(path.parent)
  if stored is None:
    raise UserError(f'{path} does not exist: give --config, or the --workdir of a run that was started')
  try:
    return from_stored(stored)
  except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
    raise UserError(f'{path} is not a stored config: {files.reason(error)}') from error


def from_stored(stored: Any) -> ConfigDict:
  """Returns the locked config of what a JSON file holds; lists become tuples, as they were.

  Raises:
    ValueError: when it is none.
  """

  def restore(value: Any) -> Any:
    if isinstance(value, dict):
      return {key: restore(item) for key, item in value.items()}
    return tuple(restore(item) for item in value) if isinstance(value, list) else value

  config = restore(stored)
  if not isinstance(config, dict) or not {'stages', 'data'} <= config.keys():
    raise ValueError('it has no stages or no data section')
  return ConfigDict(earlier.upgrade(config)).lock()


def _newest_in_checkpoints(workdir: pathlib.Path) -> Any:
  """Returns the config inside the checkpoint of a run that was saved last; None without one."""
  metas = sorted(workdir.glob('*/checkpoints/*/meta/metadata'), key=lambda path: path.stat().st_mtime)
  for path in reversed(metas):
    with contextlib.suppress(files.Damaged, KeyError, TypeError):
      return files.read_json(path)['config']
  return None


def to_json(config: ConfigDict) -> str:
  """Returns the config as indented JSON."""
  return json.dumps(json.loads(config.to_json()), indent=2) + '\n'


def save(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Writes `config.json` at once: a kill leaves the old file or the new one."""
  files.write_text(workdir / FILE, to_json(config))


def stages_of(config: ConfigDict, chosen: str = '') -> tuple[str, ...]:
  """Returns `config.stages`, or those of them that a comma list chooses, in the config's order.

  Raises:
    UserError: for a name that is not a stage of this config.
  """
  if not chosen:
    return tuple(config.stages)
  names = [name.strip() for name in chosen.split(',')]
  for name in names:
    if name not in config.stages:
      raise UserError(f'--stages names {name!r}; the stages of this config are {", ".join(config.stages)}')
  return tuple(name for name in config.stages if name in names)


def validate(config: ConfigDict) -> None:
  """Raises UserError for the first value that no run could use: names field, value and bound.

  Values that belong to one experiment are checked where it is built (`experiments.build`).
  """
  if not config.stages:
    raise UserError('config.stages is empty; name at least one stage')
  if len(set(config.stages)) != len(config.stages):
    raise UserError(f'config.stages names a stage twice: {config.stages}')
  for stage in config.stages:
    if stage not in config:
      raise UserError(f'config.stages names {stage!r}, which has no section in the config')
  checks.check(config, BOUNDS, 'config.')
  for stage in config.stages:
    checks.check(config[stage], STAGE_BOUNDS, f'config.{stage}.')
