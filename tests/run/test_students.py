"""What a student takes over of its teacher's section, and what it does not."""

import importlib
import pathlib
import sys

import pytest
from ml_collections import ConfigDict

from vaediff.errors import UserError
from vaediff.run import students

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
TRAINING = {'experiment', 'teacher', 'optim', 'train', 'loss', 'sample', 'diffusion', 'model'}


def made(variant, **changes):
  config = importlib.import_module('configs.digits').get_config(variant)
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return config


def resolved(variant, **changes):
  return students.resolve(made(variant, **changes))


def test_a_student_reads_whatever_its_teacher_reads():
  """Sections that the module has never heard of are taken over as they are."""
  config = made('distill,consistency,debug')
  with config.unlocked():
    config.refiner.conditions.taste = ConfigDict({'dropout': 0.3, 'sweet': True})
    config.refiner.of_tomorrow = ConfigDict({'sizes': (1, 2)})
    config.refiner.space = 'wavelet'
  students.resolve(config)
  for stage in ('distill_2', 'distill_1', 'consistency'):
    for field in ('conditions', 'of_tomorrow', 'space', 'vae', 'autoencoder'):
      assert config[stage][field] == config.refiner[field], (stage, field)


@pytest.mark.parametrize(
  ('variant', 'stage', 'own'),
  [
    (
      'distill,debug',
      'distill_1',
      {'num_steps', 'guidance_weights', 'data_free_fraction', 'data_free_calls'},
    ),
    ('consistency,debug', 'consistency', set()),
    (
      'adversarial,matching,debug',
      'matching',
      {'start_stage', 'teacher_calls', 'start_probabilities', 'fake_updates', 'discriminator', 'optim_fake'},
    ),
  ],
)
def test_a_student_has_the_fields_of_the_first_teacher_and_its_own(variant, stage, own):
  config = resolved(variant)
  taken = {'space', 'space_factor', 'vae', 'autoencoder', 'conditions'}
  assert set(config[stage]) == TRAINING - ({'loss'} if stage == 'distill_1' else set()) | taken | own


@pytest.mark.parametrize(
  ('stage', 'teacher'),
  [('consistency', 'distill_2'), ('adversarial', 'distill_2'), ('matching', 'distill_1')],
)
def test_a_student_of_a_student_has_nothing_of_its_training(stage, teacher):
  direct = resolved(f'{stage},debug')[stage]
  config = resolved(f'distill,{stage},debug', **{f'{stage}.teacher.stage': teacher})
  assert set(config[stage]) == set(direct)
  assert config[stage].optim == direct.optim and config[stage].train == direct.train
  assert config[stage].sample == direct.sample and config[stage].diffusion.schedule == 'linear'


def test_matching_goes_on_from_the_adversarial_student():
  config = resolved('adversarial,matching,debug')
  assert config.stages == ('vae', 'refiner', 'adversarial', 'matching')
  assert config.matching.start_stage == 'adversarial' and config.matching.teacher.stage == 'refiner'
  assert config.matching.model == config.adversarial.model and 'warmup' not in config.matching


def test_between_a_teacher_of_eps_and_a_student_is_one_of_v():
  changes = {'refiner.diffusion.prediction': 'eps', 'distill.train.num_steps': 7}
  config = resolved('unconditional,consistency,debug', **changes)
  assert config.stages == ('refiner', 'consistency_v', 'consistency')
  assert config.consistency_v.train.num_steps == 7 and config.consistency_v.num_steps == 0
  assert 'distill' not in config and not {'num_steps', 'data_free_fraction'} & set(config.consistency)
  with pytest.raises(UserError, match="'refiner', which predicts eps .* section distill"):
    config = made('consistency,debug', **{'refiner.diffusion.prediction': 'eps'})
    with config.unlocked():
      del config.distill
    students.resolve(config)


def test_stages_of_another_run_are_read_there():
  """Every section that names a stage follows the teacher, at any depth; what is named elsewhere stays."""
  changes = {'distill.teacher.workdir': 'there', 'refiner.autoencoder.workdir': 'third'}
  config = made('distill,debug', **changes)
  with config.unlocked():
    config.refiner.conditions.low = ConfigDict({'dropout': 0.1, 'stage': 'small', 'workdir': ''})
  students.resolve(config)
  for stage in ('distill_2', 'distill_1'):
    assert config[stage].vae.workdir == config[stage].conditions.low.workdir == 'there'
    assert config[stage].autoencoder.workdir == 'third'
  assert config.distill_2.teacher.workdir == 'there' and config.distill_1.teacher.workdir == ''
  assert config.refiner.vae.workdir == config.refiner.conditions.low.workdir == ''


def test_a_student_does_not_draw_with_the_temperature_of_its_teachers_pictures():
  config = resolved('distill,consistency,debug', **{'refiner.sample.temperature': 0.8})
  for stage in ('distill_2', 'distill_1', 'consistency'):
    assert config[stage].sample.temperature == 1.0
  assert config.refiner.sample.temperature == 0.8


def test_the_papers_temperature_is_that_of_pictures_alone():
  """Figures, and the best checkpoint, are of temperature 1 unless the command line says otherwise."""
  celeba = importlib.import_module('configs.celeba256')
  assert celeba.get_config().refiner.sample.temperature == 1.0
  assert celeba.get_config('folder').refiner.sample.temperature == 1.0
  config = students.resolve(celeba.get_config('pictures,distill'))
  assert config.refiner.sample.temperature == 0.8 and config.distill_1.sample.temperature == 1.0
  for path in sorted((pathlib.Path(__file__).parent.parent.parent / 'configs').glob('*.py')):
    if 'def get_config(' in path.read_text():
      config = importlib.import_module(f'configs.{path.stem}').get_config()
      assert all(config[stage].sample.get('temperature', 1.0) == 1.0 for stage in config.stages), path


def test_guidance_is_distilled_into_a_student():
  config = resolved('guided,distill,debug', **{'refiner.sample.guidance': (('label', 2.0),)})
  assert config.distill_1.model.guidance_embedding and config.distill_1.sample.guidance_weight == 0.5
  assert config.distill_1.sample.guidance == ()
  assert resolved('guided,consistency,debug').consistency.sample.guidance_weight == 0.0


@pytest.mark.parametrize('variant', ['distill', 'consistency', 'adversarial', 'matching'])
@pytest.mark.parametrize('name', ['ddgan', 'vae', 'nothing', 'classifier'])
def test_a_teacher_is_a_diffusion(variant, name):
  config = made(f'ddgan,{variant},debug', **{f'{variant}.teacher.stage': name})
  message = f"config.{variant}.teacher.stage is '{name}', which is no stage .* valid: refiner$"
  with pytest.raises(UserError, match=message):
    students.resolve(config)


def test_resolving_twice_changes_nothing():
  config = resolved('guided,distill,adversarial,matching,debug')
  before = config.to_json()
  assert students.resolve(config).to_json() == before
