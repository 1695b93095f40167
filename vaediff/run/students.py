"""Stages with a teacher, made whole: a student is its teacher's section, and the config says what differs.

`resolve` is called once the config is complete, overrides included. It lays the section of every such stage
over a copy of its teacher's, turns a stage of progressive distillation into one stage for each halving, such
as `distill_256`, ..., `distill_1`, and puts a student that predicts v between a teacher that predicts eps and
its own.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from ml_collections import ConfigDict

from vaediff import checks, conditions
from vaediff.errors import UserError
from vaediff.experiments import guides, progressive
from vaediff.run import controls
from vaediff.run.controls import read_from

MATCHED = {False: 'v', True: 'guided'}
"""What is appended to the name of the stage before the others, without and with guidance."""
OWN_TRAINING = ('experiment', 'optim*', 'train', 'loss', 'start')
"""Patterns of what a student does not take over of the first teacher's section: how that was trained."""

MOST_STEPS = 2**20
"""Of the first teacher of a chain of halvings: each is one step of a table, and one stage more."""


def resolve(config: ConfigDict) -> ConfigDict:
  """Returns the config, changed in place: its `stages` are all trainable. Changes nothing the second time.

  Stages with a control are made whole first (`vaediff.run.controls`).

  Raises:
    UserError: when a teacher is missing or no diffusion, or `from_steps` cannot be halved to `to_steps`.
  """
  controls.resolve(config)
  stages = []
  with config.unlocked():
    for stage in config.stages:
      section = config[stage] if stage in config else None
      if not isinstance(section, ConfigDict) or not _is_template(section):
        stages.append(stage)
      elif 'from_steps' in section:
        stages += _halvings(config, stage)
      else:
        stages += _one_student(config, stage)
    config.stages = tuple(stages)
    for name in [name for name, value in config.items() if isinstance(value, ConfigDict)]:
      if _is_template(config[name]):
        del config[name]  # an override would change nothing any more
  for stage in config.stages:
    check_chain(config, stage)
  return config


def check_chain(config: ConfigDict, stage: str) -> None:
  """Raises UserError where the teachers of a stage, each its student's, do not end with one that has none."""
  chain = [stage]
  while isinstance(config[chain[-1]], ConfigDict) and 'teacher' in config[chain[-1]]:
    named = config[chain[-1]].teacher
    if not isinstance(named, ConfigDict) or not {'stage', 'workdir'} <= set(named):
      raise UserError(f'config.{chain[-1]}.teacher must have a stage and a workdir, got {named!r}')
    if named.stage in chain:
      shown = ' -> '.join([*chain, named.stage])
      raise UserError(
        f'config.{chain[-1]}.teacher.stage is {named.stage!r}: these stages would teach each other in a '
        'circle, '
        f'{shown}. One of them needs a teacher that has none, as refiner'
      )
    if named.stage not in config or not isinstance(config[named.stage], ConfigDict):
      raise UserError(
        f'config.{chain[-1]}.teacher.stage is {named.stage!r}, which has no section in the config'
      )
    chain.append(named.stage)


def _is_template(section: ConfigDict) -> bool:
  """Returns whether it says how a student is made, and is none yet."""
  return 'teacher' in section and 'model' not in section


def _halvings(config: ConfigDict, stage: str) -> list[str]:
  """Adds one section per halving, and one before them where the teacher predicts eps or is guided."""
  section = config[stage]
  checks.check(section, progressive.TEMPLATE_BOUNDS, f'config.{stage}.')
  first, last, guided = section.from_steps, section.to_steps, section.guided
  if not 2 <= first <= MOST_STEPS or last < 1:
    raise UserError(
      f'config.{stage}.from_steps is {first} and {stage}.to_steps is {last}; they must be numbers with '
      f'1 <= to_steps < from_steps <= {MOST_STEPS}'
    )
  counts = [first]
  while counts[-1] > last and counts[-1] % 2 == 0:
    counts.append(counts[-1] // 2)
  if counts[-1] != last or len(counts) == 1:
    raise UserError(
      f'config.{stage}.from_steps is {first}, which is not {stage}.to_steps = {last} times 2, 4, 8, ...'
    )
  names, teacher = [], section.teacher.to_dict()
  root = _teacher(config, stage)
  if guided or root.diffusion.prediction == 'eps':
    names.append(f'{stage}_{MATCHED[guided]}')
    _add(config, names[-1], section, teacher, num_steps=0, guided=guided)
  for count in counts[1:]:
    taught_by = {'stage': names[-1], 'workdir': ''} if names else teacher
    names.append(f'{stage}_{count}')
    _add(config, names[-1], section, taught_by, num_steps=count, guided=guided)
  if guided:
    for name in names:
      config[name].sample.guidance_weight = root.sample.guidance_weight
  return names


def _add(
  config: ConfigDict,
  name: str,
  template: ConfigDict,
  teacher: dict[str, str],
  *,
  num_steps: int,
  guided: bool,
) -> None:
  """Adds the section of one stage of progressive distillation."""
  section = template.to_dict()
  first, num_last = section['from_steps'], section['last_train_steps']
  for field in ('from_steps', 'to_steps', 'guided', 'last_train_steps'):
    del section[field]
  section |= {'teacher': teacher, 'num_steps': num_steps}
  if num_steps == 0:
    section['data_free_fraction'] = 0.0  # it has no steps that could lead to the examples
  if 0 < num_steps <= 2 and num_last:
    section['train'] = {**section['train'], 'num_steps': num_last}
  config[name] = ConfigDict(section)
  config[name] = _student(config, name, section, num_steps or first)
  config[name].model.guidance_embedding = guided


def _one_student(config: ConfigDict, stage: str) -> list[str]:
  """Completes a student, and adds a stage before it where its teacher predicts eps."""
  names = [stage]
  section = config[stage].to_dict()
  if _teacher(config, stage).diffusion.prediction == 'eps':
    if 'distill' not in config:
      raise UserError(
        f'config.{stage}.teacher.stage is {section["teacher"]["stage"]!r}, which predicts eps and is first '
        'distilled into a student that predicts v: that takes the section distill, of the variant distill'
      )
    name = f'{stage}_v'
    _add(config, name, config.distill, section['teacher'], num_steps=0, guided=False)
    section['teacher'] = {'stage': name, 'workdir': ''}
    config[stage].teacher = ConfigDict(section['teacher'])
    names.insert(0, name)
  config[stage] = _student(config, stage, section, section['sample']['num_steps'])
  return names


def _teacher(config: ConfigDict, stage: str) -> ConfigDict:
  """Returns the section of a stage's teacher."""
  name = config[stage].teacher.stage
  valid = [key for key, value in config.items() if isinstance(value, ConfigDict) and _is_diffusion(value)]
  if name not in valid:
    raise UserError(
      f'config.{stage}.teacher.stage is {name!r}, which is no stage before it with a diffusion network; '
      f'valid: {", ".join(valid) or "none in this run"}'
    )
  return config[name]


def _is_diffusion(section: ConfigDict) -> bool:
  """Returns whether the stage is denoised step by step, by one network.

  A denoising GAN predicts nothing of the kind, and a control is no network of its own.
  """
  alone = 'model' in section and 'base' not in section
  return alone and 'diffusion' in section and 'prediction' in section.diffusion


def _first_teacher(config: ConfigDict, stage: str) -> ConfigDict:
  """Returns the section that the chain of teachers begins with: it has no fields of students."""
  check_chain(config, stage)
  section = config[stage]
  while 'teacher' in section:
    section = config[section.teacher.stage]
  return section


def _student(config: ConfigDict, stage: str, section: dict[str, Any], num_steps: int) -> ConfigDict:
  """Returns the section laid over its teacher's, with what distillation changes."""
  teacher = _teacher(config, stage).to_dict()
  workdir = section['teacher']['workdir']
  taken = {
    field: read_from(workdir, teacher[field])
    for field in _first_teacher(config, stage)
    if not any(fnmatchcase(field, pattern) for pattern in OWN_TRAINING)
  }
  # a teacher that reads the weight has one to be sampled with; that of another is distilled into the student
  weight = teacher['sample']['guidance_weight'] if teacher['model']['guidance_embedding'] else 0.0
  taken['conditions'] = conditions.for_student(taken['conditions'], section['teacher']['stage'], workdir)
  taken['model']['dropout'] = 0.0
  taken['diffusion']['variance'] = 'fixed'  # few steps have no noise between them
  taken['sample'] |= {
    'sampler': 'ddim',
    'grid': 'uniform',
    'eta': 0.0,
    'guidance_weight': weight,
    'guidance': (),
    'guidance_interval': (),
    **{name: {**value, 'stage': '', 'workdir': ''} for name, value in _guides(teacher['sample'])},
    't_start': 1.0,
    'temperature': 1.0,  # a student is taught from noise of unit deviation
    'recompute_eps': True,
    'bound_steps': 0,
  }
  if taken['sample']['variance'] == 'learned':
    taken['sample']['variance'] = 'large'
  section['sample'] = {**section['sample'], 'num_steps': num_steps}
  over = {
    field: {**taken[field], **value} if field in taken and isinstance(value, dict) else value
    for field, value in section.items()
  }
  return ConfigDict({**taken, **over})


def _guides(sample: Mapping[str, Any]) -> list[tuple[str, Any]]:
  """Returns the sections of a teacher's sampling that name networks which guide it: they teach through it."""
  return [(name, sample[name]) for name in guides.FIELDS if name in sample]
