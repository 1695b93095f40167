"""Networks of other runs that guide samples, made whole: the config says what they are, as stored there.

`resolve` is called once the config is complete, overrides included. For each `sample.guide` and
`sample.classifier` that names another run it takes over the section of that stage, under a name of its own:
a weaker network has the name of the stage that it guides, and is another.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from vaediff.errors import UserError
from vaediff.experiments import guides
from vaediff.run import checkpoint, same_run
from vaediff.run.students import read_from
from vaediff.storage import places

OF_DATA = ('image_size', 'channels', 'num_classes')
"""Fields of `data` in which another run cannot differ."""


def resolve(config: ConfigDict) -> ConfigDict:
  """Returns the config, changed in place: it has a section for every network of another run that guides.

  Raises:
    UserError: when there is no such trained stage, or it is one of other images or classes.
  """
  for stage in list(config):
    sample = _sample(config[stage])
    for field in guides.FIELDS if sample is not None else ():
      named = sample[field] if field in sample else None
      if not isinstance(named, ConfigDict) or not named.stage or not named.workdir:
        continue
      name = guides.section_of(stage, field, named)
      folder = places.anywhere(named.workdir) / named.stage
      if checkpoint.latest_step(folder) is None and name in config:
        continue  # it has moved since the run was stored: whoever samples says so
      section = _stored(config, stage, field, folder)
      with config.unlocked():
        config[name] = section
  return config


def _sample(section: Any) -> ConfigDict | None:
  """Returns how a stage is sampled; None where it is none of a diffusion, or not made whole yet."""
  if not isinstance(section, ConfigDict) or not {'experiment', 'sample', 'model'} <= set(section):
    return None
  return section.sample if isinstance(section.sample, ConfigDict) else None


def _stored(config: ConfigDict, stage: str, field: str, folder: pathlib.Path) -> ConfigDict:
  """Returns the section of a stage of another run; the stages that it names are stages of that run."""
  where = f'config.{stage}.sample.{field}'
  if checkpoint.latest_step(folder) is None:
    raise UserError(
      f'{where}.workdir is {str(folder.parent)!r}, which holds no trained stage {folder.name!r}; name the '
      f'folder of a run that has it, or set {where}.workdir to where that run lies now'
    )
  stored = same_run.stored_config(folder)
  for name in OF_DATA:
    if stored.data[name] != config.data[name]:
      raise UserError(
        f'{where}.workdir is {str(folder.parent)!r}, a run with data.{name} = {stored.data[name]!r}, but '
        f'here it is {config.data[name]!r}'
      )
  section = stored[folder.name].to_dict()
  if 'sample' in section:
    section['sample'] = _alone(section['sample'])
  return ConfigDict(read_from(str(folder.parent), section))


def _alone(sample: Mapping[str, Any]) -> dict[str, Any]:
  """Returns how a stage is sampled with nothing that guides it: a guide is not guided."""
  named = {name: {**sample[name], 'stage': '', 'workdir': ''} for name in guides.FIELDS if name in sample}
  if 'rerank' in sample:
    named['rerank'] = {**sample['rerank'], 'stage': '', 'workdir': ''}
  return {**sample, **named, **({'guidance': ()} if 'guidance' in sample else {})}
