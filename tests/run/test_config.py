"""Loading, storing, checking and comparing configs."""

import importlib
import pathlib
import sys

import pytest
from absl import flags
from command_lines import run_all
from ml_collections import config_flags

from vaediff.errors import UserError
from vaediff.modes import quantize
from vaediff.run import command_line
from vaediff.run import config as configs

pytestmark = pytest.mark.xdist_group('config')  # one worker: the tests share what is dear
ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


def digits(variant='debug'):
  return importlib.import_module('configs.digits').get_config(variant)


def test_round_trip_through_the_run_folder(tmp_path):
  before = digits()
  configs.save(before, tmp_path)
  after = configs.read(tmp_path)
  assert after == before
  assert isinstance(after.stages, tuple) and isinstance(after.refiner.optim.learning_rate, float)
  assert after.is_locked


def test_a_config_file_takes_no_quantized_stage_from_a_run(tmp_path):
  """Trained again by its first command, a run still has them, in their order; not of a stage that is gone."""
  config = digits('distill,debug')
  assert configs.with_quantized(config, tmp_path / 'new') is config
  stored = config
  for source in ('vae', 'refiner', config.stages[-1]):
    stored.quantize.reads = 'vae_int8' if source == 'refiner' else ''
    stored = quantize.with_stage(stored, source, f'{source}_int8')
  configs.save(stored, tmp_path)
  kept = configs.with_quantized(config, tmp_path)
  assert kept.stages == stored.stages and kept.stages[-3:-1] == ('vae_int8', 'refiner_int8')
  assert kept.refiner_int8 == stored.refiner_int8 and kept.refiner_int8.vae.stage == 'vae_int8'
  without = digits()
  assert configs.with_quantized(without, tmp_path).stages == ('vae', 'refiner', 'vae_int8', 'refiner_int8')
  (tmp_path / configs.FILE).write_text('{')
  assert configs.with_quantized(config, tmp_path) is config


def test_workdir_alone_names_the_stored_config():
  argv = command_line.complete_argv(['main', '--workdir=runs/x', '--mode=sample'])
  assert argv[1].endswith('stored_config.py:runs/x') and argv[1].startswith('--config=')
  given = ['main', '--config=configs/digits.py', '--workdir=runs/x']
  assert command_line.complete_argv(given) == given


def test_variants_join_and_unknown_one_lists_the_valid_ones():
  config = digits('formulation2,z,debug')
  assert config.name == 'digits-formulation2-z-debug'
  assert config.refiner.diffusion.condition == 'formulation2' and config.refiner.diffusion.z_conditioning
  with pytest.raises(ValueError, match="no variant 'nope'; valid: .*debug.*unconditional"):
    digits('nope')


@pytest.mark.parametrize(('text', 'value'), [('pca', 'pca'), ('True', True), ('false', False)])
def test_what_is_read_of_a_code_is_a_switch_or_a_word(text, value, tmp_path, monkeypatch):
  """On the command line, and in the config that a run stores."""
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', flag_values=values)
  override = f'--config.refiner.diffusion.z_conditioning={text}'
  monkeypatch.setattr(sys, 'argv', ['main', f'--config={ROOT}/configs/digits.py:debug', override])
  values(sys.argv)
  config = values.config
  found = config.refiner.diffusion.z_conditioning
  assert found == value and type(found) is type(value)
  configs.save(config, tmp_path)
  read = configs.read(tmp_path)
  assert read == config and type(read.refiner.diffusion.z_conditioning) is type(value)


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('refiner.train.num_steps', 0, r'config.refiner.train.num_steps must be >= 1, got 0'),
    ('vae.train.batch_size', -4, r'config.vae.train.batch_size must be >= 1, got -4'),
    ('interpolate.num_points', 1, r'config.interpolate.num_points must be >= 2, got 1'),
    ('processes.silence_timeout_seconds', float('nan'), r'silence_timeout_seconds must be >= 0, got nan'),
    ('refiner.sample.seed', 2**31, r'config.refiner.sample.seed must be in \[0, 2\^31\), got 2147483648'),
    ('seed', -1, r'config.seed must be in \[0, 2\^31\), got -1'),
    ('data.num_classes', -1, r'config.data.num_classes must be >= 0, got -1'),
    ('vae.train.on_bad_step', 'go', r"config.vae.train.on_bad_step is 'go'; valid: stop, skip"),
    ('refiner.train.spike_factor', 1.0, r'train.spike_factor must be 0 \(off\) or above 1, got 1.0'),
    ('refiner.train.spike_factor', float('nan'), r'train.spike_factor must be 0 \(off\) or above 1, got nan'),
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
  made = digits().copy_and_resolve_references()
  with made.unlocked():
    made.refiner_int8 = made.refiner.copy_and_resolve_references()
    made.refiner_int8.experiment = 'quantized'
    made.stages = (*made.stages, 'refiner_int8')
  assert configs.stages_of(made) == ('vae', 'refiner')  # what is drawn by default is what it was
  assert configs.stages_of(made, 'refiner_int8') == ('refiner_int8',)
  with pytest.raises(UserError, match="--stages names 'gan'; the stages of this config are vae, refiner"):
    configs.stages_of(digits(), 'gan')


MISTAKES = [
  (
    ['--config.refiner.optim.learning_rat=1'],
    'has no key \'learning_rat\'. Did you mean "learning_rate"',
  ),
  (['--config.vaee.optim.b1=1'], 'has no key \'vaee\'. Did you mean "vae"'),
  (
    ['--config.ddgan.model.channels=8'],
    "no stage 'ddgan'; its stages are vae, refiner. Variants with it: ddgan, wavelet, latent, light",
  ),
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
]


@pytest.fixture(scope='module')
def mistakes(tmp_path_factory):
  """Exit status and messages of each of `MISTAKES`, and the run folder that none of them may make."""
  folder = tmp_path_factory.mktemp('mistakes')
  always = ['--config=configs/digits.py:debug', f'--workdir={folder / "run"}']
  return run_all(folder, [[*always, *arguments] for arguments, _ in MISTAKES]), folder / 'run'


@pytest.mark.xdist_group('mistakes')  # one worker makes them all
@pytest.mark.parametrize('index', range(len(MISTAKES)))
def test_command_line_mistakes_get_one_message(index, mistakes):
  results, workdir = mistakes
  status, said = results[index]
  assert status == 2, said
  assert 'Traceback' not in said
  assert MISTAKES[index][1] in said
  assert not workdir.exists()


def forget(config, *path):
  """Takes a key away, as a run of a version without it would have stored its config."""
  section = config
  for name in path[:-1]:
    section = section[name]
  with section.unlocked():
    del section[path[-1]]


def test_a_stored_config_without_a_newer_key(tmp_path):
  """It is a message, not a trace."""
  earlier, unknown = 'the run is of an earlier version', 'A run of an earlier version lacks newer keys'
  cases = [
    (('refiner', 'diffusion', 'prediction'), (), f"has no key 'prediction': {earlier}"),
    (('vae', 'train', 'best_images'), (), f"has no key 'best_images': {earlier}"),
    (('refiner', 'sample', 'save_images'), ('--config.refiner.sample.save_images=True',), unknown),
  ]
  lines = []
  for path, override, _ in cases:
    old, workdir = digits(), tmp_path / path[-1]
    forget(old, *path)
    configs.save(old, workdir)
    lines.append([f'--workdir={workdir}', '--mode=describe', *override])
  for (status, said), (path, _, message) in zip(run_all(tmp_path, lines), cases, strict=True):
    assert status == 2 and 'Traceback' not in said, said
    assert message in said and str(tmp_path / path[-1] / 'config.json') in said


def test_an_error_that_is_no_missing_key_stays_what_it_is(tmp_path):
  argv = command_line.complete_argv(['main', f'--workdir={tmp_path}'])
  for wrong in (lambda: None.nothing, lambda: {}['nothing']):
    with pytest.raises((AttributeError, KeyError)) as caught:
      wrong()
    assert command_line.missing_key(caught.value, argv) is None
  with pytest.raises(AttributeError) as caught:
    _ = digits().nothing
  assert command_line.missing_key(caught.value, ['main', '--config=configs/digits.py']) is None
  assert "has no key 'nothing'" in str(command_line.missing_key(caught.value, argv))


def test_missing_config_file_and_missing_run(tmp_path):
  lines = [['--config=configs/nothing.py'], [f'--workdir={tmp_path}', '--mode=sample']]
  (status, said), (status_of_run, said_of_run) = run_all(tmp_path, lines)
  assert status == 2 and 'configs/nothing.py' in said and 'as --config=configs/digits.py' in said
  assert status_of_run == 2 and f'{tmp_path / "config.json"} does not exist' in said_of_run
