"""Whether what is asked for now is what a checkpoint was trained as: the config inside it is the truth.

`config.json` is a copy for `--workdir` alone. A place is no setting: what lies there has an id of its own.
"""

import pathlib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from ml_collections import ConfigDict

from vaediff.data import sources
from vaediff.errors import UserError
from vaediff.run import checkpoint, log
from vaediff.run import config as configs
from vaediff.storage import identity

DATA = 'data'
"""In the `meta` of a checkpoint: the fingerprints of the images it was trained with, by split."""
PLACES = ('path', 'data_dir', 'num_threads', 'prefetch', 'materialize', 'check_fingerprint')
"""Of `data`, what says where images lie and how they are read, and not which they are."""
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
  'conditions.*.prior_stage',
  '*.workdir',
  *PLACES,
)
"""Patterns of fields of a stage or of `data` that may differ when a run goes on; all others would change its
results. `train.num_steps` may only where nothing changes towards the last step."""
OF_PICTURES = (
  'sample.checkpoint',
  'sample.num_images',
  'sample.batch_size',
  'sample.seed',
  'sample.save_*',
  'sample.with_vae',
  'sample.labels',
  'sample.captions',
  'sample.rerank.*',
  'sample.temperature',
  'sample.top_*',
)
"""Of those, what a student's training does not read: it is made for its own times and way of sampling."""
OF_TEACHERS = (
  'sample.clip',
  'sample.guidance_weight',
  'sample.guidance',
  'sample.guidance_interval',
  'sample.guide.stage',
  'sample.guide.step',
  'sample.classifier.stage',
  'sample.classifier.scale',
)
"""Fields of a teacher's section that its student's training reads."""
OVER_TRAINING = {
  'optim*.schedule': ('cosine', 'linear'),
  'loss.reconstruction': ('linear', 'weighted_learning'),
}
"""Patterns of fields of a stage, and their values, that depend on how far it is from its last step."""
UNKNOWN = {'num_classes': 0, 'caption_feature': ''}
"""Fields of `data` with the value that says: not known. It may become known when a run goes on."""


def check_stage(
  config: ConfigDict, stage_folder: pathlib.Path, stage: str, *, training: bool = False, step: int = 0
) -> ConfigDict:
  """Returns the config that a stage was trained with, inside a checkpoint of it.

  Args:
    config: what is asked for now.
    stage_folder: holds the checkpoint: `<workdir>/<stage>`, or its best.
    stage: its name.
    training: it may go on from there; what the training of a student reads of how it, or its teacher, is
      sampled must then be the same.
    step: of the checkpoint; 0 = the latest.

  Raises:
    UserError: for the first field that is another: names it, and both values.
  """
  stored = stored_config(stage_folder, step)
  problems = []
  if config.seed != stored.seed:
    problems.append(('seed', stored.seed, config.seed))
  problems += _of_section(stored, config, 'data')
  problems += _of_section(stored, config, stage, _also_fixed(config, stage) if training else ())
  if training:
    problems += _of_teacher(stored, config, stage)
  if problems:
    field, before, now = problems[0]
    more = f' (and {len(problems) - 1} more fields)' if len(problems) > 1 else ''
    raise UserError(
      f'{stage_folder} was trained with another config: config.{field} is {before!r} there, {now!r} now'
      f'{more}. Nothing was changed. Use another --workdir, or the same values, or --workdir alone; where '
      f'{configs.FILE} was edited, remove it: it is a copy of the config in the checkpoint'
    )
  return stored


def stored_config(stage_folder: pathlib.Path, step: int = 0) -> ConfigDict:
  """Returns the config inside the checkpoint of a step of a stage, for 0 of the latest.

  Raises:
    DamagedCheckpoint: when there is none in it.
  """
  meta = checkpoint.load_meta(stage_folder, step)
  try:
    return configs.from_stored(meta['config'])
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    if identity.SEAL in meta and 'config' in meta:  # it is whole: what cannot be read of it is no damage
      raise
    folder = checkpoint.folder_of(stage_folder, step)
    raise checkpoint.damaged(folder, ValueError('there is no config in it')) from error


def with_own_data_places(config: ConfigDict, own: ConfigDict) -> ConfigDict:
  """Returns the config of another run, whose images are looked for where the run that asks has its own.

  Args:
    config: of the other run.
    own: of the run that asks. Where its images are of another source, the other's places stay.
  """
  if (config.data.source, config.data.name) != (own.data.source, own.data.name):
    return config
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.data.update({name: own.data[name] for name in PLACES})
  return config


def open_images(
  config: ConfigDict, split: str, stage_folder: pathlib.Path, step: int = 0
) -> sources.Source:
  """Returns the images of a split ('train' or 'eval'), which must be those that a stage was trained with.

  They are compared with those of the checkpoint of `step`, for 0 of the latest.

  Raises:
    Stale: when they are others; with `data.check_fingerprint` off that is only said.
  """
  source = sources.open_source(config.data, split)
  check_images(config, {split: source}, stage_folder, step)
  return source


def check_images(
  config: ConfigDict, images: Mapping[str, sources.Source], stage_folder: pathlib.Path, step: int = 0
) -> None:
  """Raises Stale when images are not those that a stage was trained with.

  Args:
    config: of the run; with `data.check_fingerprint` off other images are said in a line, and used.
    images: by split; one that the checkpoint has no fingerprint of is not compared.
    stage_folder: holds the checkpoint of the stage: `<workdir>/<stage>`, or its best.
    step: of the checkpoint; 0 = the latest.

  Raises:
    Stale: names the checkpoint and the first split whose images are others.
  """
  stored = checkpoint.load_meta(stage_folder, step).get(DATA, {})
  wanted = {split: source.fingerprint for split, source in images.items() if split in stored}
  try:
    identity.compare(
      f'the checkpoint of {stage_folder}',
      {f'the images of data.{split}_split': stored[split] for split in wanted},
      {f'the images of data.{split}_split': value for split, value in wanted.items()},
      'Put those images back, or train anew in another --workdir; with --config.data.check_fingerprint=False '
      'these are used all the same',
    )
  except identity.Stale as error:
    if config.data.check_fingerprint:
      raise
    log.say(f'data.check_fingerprint is off: {error}')


def changes_over_training(section: dict[str, Any]) -> bool:
  """Returns whether the length of training changes its steps; fields as 'optim.schedule'."""
  return any(
    value in values
    for field, value in section.items()
    for pattern, values in OVER_TRAINING.items()
    if fnmatchcase(field, pattern)
  )


Problem = tuple[str, Any, Any]
"""A field, its value in the checkpoint, and its value now."""


def _of_section(
  stored: ConfigDict, config: ConfigDict, name: str, fixed: tuple[str, ...] = ()
) -> Iterator[Problem]:
  """Yields the fields of a section that have changed and may not; those of `fixed` may not in any case."""
  if name not in stored or name not in config:
    if (name in stored) != (name in config):
      yield name, *('a section' if name in where else 'no such section' for where in (stored, config))
    return
  before, now = dict(_flatten(stored[name])), dict(_flatten(config[name]))
  for field in sorted(before.keys() | now.keys()):
    same = before.get(field) == now.get(field)
    known_now = field in UNKNOWN and before.get(field) == UNKNOWN[field]
    if not same and not known_now and (field in fixed or not _may_change(field, now)):
      yield f'{name}.{field}', before.get(field), now.get(field)


def _may_change(field: str, section: dict[str, Any]) -> bool:
  if field == 'train.num_steps':
    return not changes_over_training(section)
  return any(fnmatchcase(field, pattern) for pattern in MAY_CHANGE)


def _also_fixed(config: ConfigDict, stage: str) -> tuple[str, ...]:
  """Returns the fields of how a student is sampled that its training reads; () for other stages."""
  if stage not in config or 'teacher' not in config[stage]:
    return ()
  fields = (f'sample.{name}' for name, _ in _flatten(config[stage].sample))
  return tuple(
    field for field in fields if not any(fnmatchcase(field, pattern) for pattern in OF_PICTURES)
  )


def _of_teacher(stored: ConfigDict, config: ConfigDict, stage: str) -> Iterator[Problem]:
  """Yields what has changed of the section of a student's teacher and its training reads."""
  teacher = config[stage].teacher.stage if stage in config and 'teacher' in config[stage] else ''
  if not teacher or teacher not in stored or teacher not in config:
    return
  before, now = (dict(_flatten(where[teacher])) for where in (stored, config))
  for field in OF_TEACHERS:
    if before.get(field) != now.get(field):
      yield f'{teacher}.{field}', before.get(field), now.get(field)


def _flatten(config: ConfigDict, prefix: str = '') -> Iterator[tuple[str, Any]]:
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      yield from _flatten(value, f'{prefix}{name}.')
    else:
      yield f'{prefix}{name}', value
