"""Configs: load from a run, check, store.

A config is an `ml_collections.ConfigDict`; every key is declared in `configs/base.py` or, by experiment, in
`configs/stages`. Overrides read `--config.refiner.optim.learning_rate=1e-4`. A run stores its config as
`config.json`, so `--workdir` alone is enough after training.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
from typing import Any

from ml_collections import ConfigDict

from vaediff import checks
from vaediff.diffusion.restoration import TASKS
from vaediff.errors import UserError
from vaediff.experiments import bounds, quantized
from vaediff.run import earlier, values
from vaediff.storage import files, places

FILE = 'config.json'
BOUNDS = {
  'name': checks.file_name(or_empty=True),
  'seed': checks.seed(),
  'data.image_size': checks.count(1),
  'data.channels': checks.count(1),
  'data.num_classes': checks.count(0),
  'data.crop_size': checks.count(0),
  'data.num_threads': checks.count(0),
  'data.prefetch': checks.count(1),
  'log.wandb.mode': checks.one_of(('disabled', 'offline', 'online')),
  'log.wandb.project': checks.file_name(),
  'log.wandb.entity': checks.file_name(or_empty=True),
  'processes.join_timeout_seconds': checks.count(1),
  'processes.heartbeat_timeout_seconds': checks.count(1),
  'processes.silence_timeout_seconds': checks.at_least(0),
  'reconstruct.num_images': checks.count(1),
  'reconstruct.posterior': checks.one_of(('mean', 'sample')),
  'reconstruct.through': checks.one_of(('', 'noise')),
  'reconstruct.num_steps': bounds.several(bounds.calls(), 'whole numbers in 1 ... 100000'),
  'interpolate.num_encoded': checks.count(4),
  'interpolate.num_points': checks.count(2),
  'interpolate.num_rows': checks.count(1),
  'interpolate.from_label': checks.count(0),
  'interpolate.to_label': checks.count(0),
  'interpolate.num_pairs': checks.count(0),
  'interpolate.num_directions': checks.count(0),
  'interpolate.deviations': checks.above(0),
  'interpolate.cutoff': checks.inside(0, 1),
  'vary.num_images': checks.count(1),
  'vary.num_variations': checks.count(1),
  'vary.num_steps': bounds.calls(),
  'vary.eta': checks.between(0, 1),
  'text_diff.num_images': checks.count(1),
  'text_diff.num_points': checks.count(2),
  'text_diff.num_steps': bounds.calls(),
  'text_diff.max_theta': checks.inside_or_at(0, 1),
  'restore.task': checks.one_of(('all', *TASKS)),
  'restore.method': checks.one_of(('consistent', 'condition')),
  'restore.num_images': checks.count(1),
  'restore.num_samples': checks.count(1),
  'restore.fill_rounds': checks.count(0),
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
  'sample.checkpoint': checks.checkpoint(),
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
    out: folder for what the mode writes; None = the run's.
  """

  config: ConfigDict
  workdir: pathlib.Path
  stages: tuple[str, ...]
  out: pathlib.Path | None = None


def read(workdir: str | os.PathLike[str]) -> ConfigDict:
  """Returns the config stored in a run, by this version or an earlier one.

  Where `config.json` is missing it is that of the checkpoint saved last: the file is a copy.

  Raises:
    UserError: when there is none, or it is no stored config.
  """
  path = places.anywhere(workdir) / FILE
  if path.exists():
    mend = 'where the run has checkpoints, remove it: it is made again from what they hold'
    with files.reading(path, mend):
      stored = parse(path.read_text(encoding='utf-8'))
  else:
    stored = _newest_in_checkpoints(path.parent)
  if stored is None:
    raise UserError(f'{path} does not exist: give --config, or the --workdir of a run that was started')
  values.check_types(stored, path)
  try:
    return from_stored(stored)
  except UserError:
    raise  # of a run that is known, and cannot be read
  except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
    raise UserError(f'{path} is not a stored config: {files.reason(error)}') from error


def parse(text: str) -> Any:
  """Returns the value of a JSON text.

  Raises:
    ValueError: for what is no JSON, or has a key twice in one section.
  """

  def section(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
      raise ValueError(f'it has the key {twice!r} twice in one section; remove one of them')
    return dict(pairs)

  return json.loads(text, object_pairs_hook=section)


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


def joined(config: ConfigDict, name: str, section: ConfigDict) -> ConfigDict:
  """Returns the config with one stage more, the last one, in the place of one of that name."""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config[name] = section
    config.stages = (*(stage for stage in config.stages if stage != name), name)
  return config


def with_quantized(config: ConfigDict, workdir: pathlib.Path) -> ConfigDict:
  """Returns the config with the stages that `--mode=quantize` has made in a run, of stages that it has.

  A config file knows none of them: stored as it is, it would take their names from the run.
  """
  if not (workdir / FILE).exists():
    return config
  with contextlib.suppress(UserError):  # of a file that cannot be read nothing can be kept
    stored = read(workdir)
    for stage in stored.stages:
      section = stored[stage]
      made = section.experiment == quantized.SECTION and stage not in config
      if made and section[quantized.SECTION].stage in config.stages:
        config = joined(config, stage, section)
  return config


def stages_of(config: ConfigDict, chosen: str = '') -> tuple[str, ...]:
  """Returns the stages that a comma list chooses, in the config's order; by default those that are trained.

  One that `--mode=quantize` has made of another is not among these: what a run draws by default stays what it
  was.

  Raises:
    UserError: for a name that is not a stage of this config.
  """
  if not chosen:
    return tuple(stage for stage in config.stages if config[stage].experiment != quantized.SECTION)
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
