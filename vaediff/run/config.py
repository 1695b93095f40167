"""Configs: load from a run, check, store; and tell whether two runs are the same.

A config is an `ml_collections.ConfigDict`; every key is declared in `configs/base.py` or, by experiment, in
`configs/stages`. Overrides read `--config.refiner.optim.learning_rate=1e-4`. A run stores its config as
`config.json`, so `--workdir` alone is enough after training.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from ml_collections import ConfigDict

from vaediff import checks
from vaediff.errors import UserError
from vaediff.run import earlier, values

FILE = 'config.json'
MAY_CHANGE = (
  'train.num_steps',
  'train.log_every_steps',
  'train.save_every_steps',
  'train.eval_every_steps',
  'train.grid_every_steps',
  'train.grid_images',
  'train.eval_images',
  'train.keep_checkpoints',
  'train.best_*',
  'train.on_bad_step',
  'train.spike_factor',
  'train.profile_steps',
  'sample.*',
  'prior.*',
  'data_dir',
  'path',
  'num_threads',
  'prefetch',
  'materialize',
)
"""Patterns of fields of a stage or of `data` that may differ when a run goes on; all others would change its
results. `train.num_steps` may only where nothing changes towards the last step."""
OVER_TRAINING = {
  'optim*.schedule': ('cosine', 'linear'),
  'loss.reconstruction': ('linear', 'weighted_learning'),
}
"""Patterns of fields of a stage, and their values, that depend on how far it is from its last step."""
UNKNOWN = {'num_classes': 0}
"""Fields of `data` with the value that says: not known. It may become known when a run goes on."""
BOUNDS = {
  'name': checks.file_name(or_empty=True),
  'seed': checks.seed(),
  'data.image_size': checks.count(1),
  'data.channels': checks.count(1),
  'data.num_classes': checks.count(0),
  'data.crop_size': checks.count(0),
  'data.num_threads': checks.count(0),
  'data.prefetch': checks.count(1),
  'processes.join_timeout_seconds': checks.count(1),
  'processes.heartbeat_timeout_seconds': checks.count(1),
  'processes.silence_timeout_seconds': checks.at_least(0),
  'reconstruct.num_images': checks.count(1),
  'reconstruct.posterior': checks.one_of(('mean', 'sample')),
  'interpolate.num_encoded': checks.count(4),
  'interpolate.num_points': checks.count(2),
  'interpolate.num_rows': checks.count(1),
  'interpolate.from_label': checks.count(0),
  'interpolate.to_label': checks.count(0),
  'restore.task': checks.one_of(('super_resolution', 'denoise', 'inpaint')),
  'restore.num_images': checks.count(1),
  'restore.factor': checks.count(2),
  'restore.noise_std': checks.above(0),
  'restore.hole_fraction': checks.inside(0, 1),
  'compile.effort': checks.between(-1, 1),
  'benchmark.num_repeats': checks.count(1),
  'benchmark.sample_batch_size': checks.count(1),
  'benchmark.num_warmups': checks.count(1),
  'benchmark.num_sample_repeats': checks.count(1),
  'benchmark.matmul_size': checks.count(1),
}
"""Of every config; those of its section `evaluate`: `vaediff.evaluation.networks`."""
STAGE_BOUNDS = {
  'train.num_steps': checks.count(1),
  'train.batch_size': checks.count(1),
  'train.microbatches': checks.count(1),
  'train.log_every_steps': checks.count(1),
  'train.save_every_steps': checks.count(1),
  'train.eval_every_steps': checks.count(1),
  'train.grid_every_steps': checks.count(0),
  'train.grid_images': checks.count(1),
  'train.eval_images': checks.count(0),
  'train.keep_checkpoints': checks.count(1),
  'train.on_bad_step': checks.one_of(('stop', 'skip')),
  'train.spike_factor': checks.zero_or_above(1),
  'train.profile_steps': checks.each(checks.count(1)),
  'train.best_every_steps': checks.count(1),
  'train.best_images': checks.count(1),
  'sample.checkpoint': checks.one_of(('latest', 'best')),
  'sample.num_images': checks.count(1),
  'sample.batch_size': checks.count(1),
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
  """

  config: ConfigDict
  workdir: pathlib.Path
  stages: tuple[str, ...]


def read(workdir: str | os.PathLike[str]) -> ConfigDict:
  """Returns the config stored in a run, by this version or an earlier one.

  Raises:
    UserError: when there is none, or it is not valid JSON.
  """
  path = pathlib.Path(workdir) / FILE
  try:
    stored = from_json(path.read_text(encoding='utf-8'))
    if 'stages' not in stored or 'data' not in stored:
      raise ValueError('it has no stages or no data section')
    return ConfigDict(earlier.upgrade(stored.to_dict())).lock()
  except FileNotFoundError as error:
    raise UserError(
      f'{path} does not exist: give --config, or the --workdir of a run that was started'
    ) from error
  except ValueError as error:
    raise UserError(f'{path} is not a stored config: {error}') from error


def from_json(text: str) -> ConfigDict:
  """Returns the locked config of a JSON text; lists become tuples, as they were.

  Raises:
    ValueError: for what is no JSON, or has a key twice in one section.
  """

  def section(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
      raise ValueError(f'it has the key {twice!r} twice in one section; remove one of them')
    return dict(pairs)

  def restore(value: Any) -> Any:
    if isinstance(value, dict):
      return {key: restore(item) for key, item in value.items()}
    return tuple(restore(item) for item in value) if isinstance(value, list) else value

  return ConfigDict(restore(json.loads(text, object_pairs_hook=section))).lock()


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


def check_stages(config: ConfigDict) -> None:
  """Raises UserError unless `config.stages` names sections of stages, each once."""
  if not isinstance(config, ConfigDict) or 'stages' not in config:
    raise UserError('the config names no stages; a config file makes one with configs.base.make')
  stages = config.stages
  if not isinstance(stages, tuple | list) or not all(isinstance(stage, str) for stage in stages):
    raise UserError(f"config.stages must be a tuple of names, as ('vae', 'refiner'), got {stages!r}")
  if not stages:
    raise UserError('config.stages is empty; name at least one stage')
  if len(set(stages)) != len(stages):
    raise UserError(f'config.stages names a stage twice: {stages}')
  known = ', '.join(name for name, value in config.items() if _is_stage(value)) or 'none'
  for stage in stages:
    if stage not in config:
      raise UserError(f'config.stages names {stage!r}, which has no section in the config; stages: {known}')
    if not _is_stage(config[stage]):
      raise UserError(f'config.stages names {stage!r}, which is no stage; stages: {known}')


def _is_stage(section: Any) -> bool:
  return isinstance(section, ConfigDict) and 'experiment' in section


def validate(config: ConfigDict) -> None:
  """Raises UserError for the first value that no run could use: names field, value and bound.

  Values that belong to one experiment are checked where it is built (`experiments.build`), rules across
  stages and modes in `vaediff.modes.checked`.
  """
  check_stages(config)
  _check(config, BOUNDS, 'config.')
  for stage in config.stages:
    _check(config[stage], STAGE_BOUNDS, f'config.{stage}.')
    checks.check(ConfigDict({'stage': stage}), {'stage': checks.file_name()}, 'a name in config.stages, ')
    steps = config[stage].train.profile_steps
    if steps and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
      raise UserError(
        f'config.{stage}.train.profile_steps must be () or (first, last) with 1 <= first <= last, got {steps}'
      )
  values.check(config)


def _check(section: ConfigDict, bounds: checks.Bounds, prefix: str) -> None:
  """Checks a table, once it is clear that what should be a section is one."""
  for field in bounds:
    inside, name = section, prefix
    for part in field.split('.')[:-1]:
      inside, name = inside[part], f'{name}{part}.'
      if not isinstance(inside, ConfigDict):
        raise UserError(f'{name[:-1]} must be a section, got {inside!r}')
  checks.check(section, bounds, prefix)


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
      may_change = any(fnmatchcase(field, pattern) for pattern in MAY_CHANGE) and not fixed_length
      known_now = field in UNKNOWN and before.get(field) == UNKNOWN[field]
      if before.get(field) == now.get(field) or may_change or known_now:
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
  return any(
    value in values
    for field, value in section.items()
    for pattern, values in OVER_TRAINING.items()
    if fnmatchcase(field, pattern)
  )


def _flatten(config: ConfigDict, prefix: str = '') -> Iterator[tuple[str, Any]]:
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      yield from _flatten(value, f'{prefix}{name}.')
    else:
      yield f'{prefix}{name}', value
