"""What may differ when a run goes on: the config inside a checkpoint is what is compared, and no place."""

import importlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from vaediff.data import sources
from vaediff.errors import UserError
from vaediff.run import checkpoint, same_run
from vaediff.run import config as configs

sys.path.insert(0, str(Path(__file__).parents[2]))


def digits(variant='debug', **changes):
  from vaediff.run import students

  config = importlib.import_module('configs.digits').get_config(variant)
  config.update_from_flattened_dict(changes)
  return students.resolve(config)


@pytest.fixture
def trained(tmp_path):
  """Returns trained(config, stage, **facts) -> the folder of a stage with a checkpoint of that config."""

  def make(config, stage, **facts):
    place = tmp_path / stage / checkpoint.FOLDER / '4' / 'meta'
    place.mkdir(parents=True, exist_ok=True)
    stored = json.loads(config.to_json()) if config is not None else None
    (place / 'metadata').write_text(json.dumps({'config': stored, **facts}))
    return tmp_path / stage

  return make


def test_a_run_goes_on_with_what_does_not_change_results_only(trained):
  refiner, vae = trained(digits(), 'refiner'), trained(digits(), 'vae')
  now = digits()
  now.refiner.train.log_every_steps = 100
  now.refiner.sample.sampler = 'ddpm'
  now.data.prefetch = 9
  same_run.check_stage(now, vae, 'vae', training=True)
  same_run.check_stage(now, refiner, 'refiner', training=True)
  now.vae.optim.learning_rate = 0.5
  with pytest.raises(UserError, match='config.vae.optim.learning_rate is 0.003 there, 0.5 now'):
    same_run.check_stage(now, vae, 'vae')
  now = digits()
  now.refiner.train.num_steps = 100  # the learning rate decays to the last step: not a continuation
  with pytest.raises(UserError, match='config.refiner.train.num_steps is 4 there, 100 now'):
    same_run.check_stage(now, refiner, 'refiner')
  with pytest.raises(UserError, match='config.seed is 0 there, 1 now'):
    same_run.check_stage(digits(seed=1), vae, 'vae')


def test_every_schedule_of_any_optimizer_counts_the_steps(trained):
  """Patterns, so that a new stage's second optimizer is no exception."""
  stored, now = digits('matching,debug'), digits('matching,debug')
  for config in (stored, now):
    config.matching.optim_fake.schedule = 'linear'
  now.matching.train.num_steps = 100
  with pytest.raises(UserError, match='config.matching.train.num_steps is 4 there, 100 now'):
    same_run.check_stage(now, trained(stored, 'matching'), 'matching')
  assert same_run.changes_over_training({'optim_of_tomorrow.schedule': 'cosine'})
  assert same_run.changes_over_training({'loss.reconstruction': 'weighted_learning'})
  assert not same_run.changes_over_training({'optim.schedule': 'constant', 'diffusion.schedule': 'cosine'})


def test_classes_may_become_known_but_not_others(trained):
  stored, now = digits(), digits()
  stored.data.num_classes = 0
  same_run.check_stage(now, trained(stored, 'vae'), 'vae')
  stored.data.num_classes = 9
  with pytest.raises(UserError, match='config.data.num_classes is 9 there, 10 now'):
    same_run.check_stage(now, trained(stored, 'vae'), 'vae')


def test_a_place_is_no_setting(trained):
  stored = digits(**{'refiner.vae.workdir': '/runs/a', 'data.path': '/images', 'data.data_dir': '/data'})
  now = digits(**{'refiner.vae.workdir': '/runs/b', 'data.path': '/moved', 'data.data_dir': '/elsewhere'})
  same_run.check_stage(now, trained(stored, 'refiner'), 'refiner', training=True)


@pytest.mark.parametrize('field, value', [('num_steps', 1), ('grid', 'uniform'), ('clip', 'none')])
def test_what_a_students_training_reads_may_not_change_under_it(trained, field, value):
  folder = trained(digits('consistency,debug'), 'consistency')
  now = digits('consistency,debug')
  now.consistency.sample[field] = value
  with pytest.raises(UserError, match=f'config.consistency.sample.{field} is .* there, .* now'):
    same_run.check_stage(now, folder, 'consistency', training=True)
  same_run.check_stage(now, folder, 'consistency')  # but it may be sampled so
  now = digits('consistency,debug')
  now.consistency.sample.update({'num_images': 9, 'seed': 5, 'batch_size': 3, 'save_npz': True})
  same_run.check_stage(now, folder, 'consistency', training=True)


def test_the_clipping_of_a_teacher_may_not_change_under_its_student(trained):
  folder = trained(digits('consistency,debug'), 'consistency')
  now = digits('consistency,debug')
  teacher = now.consistency.teacher.stage
  now[teacher].sample.clip = 'none'
  with pytest.raises(UserError, match=f'config.{teacher}.sample.clip is .* there, .none. now'):
    same_run.check_stage(now, folder, 'consistency', training=True)
  now[teacher].sample.update({'clip': digits()['refiner'].sample.clip, 'num_steps': 2})
  same_run.check_stage(now, folder, 'consistency', training=True)


@pytest.mark.parametrize('config', [None, [], {}, {'stages': ['vae']}, 'text'])
def test_a_checkpoint_without_a_config_is_damaged(trained, config):
  folder = trained(types.SimpleNamespace(to_json=lambda: json.dumps(config)), 'vae')
  with pytest.raises(checkpoint.DamagedCheckpoint, match='there is no config in it'):
    same_run.check_stage(digits(), folder, 'vae')


def test_a_lost_config_is_read_from_the_checkpoints(trained, tmp_path):
  config = digits(**{'vae.loss.beta': 7.0})
  trained(config, 'vae')
  assert configs.read(tmp_path) == config
  configs.save(config, tmp_path)
  assert configs.read(tmp_path) == config


def images_with(fingerprint):
  return sources.ArraySource(
    images=np.zeros((1, 8, 8, 1), np.uint8),
    labels=np.zeros(1, np.int32),
    label_names=(),
    num_classes=0,
    known_fingerprint=fingerprint,
  )


def test_other_images_are_refused_by_name_or_said(trained, capsys):
  folder = trained(digits(), 'vae', data={'train': 'aa', 'eval': 'bb'})
  images = {'train': images_with('aa'), 'eval': images_with('cc')}
  config = digits()
  message = 'was made of the images of data.eval_split bb, which is cc now'
  with pytest.raises(UserError, match=message):
    same_run.check_images(config, images, folder)
  config.data.check_fingerprint = False
  same_run.check_images(config, images, folder)
  assert message in capsys.readouterr().out
  same_run.check_images(config, images, trained(digits(), 'vae'))  # of an earlier version: nothing is known


def test_images_of_another_run_are_looked_for_where_those_of_this_one_lie():
  """Data that have moved are named once, for the run that asks; of another source each keeps its own."""
  own, other = digits(), digits()
  own.data.update({'data_dir': '/here', 'path': '/mine', 'check_fingerprint': False})
  other.data.update({'data_dir': '/gone', 'path': '/elsewhere', 'caption_feature': 'caption'})
  found = same_run.with_own_data_places(other, own)
  assert (found.data.data_dir, found.data.path, found.data.check_fingerprint) == ('/here', '/mine', False)
  assert found.data.caption_feature == 'caption' and other.data.path == '/elsewhere' and found.is_locked
  other.data.name = 'cifar10'
  assert same_run.with_own_data_places(other, own) is other
