"""Loading, storing, checking and comparing configs."""

import importlib
import pathlib
import subprocess
import sys

import pytest

from vaediff import config as configs
from vaediff.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def digits(variant='debug'):
  return importlib.import_module('configs.digits').get_config(variant)


def run_main(*arguments, cwd=ROOT):
  return subprocess.run(
    [sys.executable, '-m', 'vaediff.main', *arguments],
    cwd=cwd,
    capture_output=True,
    text=True,
    timeout=300,
  )


def test_round_trip_through_the_run_folder(tmp_path):
  before = digits()
  configs.save(before, tmp_path)
  after = configs.read(tmp_path)
  assert after == before
  assert isinstance(after.stages, tuple) and isinstance(after.refiner.optim.learning_rate, float)
  assert after.is_locked


def test_workdir_alone_names_the_stored_config():
  argv = configs.complete_argv(['main', '--workdir=runs/x', '--mode=sample'])
  assert argv[1].endswith('stored_config.py:runs/x') and argv[1].startswith('--config=')
  given = ['main', '--config=configs/digits.py', '--workdir=runs/x']
  assert configs.complete_argv(given) == given


def test_variants_join_and_unknown_one_lists_the_valid_ones():
  config = digits('formulation2,z,debug')
  assert config.name == 'digits-formulation2-z-debug'
  assert config.refiner.diffusion.condition == 'formulation2' and config.refiner.diffusion.z_conditioning
  with pytest.raises(ValueError, match="no variant 'nope'; valid: .*debug.*unconditional"):
    digits('nope')


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('refiner.train.num_steps', 0, r'config.refiner.train.num_steps must be >= 1, got 0'),
    ('vae.train.batch_size', -4, r'config.vae.train.batch_size must be >= 1, got -4'),
    ('interpolate.num_points', 1, r'config.interpolate.num_points must be >= 2, got 1'),
    ('stages', (), r'config.stages is empty'),
    ('stages', ('vae', 'vae'), r'names a stage twice'),
    ('stages', ('vae', 'gan'), r"names 'gan', which has no section"),
  ],
)
def test_validate_names_field_value_and_bound(field, value, message):
  config = digits()
  config.update_from_flattened_dict({field: value})
  with pytest.raises(UserError, match=message):
    configs.validate(config)


def test_stages_are_chosen_in_the_order_of_the_config():
  assert configs.stages_of(digits(), 'refiner, vae') == ('vae', 'refiner')
  with pytest.raises(UserError, match="--stages names 'gan'; the stages of this config are vae, refiner"):
    configs.stages_of(digits(), 'gan')


def test_a_run_goes_on_with_what_does_not_change_results_only(tmp_path):
  stored, now = digits(), digits()
  now.refiner.train.log_every_steps = 100
  now.refiner.sample.sampler = 'ddpm'
  now.data.prefetch = 9
  configs.check_same_run(now, stored, ('vae', 'refiner'), tmp_path)
  now.vae.optim.learning_rate = 0.5
  with pytest.raises(UserError, match=r'config.vae.optim.learning_rate is 0.003 there, 0.5 now'):
    configs.check_same_run(now, stored, ('vae', 'refiner'), tmp_path)
  now = digits()
  now.refiner.train.num_steps = 100  # the learning rate decays to the last step: not a continuation
  with pytest.raises(UserError, match='config.refiner.train.num_steps is 4 there, 100 now'):
    configs.check_same_run(now, stored, ('refiner',), tmp_path)
  configs.check_same_run(now, stored, (), tmp_path)  # nothing trained yet: nothing to protect


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (
      ['--config.refiner.optim.learning_rat=1'],
      'has no key \'learning_rat\'. Did you mean "learning_rate"',
    ),
    (['--config.vaee.optim.b1=1'], 'has no key \'vaee\'. Did you mean "vae"'),
    (
      ['--config.refiner.optim.learning_rate=abc'],
      "learning_rate=abc: could not convert string to float: 'abc'",
    ),
    (['--config.refiner.train.num_steps=1.5'], 'num_steps=1.5: invalid literal for int()'),
    (
      ['--config.refiner.sample.num_steps=0'],
      'config.refiner: sample.num_steps must be >= 1, got 0',
    ),
    (
      ['--config.refiner.sample.sampler=euler'],
      "sample.sampler is 'euler'; valid: ddpm, ddim, heun, dpmpp_2m",
    ),
    (['--config.refiner.model.channel_multipliers=(1,2,2,2,2)'], 'image_size'),
    (['--mode=paint'], 'train'),
    (['--stages=gan'], 'the stages of this config are vae, refiner'),
  ],
)
def test_command_line_mistakes_get_one_message(arguments, message, tmp_path):
  workdir = tmp_path / 'run'
  result = run_main('--config=configs/digits.py:debug', f'--workdir={workdir}', *arguments)
  assert result.returncode == 2
  assert 'Traceback' not in result.stderr
  assert message in result.stderr
  assert not workdir.exists()


def test_missing_config_file_and_missing_run(tmp_path):
  result = run_main('--config=configs/nothing.py')
  assert result.returncode == 2 and 'configs/nothing.py' in result.stderr
  result = run_main(f'--workdir={tmp_path}', '--mode=sample')
  assert result.returncode == 2 and f'{tmp_path / "config.json"} does not exist' in result.stderr
