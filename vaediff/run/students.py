"""Stages with a teacher, made whole: a student's network is its teacher's, and the config names only that.

`resolve` is called once the config is complete, overrides included. It gives every such stage the sections
`vae`, `model`, `diffusion` and `sample` of its teacher with what distillation changes, turns a stage of
progressive distillation into one stage for each halving, such as `distill_256`, ..., `distill_1`, and puts a
student that predicts v between a teacher that predicts eps and its own.
"""

from typing import Any

from ml_collections import ConfigDict

from vaediff.errors import UserError

MATCHED = {False: 'v', True: 'guided'}
"""What is appended to the name of the stage before the others, without and with guidance."""


def resolve(config: ConfigDict) -> ConfigDict:
  """Returns the config, changed in place: its `stages` are all trainable. Changes nothing the second time.

  Raises:
    UserError: when a teacher is missing, or `from_steps` cannot be halved to `to_steps`.
  """
  stages, expanded = [], []
  with config.unlocked():
    for stage in config.stages:
      section = config[stage] if stage in config else None
      if not isinstance(section, ConfigDict) or 'teacher' not in section or 'model' in section:
        stages.append(stage)
      elif 'from_steps' in section:
        stages += _halvings(config, stage)
        expanded.append(stage)
      else:
        stages += _one_student(config, stage)
    config.stages = tuple(stages)
    for stage in expanded:
      del config[stage]  # an override would change nothing any more
  return config


def _halvings(config: ConfigDict, stage: str) -> list[str]:
  """Adds one section per halving, and one before them where the teacher predicts eps or is guided."""
  section = config[stage]
  first, last, guided = section.from_steps, section.to_steps, section.guided
  counts = [first]
  while counts[-1] > last and counts[-1] % 2 == 0:
    counts.append(counts[-1] // 2)
  if last < 1 or counts[-1] != last or len(counts) == 1:
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
  if name not in config or 'diffusion' not in config[name] or 'model' not in config[name]:
    raise UserError(
      f'config.{stage}.teacher.stage is {name!r}, which is no stage before it with a diffusion network'
    )
  return config[name]


def _student(config: ConfigDict, stage: str, section: dict[str, Any], num_steps: int) -> ConfigDict:
  """Returns the section with the teacher's network and sampling, but for what distillation changes."""
  teacher = _teacher(config, stage).to_dict()
  vae = dict(teacher['vae'])
  vae['workdir'] = vae['workdir'] or section['teacher']['workdir']
  # a teacher that reads the weight has one to be sampled with; that of another is distilled into the student
  weight = teacher['sample']['guidance_weight'] if teacher['model']['guidance_embedding'] else 0.0
  sampling = {'sampler': 'ddim', 'grid': 'uniform', 'eta': 0.0, 'guidance_weight': weight, 't_start': 1.0}
  return ConfigDict(
    {
      **section,
      'vae': vae,
      'model': {**teacher['model'], 'dropout': 0.0},
      'diffusion': {**teacher['diffusion'], **section['diffusion']},
      'sample': {**teacher['sample'], **sampling, **section['sample'], 'num_steps': num_steps},
    }
  )
