"""Configs: load from the command line or from a run, check, store; and tell whether two runs are the same.

A config is an `ml_collections.ConfigDict`; every key is declared in `configs/base.py`. Overrides read
`--config.refiner.optim.learning_rate=1e-4`. A run stores its config as `config.json`, so `--workdir` alone
is enough after training.
"""

import dataclasses
import inspect
import json
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from vaediff.errors import UserError

FILE = 'config.json'
STORED = pathlib.Path(__file__).with_name('stored_config.py')
"""The config file that stands for the config of a run."""
MAY_CHANGE = (
  'train.num_steps',
  'train.log_every_steps',
  'train.save_every_steps',
  'train.eval_every_steps',
  'train.grid_every_steps',
  'train.grid_images',
  'train.eval_images',
  'train.keep_checkpoints',
  'train.best_',
  'train.on_bad_step',
  'train.spike_factor',
  'train.profile_steps',
  'sample.',
  'prior.',
  'data_dir',
  'path',
  'num_threads',
  'prefetch',
  'materialize',
)
"""Fields of a stage or of `data` that may differ when a run goes on; all others would change its results.
`train.num_steps` may only where nothing changes towards the last step."""
OVER_TRAINING = {
  'optim.schedule': ('cosine', 'linear'),
  'optim_discriminator.schedule': ('cosine', 'linear'),
  'optim_fake.schedule': ('cosine', 'linear'),
  'loss.reconstruction': ('linear', 'weighted_learning'),
}
"""Fields of a stage, and their values, that depend on how far it is from its last step."""


@dataclasses.dataclass(frozen=True)
class Run:
  """What a mode is called with.

  Attributes:
    config: complete and checked.
    workdir: the run's folder.
    stages: of `config.stages`, in their order.
  """

  config: ConfigDict
  workdir: pathlib.Path
  stages: tuple[str, ...]


def complete_argv(argv: list[str]) -> list[str]:
  """Returns the arguments with `--config` filled in from `--workdir` where it is not given.

  Also lets config files import their neighbours (`from configs import base`) from any working directory.
  """
  given = [arg.split('=', 1)[1] for arg in argv if arg.startswith('--config=')]
  for index, arg in enumerate(argv[:-1]):
    if arg == '--config':
      given.append(argv[index + 1])
  if given:
    root = str(pathlib.Path(given[-1].split(':')[0]).resolve().parent.parent)
    if root not in sys.path:
      sys.path.insert(0, root)
    return argv
  workdirs = [arg.split('=', 1)[1] for arg in argv if arg.startswith('--workdir=')]
  for index, arg in enumerate(argv[:-1]):
    if arg == '--workdir':
      workdirs.append(argv[index + 1])
  if not workdirs:
    return argv
  return [argv[0], f'--config={STORED}:{workdirs[-1]}', *argv[1:]]


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
    'key to that file, in the section and with the default that configs/base.py gives it, or pass '
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
    stored = stored_file(argv)
    newer = f'. A run of an earlier version lacks newer keys: add them to {stored}' if stored else ''
    raise UserError(
      f'{argument}: the config has no key {name!r}. {hint}Keys are declared in configs/base.py{newer}'
    ) from error
  except OSError as error:
    raise UserError(
      f'the config file cannot be loaded: {str(error).splitlines()[-1].strip()}. Give the path of a file, as '
      '--config=configs/digits.py, or with variants --config=configs/digits.py:z,debug'
    ) from error


def read(workdir: str | os.PathLike[str]) -> ConfigDict:
  """Returns the config stored in a run.

  Raises:
    UserError: when there is none, or it is not valid JSON.
  """
  path = pathlib.Path(workdir) / FILE
  try:
    stored = from_json(path.read_text(encoding='utf-8'))
    if 'stages' not in stored or 'data' not in stored:
      raise ValueError('it has no stages or no data section')
    return stored
  except FileNotFoundError as error:
    raise UserError(
      f'{path} does not exist: give --config, or the --workdir of a run that was started'
    ) from error
  except ValueError as error:
    raise UserError(f'{path} is not a stored config: {error}') from error


def from_json(text: str) -> ConfigDict:
  """Returns the locked config of a JSON text; lists become tuples, as they were."""

  def restore(value: Any) -> Any:
    if isinstance(value, dict):
      return {key: restore(item) for key, item in value.items()}
    return tuple(restore(item) for item in value) if isinstance(value, list) else value

  return ConfigDict(restore(json.loads(text))).lock()


def to_json(config: ConfigDict) -> str:
  """Returns the config as indented JSON."""
  return json.dumps(json.loads(config.to_json()), indent=2) + '\n'


def save(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Writes `config.json` at once: a kill leaves the old file or the new one."""
  workdir.mkdir(parents=True, exist_ok=True)
  temporary = workdir / f'.{FILE}.{os.getpid()}.tmp'
  temporary.write_text(to_json(config), encoding='utf-8')
  os.replace(temporary, workdir / FILE)


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
  data = config.data
  for field, least in (
    ('image_size', 1),
    ('channels', 1),
    ('crop_size', 0),
    ('num_threads', 0),
    ('prefetch', 1),
  ):
    _at_least(f'data.{field}', data[field], least)
  for stage in config.stages:
    if stage not in config:
      raise UserError(f'config.stages names {stage!r}, which has no section in the config')
    section = config[stage]
    for field in (
      'num_steps',
      'batch_size',
      'log_every_steps',
      'save_every_steps',
      'eval_every_steps',
      'best_every_steps',
      'best_images',
    ):
      _at_least(f'{stage}.train.{field}', section.train[field], 1)
    for field in ('keep_checkpoints', 'grid_images', 'microbatches'):
      _at_least(f'{stage}.train.{field}', section.train[field], 1)
    for field in ('grid_every_steps', 'eval_images'):
      _at_least(f'{stage}.train.{field}', section.train[field], 0)
    for field in ('num_images', 'batch_size'):
      _at_least(f'{stage}.sample.{field}', section.sample[field], 1)
    _seed(f'{stage}.sample.seed', section.sample.seed)
  for field in ('join_timeout_seconds', 'heartbeat_timeout_seconds'):
    _at_least(f'processes.{field}', config.processes[field], 1)
  _at_least('processes.silence_timeout_seconds', config.processes.silence_timeout_seconds, 0)
  _at_least('reconstruct.num_images', config.reconstruct.num_images, 1)
  _seed('seed', config.seed)
  _at_least('interpolate.num_encoded', config.interpolate.num_encoded, 4)
  _at_least('interpolate.num_points', config.interpolate.num_points, 2)
  _at_least('interpolate.num_rows', config.interpolate.num_rows, 1)
  _at_least('restore.num_images', config.restore.num_images, 1)
  for field in ('num_repeats', 'sample_batch_size', 'num_warmups', 'num_sample_repeats'):
    _at_least(f'benchmark.{field}', config.benchmark[field], 1)


def check_same_run(
  config: ConfigDict, stored: ConfigDict, trained: tuple[str, ...], workdir: pathlib.Path
) -> None:
  """Raises UserError when `workdir` holds stages trained with other settings than `config`'s.

  Args:
    config: what is asked for now.
    stored: the run's config.
    trained: stages of the run that have a checkpoint.
    workdir: the run's folder.
  """
  sections = [('data', 'data'), *[(stage, stage) for stage in trained]]
  problems = []
  if trained and config.seed != stored.seed:
    problems.append(('seed', stored.seed, config.seed))
  for name, section in sections:
    if not trained:
      break
    if section not in config:
      problems.append((name, 'a trained stage', 'no such section'))
      continue
    before, now = dict(_flatten(stored[section])), dict(_flatten(config[section]))
    for field in sorted(before.keys() | now.keys()):
      fixed_length = field == 'train.num_steps' and changes_over_training(now)
      if before.get(field) == now.get(field) or (field.startswith(MAY_CHANGE) and not fixed_length):
        continue
      problems.append((f'{name}.{field}', before.get(field), now.get(field)))
  if problems:
    field, before, now = problems[0]
    more = f' (and {len(problems) - 1} more fields)' if len(problems) > 1 else ''
    raise UserError(
      f'{workdir} holds a run of another config: config.{field} is {before!r} there, {now!r} now{more}. '
      'Nothing was changed. Use another --workdir, or the same values, or --workdir alone'
    )


def changes_over_training(section: dict[str, Any]) -> bool:
  """Returns whether the length of training changes its steps; fields as 'optim.schedule'."""
  return any(section[field] in values for field, values in OVER_TRAINING.items() if field in section)


def _flatten(config: ConfigDict, prefix: str = '') -> Iterator[tuple[str, Any]]:
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      yield from _flatten(value, f'{prefix}{name}.')
    else:
      yield f'{prefix}{name}', value


def _at_least(field: str, value: int | float, least: int) -> None:
  if value < least:
    raise UserError(f'config.{field} must be >= {least}, got {value}')


def _seed(field: str, value: int) -> None:
  if not 0 <= value < 2**31:
    raise UserError(f'config.{field} must be in [0, 2^31), got {value}')
