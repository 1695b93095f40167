"""Stages with a control, made whole: such a stage is its base's section, and the config says what differs.

`resolve` is called once the config is complete, overrides included. It lays the section of every such stage
over a copy of its base's: network, space, conditions and how samples are drawn are those.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from ml_collections import ConfigDict

from vaediff import conditions, reads
from vaediff.conditions.text import TEXT
from vaediff.errors import UserError

OWN_TRAINING = ('experiment', 'optim*', 'train', 'start')
"""Patterns of what a control does not take over of its base: how that was trained, but for its loss."""


def resolve(config: ConfigDict) -> ConfigDict:
  """Returns the config, changed in place: stages with a control have all fields. Changes none a second time.

  Raises:
    UserError: when a base is missing or no diffusion.
  """
  for stage in config.stages:
    section = config[stage] if stage in config else None
    if isinstance(section, ConfigDict) and is_template(section):
      with config.unlocked():
        config[stage] = _whole(config, stage)
  return config


def is_template(section: ConfigDict) -> bool:
  """Returns whether it says how a stage with a control is made, and is none yet."""
  return 'base' in section and 'model' not in section


def _whole(config: ConfigDict, stage: str) -> ConfigDict:
  """Returns the section laid over that of its base."""
  section = config[stage].to_dict()
  named = section['base']
  if not reads.is_stage(config, named['stage'], 'diffusion'):
    raise UserError(
      f'config.{stage}.base.stage is {named["stage"]!r}, which is no stage of this config whose experiment '
      'is diffusion, such as refiner. A student is no base, but a control of its teacher can be transferred '
      'to it: sample.transfer.stage'
    )
  base = config[named['stage']].to_dict()
  taken = {
    field: read_from(named['workdir'], value)
    for field, value in base.items()
    if not any(fnmatchcase(field, pattern) for pattern in OWN_TRAINING)
  }
  known = conditions.for_student(taken['conditions'], named['stage'], named['workdir'])
  if TEXT in known and known[TEXT]['dropout'] and section['caption_dropout']:
    known[TEXT] = {**known[TEXT], 'dropout': section['caption_dropout']}
  taken['conditions'] = known
  over = {
    field: {**taken[field], **value} if field in taken and isinstance(value, dict) else value
    for field, value in section.items()
  }
  return ConfigDict({**taken, **over})


def read_from(workdir: str, value: Any) -> Any:
  """Returns a copy of what a stage of another run has; stages that it names are stages of that run."""
  if not isinstance(value, Mapping):
    return value
  copy = {name: read_from(workdir, item) for name, item in value.items()}
  if {'stage', 'workdir'} <= copy.keys():
    copy['workdir'] = copy['workdir'] or workdir
  return copy
