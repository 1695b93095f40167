# ruff: noqa: E501 (one case a line)
"""What a user can give wrong, by group: each is one message that names it, before anything is written.

Here all that needs no command line: config numbers, contradictions, the environment. Command lines, config
files and `config.json`: `test_bad_lines.py`. Weights: `weights/test_bad_weights.py`.
"""

import importlib
import pathlib
import sys

import pytest

from vaediff.data import cache
from vaediff.errors import UserError
from vaediff.machine import distributed, runtime
from vaediff.modes import checked
from vaediff.run import config as configs
from vaediff.run import values
from vaediff.storage import places
from vaediff.weights import tensors

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
NAN, INF = float('nan'), float('inf')


def made(variant='debug', **changes):
  config = importlib.import_module('configs.digits').get_config(variant)
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return config


def refused(config, workdir, mode='train', stages=None):
  """Returns the message of a config that cannot be; nothing may have been written."""
  with pytest.raises(UserError) as error:
    checked.complete(config)
    checked.check(configs.Run(config, workdir, stages or tuple(config.stages)), mode)
  assert not any(workdir.iterdir())
  return str(error.value)


# Config numbers ------------------------------------------------------------------------------------

NUMBERS = [
  ('refiner.optim.clip_norm', NAN, 'refiner.*optim.clip_norm.* nan'),
  ('refiner.optim.weight_decay', NAN, 'optim.weight_decay.* nan'),
  ('refiner.optim.learning_rate', INF, 'optim.learning_rate.* inf'),
  ('refiner.optim.eps', NAN, 'optim.eps.* nan'),
  ('vae.optim.b2', NAN, 'vae.optim.b2.* nan'),
  ('vae.loss.beta', -INF, 'vae.loss.beta.* -inf'),
  ('vae.prior.holdout_fraction', NAN, 'prior.holdout_fraction.* nan'),
  ('refiner.sample.temperature', NAN, 'sample.temperature.* nan'),
  ('refiner.sample.guidance_weight', INF, 'sample.guidance_weight.* inf'),
  ('refiner.sample.guidance', (('vae', NAN),), r'config.refiner.sample.guidance\[0\]\[1\] is nan'),
  ('refiner.train.spike_factor', INF, 'train.spike_factor is inf; a finite number is needed'),
  ('processes.silence_timeout_seconds', INF, 'silence_timeout_seconds is inf; a finite number is needed'),
  ('vary.eta', 1.5, r'config.vary.eta must be in \[0, 1\], got 1.5'),
  ('text_diff.max_theta', 0.0, r'config.text_diff.max_theta must be in \(0, 1\], got 0.0'),
  ('restore.noise_std', NAN, 'config.restore.noise_std is nan; a finite number is needed'),
  ('restore.noise_std', -1.0, 'config.restore.noise_std must be > 0, got -1.0'),
  ('restore.hole_fraction', 1.0, r'config.restore.hole_fraction must be in \(0, 1\), got 1.0'),
  ('restore.factor', 1, 'config.restore.factor must be >= 2, got 1'),
  ('restore.task', 'blur', "config.restore.task is 'blur'; valid: all, super_resolution, inpaint, colourise, denoise"),
  ('restore.method', 'hope', "config.restore.method is 'hope'; valid: consistent, condition"),
  ('restore.num_samples', 0, 'config.restore.num_samples must be >= 1, got 0'),
  ('restore.fill_rounds', -1, 'config.restore.fill_rounds must be >= 0, got -1'),
  ('reconstruct.through', 'z', "config.reconstruct.through is 'z'; valid: '', noise"),
  ('reconstruct.num_steps', (), 'config.reconstruct.num_steps must be whole numbers in 1'),
  ('reconstruct.num_steps', (10, 0), 'config.reconstruct.num_steps must be whole numbers in 1'),
  ('interpolate.num_pairs', -1, 'config.interpolate.num_pairs must be >= 0, got -1'),
  ('interpolate.num_directions', -1, 'config.interpolate.num_directions must be >= 0, got -1'),
  ('interpolate.deviations', 0.0, 'config.interpolate.deviations must be > 0, got 0.0'),
  ('refiner.diffusion.z_conditioning', 'ica', "z_conditioning is 'ica'; valid: False, True, pca"),
  ('refiner.diffusion.pca.floor', 0.0, r'diffusion.pca.floor must be in \(0, 1\), got 0.0'),
  ('interpolate.cutoff', 1.0, r'config.interpolate.cutoff must be in \(0, 1\), got 1.0'),
  ('restore.num_images', 0, 'config.restore.num_images must be >= 1, got 0'),
  ('reconstruct.posterior', 'mode', "config.reconstruct.posterior is 'mode'; valid: mean, sample"),
  ('reconstruct.num_images', -2, 'config.reconstruct.num_images must be >= 1, got -2'),
  ('interpolate.from_label', -1, 'config.interpolate.from_label must be >= 0, got -1'),
  ('interpolate.num_points', 2**40, r'config.interpolate.num_points must be below 2\^31, got 1099511627776'),
  ('refiner.sample.checkpoint', 'last', "config.refiner.sample.checkpoint is 'last'; valid: latest, best, or a step that is kept"),
  ('refiner.sample.eta', 1.5, r'config.refiner: sample.eta must be in \[0, 1\], got 1.5'),
  ('vae.sample.seed', 2**31, r'config.vae.sample.seed must be in \[0, 2\^31\)'),
  (
    'vae.train.num_steps',
    2**70,
    r'config.vae.train.num_steps is 1180591620717411303424; whole numbers must be below 2\^63',
  ),
  ('data.num_classes', 2**31, r'config.data.num_classes must be below 2\^31'),
  ('vae.prior.num_components', (1, 2**70), r'prior.num_components'),
  ('benchmark.matmul_size', 0, 'config.benchmark.matmul_size must be >= 1, got 0'),
  ('benchmark.num_repeats', 0, 'config.benchmark.num_repeats must be >= 1, got 0'),
  ('compile.topology', 'v5e', '--topology=v5e: write <chip>:<shape>'),
  ('compile.topology', '', '--topology=: write <chip>:<shape>'),
  ('compile.effort', 2.0, r'config.compile.effort must be in \[-1, 1\], got 2.0'),
  ('evaluate.name', '../../x', r"config.evaluate.name is '../../x'; it names files of the run"),
  ('evaluate.name', '/', "config.evaluate.name is '/'; it names files"),
  ('evaluate.name', '..', r"config.evaluate.name is '\.\.'; it names files"),
  ('evaluate.name', 'a\0b', r"config.evaluate.name is 'a\\x00b'"),
  ('evaluate.name', 'x' * 300, 'config.evaluate.name is .* at most 200'),
  ('name', '../x', "config.name is '../x'; it names files"),
  ('evaluate.num_images', 1, 'config.evaluate.num_images must be >= 2, got 1'),
  ('evaluate.num_bound_times', 0, 'config.evaluate.num_bound_times must be >= 1, got 0'),
  (
    'evaluate.extractors',
    ('dino',),
    "an element of config.evaluate.extractors = .* is 'dino'; valid: inception",
  ),
  ('evaluate.sweep.samplers', ('euler',), "config.evaluate.sweep.samplers = .* is 'euler'; valid: ddpm"),
  ('evaluate.sweep.num_steps', (0,), r'sweep.num_steps = \(0,\) must be >= 1, got 0'),
  ('evaluate.sweep.guidance_weights', (NAN,), r'config.evaluate.sweep.guidance_weights\[0\] is nan'),
  ('evaluate.sweep.teacher_steps', 0, 'config.evaluate.sweep.teacher_steps must be >= 1, got 0'),
  ('evaluate.sweep.num_compared', -1, 'config.evaluate.sweep.num_compared must be >= 1, got -1'),
  ('data.path', 'a\0b', r"config.data.path is 'a\\x00b', which holds a NUL byte"),
]


@pytest.mark.parametrize(('field', 'value', 'message'), NUMBERS, ids=range(len(NUMBERS)))
def test_a_value_that_cannot_be_is_named(tmp_path, field, value, message):
  with pytest.raises(UserError, match=message):
    raise UserError(refused(made(**{field: value}), tmp_path))


@pytest.mark.parametrize(
  'variant', ['debug', 'consistency,debug', 'ddgan,debug', 'latent_diffusion,label,debug']
)
def test_no_number_of_any_config_may_be_nan(tmp_path, variant):
  """Every float there is, wherever it stands."""

  def floats():
    return [
      name.removeprefix('config.') for name, value in values.leaves(made(variant)) if type(value) is float
    ]

  assert len(floats()) > 30
  for field in floats():
    if '[' not in field:
      assert 'nan' in refused(made(variant, **{field: NAN}), tmp_path), field


# Contradictions ------------------------------------------------------------------------------------

CONTRADICTIONS = [
  ('debug', {'stages': ('data',)}, "names 'data', which is no stage; stages: .*vae"),
  ('debug', {'stages': ('name',)}, "names 'name', which is no stage"),
  ('debug', {'stages': ('gan',)}, "names 'gan', which has no section"),
  ('debug', {'stages': ()}, 'config.stages is empty'),
  ('debug', {'stages': ('vae', 'vae')}, 'names a stage twice'),
  ('debug', {'stages': (1, None)}, r"must be a tuple of names, as \('vae', 'refiner'\), got \(1, None\)"),
  ('debug', {'stages': ('refiner', 'vae')}, "'refiner' reads stage 'vae' .* comes after it"),
  ('debug', {'stages': ('refiner',)}, "'refiner' reads stage 'vae' .* none of config.stages"),
  ('debug', {'refiner.vae.stage': 'refiner'}, 'vae.stage'),
  (
    'debug',
    {'refiner.vae.workdir': '/nowhere/run'},
    "stage 'vae' of /nowhere/run, where no such stage is trained",
  ),
  ('debug', {'vae.experiment': 'diffusion'}, "which has no field 'loss.beta': the section is that of"),
  ('debug', {'vae.experiment': 'gan'}, "config.vae.experiment is 'gan'; valid: vae, diffusion"),
  (
    'debug',
    {'vae.train.batch_size': 7},
    'config.vae.train.batch_size must be a multiple of the 8 devices, got 7',
  ),
  ('debug', {'refiner.train.microbatches': 3}, '8 devices times 3 microbatches, got 8'),
  ('debug', {'vae.train.profile_steps': (3, 2)}, r'profile_steps must be \(\) or \(first, last\)'),
  ('debug', {'vae.train.profile_steps': (1,)}, r'profile_steps must be \(\) or \(first, last\)'),
  ('debug', {'vae.train.profile_steps': ('a', 'b')}, 'profile_steps'),
  (
    'debug',
    {'refiner.train.best_measure': 'fid_of_mine'},
    "config.refiner.train.best_measure is 'fid_of_mine'",
  ),
  (
    'debug',
    {'refiner.train.best_measure': 'kd_mobilenetv2', 'evaluate.weights_dir': '/nowhere'},
    'train.best_measure of one of vae, refiner: weights of mobilenetv2 are not in /nowhere: run --mode=prepare',
  ),
  ('debug', {'mesh.data': 3}, r'config.mesh \(data=3, fsdp=1\) does not divide the 8 devices'),
  ('debug', {'mesh.data': 2**40, 'mesh.fsdp': 2**40}, 'does not divide the 8 devices'),
  ('debug', {'mesh.rules': (1, 2)}, 'config.mesh.rules holds 1; a rule is a pair'),
  (
    'debug',
    {'mesh.rules': ((1, 'fsdp'),)},
    r'config.mesh.rules holds \(1, .fsdp.\); a rule is a pair of texts',
  ),
  ('debug', {'mesh.rules': (('(', 'fsdp'),)}, 'which is no regex'),
  (
    'ddgan,distill,debug',
    {'distill.teacher.stage': 'ddgan'},
    "config.distill.teacher.stage is 'ddgan', .* valid",
  ),
  (
    'distill,debug',
    {'distill.teacher.stage': 'vae'},
    "config.distill.teacher.stage is 'vae', which is no stage",
  ),
  ('distill,debug', {'distill.teacher.stage': 'distill'}, "config.distill.teacher.stage is 'distill'"),
  ('distill,debug', {'distill.from_steps': 2**70}, 'distill.from_steps is 1180591620717411303424; whole'),
  ('distill,debug', {'distill.from_steps': 2**40}, 'from_steps must be <= 100000, got 1099511627776'),
  ('distill,debug', {'distill.to_steps': 0}, 'to_steps must be >= 1, got 0'),
  ('distill,debug', {'distill.to_steps': -4}, 'to_steps must be >= 1, got -4'),
  ('distill,debug', {'distill.from_steps': 6, 'distill.to_steps': 4}, 'from_steps is 6, which is not'),
  (
    'consistency,adversarial,debug',
    {'consistency.teacher.stage': 'adversarial', 'adversarial.teacher.stage': 'consistency'},
    "config.consistency.teacher.stage is 'adversarial'",
  ),
]


@pytest.mark.parametrize(('variant', 'changes', 'message'), CONTRADICTIONS, ids=range(len(CONTRADICTIONS)))
def test_a_contradiction_is_named(tmp_path, variant, changes, message):
  with pytest.raises(UserError, match=message):
    raise UserError(refused(made(variant, **changes), tmp_path))


@pytest.mark.parametrize('circle', [('distill_2', 'distill_1'), ('distill_1', 'distill_1')])
def test_a_circle_of_whole_students_is_named(tmp_path, circle):
  config = made('distill,debug')
  checked.complete(config)
  config[circle[0]].teacher.stage = circle[1]
  assert 'would teach each other in a circle' in refused(config, tmp_path)


@pytest.mark.parametrize(
  ('mode', 'changes', 'message'),
  [
    ('evaluate', {'refiner.sample.seed': 2**31 - 1, 'evaluate.num_seeds': 2}, 'the last seed would be 2147483648'),
    ('restore', {'restore.factor': 3}, 'restore.factor must be >= 2 and divide the image size 8, got 3'),
    ('interpolate', {'interpolate.to_label': 10}, r'to_label is 10; the labels of this data set are 0 to 9'),
    ('interpolate', {'interpolate.to_label': 0}, 'from_label and to_label are both 0'),
    ('evaluate', {'classifier.train.batch_size': 7}, 'config.classifier.train.batch_size must be a multiple'),
    ('evaluate', {'classifier.optim.b1': NAN}, 'config.classifier.optim.b1 is nan'),
    ('benchmark', {'vae.train.batch_size': 12}, 'config.vae.train.batch_size must be a multiple of the 8 devices'),
  ],
)  # fmt: skip
def test_what_one_mode_cannot_do_is_said_first(tmp_path, mode, changes, message):
  assert message in refused(made(**changes), tmp_path, mode).replace('\\', '')


def test_a_stage_whose_source_is_not_chosen_and_not_trained(tmp_path):
  assert 'train it first (--stages=vae)' in refused(made(), tmp_path, stages=('refiner',))


def test_what_is_right_passes(tmp_path):
  for variant in (
    'debug',
    'distill,consistency,adversarial,matching,debug',
    'ddgan,debug',
    'latent_diffusion,debug',
  ):
    config = made(variant)
    checked.complete(config)
    built = checked.check(configs.Run(config, tmp_path, tuple(config.stages)))
    assert tuple(built) == config.stages


def test_the_home_folder_is_put_where_a_path_begins_with_a_tilde(monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  config = made('consistency,debug', **{
    'data.path': '~/images', 'data.data_dir': '~', 'evaluate.weights_dir': '~/w', 'refiner.vae.workdir': '~/r',
    'evaluate.inception_weights': 'a~b', 'consistency.teacher.workdir': '', 'evaluate.sweep.workdirs': ('~/s', 't'),
  })  # fmt: skip
  values.expand(config)
  assert (config.data.path, config.data.data_dir) == ('/home/me/images', '/home/me')
  assert (config.evaluate.weights_dir, config.refiner.vae.workdir) == ('/home/me/w', '/home/me/r')
  assert config.evaluate.inception_weights == 'a~b' and config.consistency.teacher.workdir == ''
  assert config.evaluate.sweep.workdirs == ('/home/me/s', 't')


# Environment ---------------------------------------------------------------------------------------

ENVIRONMENT = [
  ({'JAX_ENABLE_X64': '1'}, 'JAX_ENABLE_X64 is .1., which changes what every run computes; unset it'),
  ({'JAX_ENABLE_X64': 'True'}, 'JAX_ENABLE_X64 is .True.'),
  ({'JAX_ENABLE_X64': 'maybe'}, 'JAX_ENABLE_X64 is .maybe.; valid: 0, 1'),
  ({'JAX_DEFAULT_DTYPE_BITS': '32'}, 'JAX_DEFAULT_DTYPE_BITS is .32.'),
  ({'JAX_DISABLE_JIT': '1'}, 'JAX_DISABLE_JIT is .1.'),
  ({'JAX_DEFAULT_MATMUL_PRECISION': 'bfloat16'}, 'JAX_DEFAULT_MATMUL_PRECISION is .bfloat16.'),
  ({'JAX_DEFAULT_PRNG_IMPL': 'rbg'}, 'JAX_DEFAULT_PRNG_IMPL is .rbg.'),
  ({'JAX_THREEFRY_PARTITIONABLE': '0'}, 'JAX_THREEFRY_PARTITIONABLE is .0.'),
  ({'JAX_RANDOM_SEED_OFFSET': '3'}, 'JAX_RANDOM_SEED_OFFSET is .3.'),
  ({'JAX_NUMPY_DTYPE_PROMOTION': 'strict'}, 'JAX_NUMPY_DTYPE_PROMOTION is .strict.'),
  ({'JAX_DEBUG_NANS': 'x'}, 'JAX_DEBUG_NANS is .x.; valid: 0, 1'),
  ({'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': 'soon'}, 'TIME_SECS is .soon.; a number is needed'),
  (
    {'XLA_FLAGS': '--xla_of_tomorrow=1'},
    "XLA_FLAGS holds '--xla_of_tomorrow=1', which this XLA does not know",
  ),
  ({'XLA_FLAGS': '--xla_cpu_use'}, "XLA_FLAGS holds '--xla_cpu_use', which this XLA does not know"),
  ({'XLA_FLAGS': '--a=1'}, "XLA_FLAGS holds '--a=1'; write --xla_<name>=<value>"),
  ({'XLA_FLAGS': '--xla_dump_to=a,b -x'}, "XLA_FLAGS holds '-x'; write"),
  ({'XLA_FLAGS': 'no/such/file'}, "XLA_FLAGS is 'no/such/file'; write .* or the path of a file"),
  ({'XLA_FLAGS': '--xla_dump_to="a'}, 'XLA_FLAGS is .* cannot be read'),
  ({'XLA_FLAGS': '--xla_force_host_platform_device_count=two'}, "=two'; a number of devices >= 1"),
  ({'XLA_FLAGS': '--xla_force_host_platform_device_count=0'}, "=0'; a number of devices >= 1"),
]


@pytest.mark.parametrize(('environment', 'message'), ENVIRONMENT, ids=range(len(ENVIRONMENT)))
def test_a_variable_that_cannot_be_is_named(environment, message):
  with pytest.raises(UserError, match=message):
    runtime.check_environment(environment)


def test_variables_that_change_nothing_pass():
  runtime.check_environment({
    'JAX_ENABLE_X64': '0', 'JAX_THREEFRY_PARTITIONABLE': 'true', 'JAX_DEBUG_NANS': '1', 'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f' --xla_force_host_platform_device_count=8 {runtime.EIGEN_CONVOLUTIONS} --xla_dump_to="a b"',
  })  # fmt: skip


JOBS = [
  (
    {'SLURM_NTASKS': 'many', 'SLURM_PROCID': '0'},
    "Slurm's variable SLURM_NTASKS is 'many'; a number is needed",
  ),
  ({'SLURM_NTASKS': '2', 'SLURM_PROCID': 'x'}, "Slurm's variable SLURM_PROCID is 'x'"),
  ({'SLURM_NTASKS': '2', 'SLURM_PROCID': '2'}, 'SLURM_PROCID=2 must be below SLURM_NTASKS=2'),
  (
    {'SLURM_NTASKS': '2', 'SLURM_PROCID': '0', 'SLURM_GPUS_ON_NODE': 'a100:4'},
    "SLURM_GPUS_ON_NODE is 'a100:4'",
  ),
  ({'JAX_COORDINATOR_ADDRESS': 'host'}, "JAX_COORDINATOR_ADDRESS is 'host'; write host:port"),
  ({'JAX_COORDINATOR_ADDRESS': 'host:http'}, "JAX_COORDINATOR_ADDRESS is 'host:http'"),
  ({'JAX_COORDINATOR_ADDRESS': 'host:99999'}, "JAX_COORDINATOR_ADDRESS is 'host:99999'; .* 1..65535"),
  ({'JAX_COORDINATOR_ADDRESS': 'http://host:1'}, "JAX_COORDINATOR_ADDRESS is 'http://host:1'"),
  ({'JAX_COORDINATOR_ADDRESS': 'h:1', 'JAX_NUM_PROCESSES': '²'}, 'JAX_NUM_PROCESSES must be a number too'),
  ({'JAX_COORDINATOR_ADDRESS': 'h:1', 'JAX_NUM_PROCESSES': '0', 'JAX_PROCESS_ID': '0'}, 'must be in 0..-1'),
]


@pytest.mark.parametrize(('environment', 'message'), JOBS, ids=range(len(JOBS)))
def test_a_variable_of_a_job_that_cannot_be_is_named(environment, message):
  with pytest.raises(UserError, match=message):
    distributed.arguments_from(environment)


@pytest.fixture
def homeless(monkeypatch):
  """No HOME, and no entry for the user."""
  for name in ('HOME', 'XDG_CACHE_HOME', 'TFDS_DATA_DIR', 'VAEDIFF_WEIGHTS', 'JAX_COMPILATION_CACHE_DIR'):
    monkeypatch.delenv(name, raising=False)

  def nobody(number):
    raise KeyError(number)

  monkeypatch.setattr('pwd.getpwuid', nobody)
  return monkeypatch


def test_without_a_home_the_message_names_what_would_help(homeless):
  with pytest.raises(UserError, match='Set HOME, or give XDG_CACHE_HOME, or config.evaluate.weights_dir'):
    tensors.folder()
  with pytest.raises(UserError, match='Set HOME, or give config.data.data_dir, or TFDS_DATA_DIR'):
    cache.data_root(made().data)
  with pytest.raises(UserError, match="config.data.path is '~/x', and the home folder .* not known"):
    checked.complete(made(**{'data.path': '~/x'}))
  with pytest.raises(UserError, match='--workdir is .~nobody_here/x., and the home folder'):
    places.expanded('~nobody_here/x', '--workdir')


def test_a_home_is_not_needed_where_every_folder_is_given(homeless, tmp_path):
  homeless.setenv('VAEDIFF_WEIGHTS', '/w')
  assert tensors.folder() == pathlib.Path('/w') and tensors.folder('/given') == pathlib.Path('/given')
  homeless.delenv('VAEDIFF_WEIGHTS')
  homeless.setenv('XDG_CACHE_HOME', '/c')
  assert tensors.folder() == pathlib.Path('/c/vaediff/weights')
  config = made(**{'data.data_dir': '/d'})
  checked.complete(config)
  assert cache.data_root(config.data) == pathlib.Path('/d')


def test_an_empty_cache_folder_is_none(monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  assert places.cache('x', {'XDG_CACHE_HOME': ''}) == places.cache('x', {}) == pathlib.Path('/home/me/.cache')
  assert places.cache('x', {'XDG_CACHE_HOME': '~/c'}) == pathlib.Path('/home/me/c')
