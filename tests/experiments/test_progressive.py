"""Progressive distillation as stages: starts, targets, halvings by config, students of guided teachers."""

import dataclasses
import functools
import importlib
import json
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vaediff import experiments
from vaediff.diffusion import distillation, samplers, schedules
from vaediff.errors import UserError
from vaediff.evaluation import against_teacher
from vaediff.experiments import progressive
from vaediff.machine.sharding import make_mesh
from vaediff.modes import train
from vaediff.optim import Optimizer
from vaediff.run import config as configs
from vaediff.run import students
from vaediff.run.trained import Trained

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import toy_denoiser  # noqa: E402
from random_parameters import frozen_of, made, values_of  # noqa: E402


def get(variant='distill,debug', name='digits', **changes):
  config = importlib.import_module(f'configs.{name}').get_config(variant)
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return students.resolve(config)


def build(variant='distill,debug', stage='distill_2', **changes):
  return experiments.build(get(variant, **changes), stage)


def image(count=6):
  return jnp.asarray(np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), np.uint8))


def noise(count=6, seed=3):
  return jax.random.normal(jax.random.key(seed), (count, 8, 8, 1))


# The stages of a config ------------------------------------------------------------------------------


def test_a_config_builds_its_halvings():
  config = get('distill', **{'distill.from_steps': 512})
  halvings = tuple(f'distill_{n}' for n in (256, 128, 64, 32, 16, 8, 4, 2, 1))
  assert config.stages == ('vae', 'refiner', *halvings)
  assert [config[name].teacher.stage for name in halvings] == ['refiner', *halvings[:-1]]
  assert [config[name].sample.num_steps for name in halvings] == [int(name[8:]) for name in halvings]
  assert 'distill' not in config  # an override of what is expanded would do nothing
  before = configs.to_json(config)
  assert configs.to_json(students.resolve(config)) == before


def test_an_eps_teacher_is_first_distilled_to_v():
  config = get('distill', 'cifar10')
  assert config.refiner.diffusion.prediction == 'eps'
  assert config.stages[2:4] == ('distill_v', 'distill_256')
  assert config.distill_v.num_steps == 0 and config.distill_v.diffusion.prediction == 'v'
  assert config.distill_v.model.dropout == 0 and config.refiner.model.dropout > 0


def test_a_guided_teacher_is_first_distilled_to_one_pass():
  config = get('guided,distill,debug')
  assert config.stages[2:] == ('distill_guided', 'distill_2', 'distill_1')
  student = experiments.build(config, 'distill_2').student
  teacher = experiments.build(config, 'refiner')
  assert student.denoiser.reads_weight and not teacher.denoiser.reads_weight
  assert (teacher.num_function_evaluations, student.num_function_evaluations) == (8, 2)
  assert student.settings['guidance_weight'] == teacher.settings['guidance_weight'] == 0.5


def test_last_halvings_can_train_longer():
  config = get('distill', **{'distill.last_train_steps': 999, 'distill.from_steps': 8})
  assert [config[f'distill_{n}'].train.num_steps for n in (4, 2, 1)] == [600, 999, 999]


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'distill.from_steps': 12, 'distill.to_steps': 1}, 'distill.to_steps = 1 times 2, 4, 8'),
    ({'distill.from_steps': 1}, 'distill.from_steps is 1'),
    ({'distill.teacher.stage': 'vae'}, "distill.teacher.stage is 'vae'"),
    ({'distill.teacher.stage': 'nothing'}, "distill.teacher.stage is 'nothing'"),
    ({'distill.diffusion.prediction': 'eps'}, "prediction is 'eps'; a student"),
    ({'distill.data_free_fraction': 1.0}, 'data_free_fraction must be in'),
    ({'distill.data_free_calls': 0}, 'data_free_calls must be >= 1'),
    ({'distill.from_steps': 1024}, 'Start from fewer steps'),
  ],
)
def test_bad_settings_are_named(changes, message):
  with pytest.raises(UserError, match=message.replace('(', r'\(')):
    config = get(**changes)
    for stage in config.stages:
      experiments.build(config, stage)


@pytest.mark.parametrize(
  ('field', 'value'),
  [('condition', 'formulation2'), ('schedule', 'cosine'), ('z_conditioning', True)],
)
def test_a_teacher_of_another_kind_is_refused_by_name(field, value):
  config = get()
  with config.unlocked():
    config.refiner.diffusion[field] = value
  with pytest.raises(UserError, match=f"diffusion.{field} is .* of the teacher 'refiner' is"):
    experiments.build(config, 'distill_2')


def test_a_teacher_that_predicts_eps_does_not_teach_a_halving():
  config = get()
  with config.unlocked():
    config.refiner.diffusion.prediction = 'eps'
  with pytest.raises(UserError, match="'refiner' predicts eps"):
    experiments.build(config, 'distill_2')


@pytest.mark.slow
def test_the_teacher_of_another_run_must_be_of_this_kind(trained):
  run = trained('digits').run
  changes = {'distill.teacher.workdir': str(run), 'data.data_dir': str(trained('digits').data)}
  config = get(**changes, **{'refiner.diffusion.prediction': 'x0'})
  with config.unlocked():
    config.stages = ('distill_2',)
  with pytest.raises(UserError, match=r"config.refiner.diffusion.prediction is 'x0', but 'v' in the stage"):
    train.run_stages(config, run.parent / 'student', ('distill_2',))


# Targets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'variant', ['distill,debug', pytest.param('guided,distill,debug', marks=pytest.mark.slow)]
)
def test_the_student_starts_as_its_teacher(variant):
  config, y, t = get(variant), noise(), jnp.full(6, 0.7)
  for stage in config.stages[2:]:
    experiment = experiments.build(config, stage)
    frozen = frozen_of(experiment)
    begin = jax.jit(lambda frozen, e=experiment: e.start(e.init(jax.random.key(0)), frozen))
    params = begin(frozen).networks['denoiser'].params
    for name, tree in frozen['teacher'].items():
      jax.tree.map(np.testing.assert_array_equal, params[name], tree)
    new = set(params) - set(frozen['teacher'])
    assert new == ({'guidance'} if stage == 'distill_guided' else set())
    values = values_of(experiment.student, frozen, 6)
    assert ('guidance' in values) == ('guidance' in params)

    @jax.jit
    def both(read, params, experiment=experiment, values=values):
      student = experiment.student.denoiser.x0_hat({**read, 'denoiser': params}, values)(y, t)
      return student, experiment.teacher.x0_hat(read, values)(y, t)

    np.testing.assert_allclose(*both(frozen, params), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['formulation1,distill,debug', 'formulation2,distill,debug'])
def test_one_step_of_the_target_is_two_of_the_teachers_sampler(variant):
  """With the U-Net, clipping and formulation as they are sampled, in one compiled program each."""
  experiment = build(variant, stage='distill_1')
  frozen = frozen_of(experiment)
  values = values_of(experiment.student, frozen, 6)
  y = noise()
  wanted = jax.jit(lambda: experiment.target(frozen, y, values, jnp.zeros(6, jnp.int32), jnp.ones(6)))()
  teacher = experiment.teacher.denoise(frozen, values)
  keys = jax.random.split(jax.random.key(9), 6)
  drawn = samplers.SAMPLERS['ddim'](teacher, experiment.teacher.schedule, y, keys, num_steps=2)
  np.testing.assert_allclose(wanted, drawn, atol=1e-5)


@pytest.mark.slow
def test_formulation2_without_a_shift_is_formulation1():
  targets = []
  for variant in ('formulation1,distill,debug', 'formulation2,distill,debug'):
    experiment = build(variant)
    frozen = frozen_of(experiment)
    values = {**values_of(experiment.student, frozen, 6), 'x0_vae': jnp.zeros((6, 8, 8, 1))}
    index = jnp.asarray([0, 0, 0, 1, 1, 1])
    targets.append(experiment.target(frozen, noise(), values, index, frozen['steps']['time'][index]))
  np.testing.assert_array_equal(*targets)


@pytest.mark.slow
def test_the_target_does_not_change_when_x_t_and_x0_vae_shift_together():
  """With a network that reads x_t - x0_vae alone; y does not shift."""
  experiment = build('formulation2,distill,debug')
  frozen = frozen_of(experiment)
  kernel = frozen['teacher']['conv_in']['kernel']
  kernel = jnp.concatenate([kernel[:, :, :1], -kernel[:, :, :1]], axis=2)
  frozen['teacher'] = {**frozen['teacher'], 'conv_in': {**frozen['teacher']['conv_in'], 'kernel': kernel}}
  values, index = values_of(experiment.student, frozen, 6), jnp.asarray([0, 0, 0, 1, 1, 1])
  shifted = {**values, 'x0_vae': values['x0_vae'] + 0.3}
  targets = [
    experiment.target(frozen, noise(), v, index, frozen['steps']['time'][index]) for v in (values, shifted)
  ]
  np.testing.assert_allclose(*targets, atol=2e-5)


@pytest.mark.slow
def test_the_guided_target_is_the_guided_teacher():
  config = get('guided,distill,debug')
  experiment = experiments.build(config, 'distill_guided')
  frozen = frozen_of(experiment)
  weights = jnp.linspace(0.0, 4.0, 6)
  values = {**values_of(experiment.student, frozen, 6), 'guidance': weights}
  y, t = noise(), jnp.full(6, 0.6)
  teacher = experiment.teacher
  on = teacher.x0_hat(frozen, values)(y, t)
  off = teacher.x0_hat(frozen, values, without=('vae',))(y, t)
  w = weights[:, None, None, None]
  expected = jnp.clip((1 + w) * on - w * off, -1, 1)
  np.testing.assert_allclose(experiment.target(frozen, y, values, None, t), expected, atol=1e-6)
  assert float(jnp.abs(on - off).max()) > 1e-3


@pytest.mark.slow
def test_a_student_of_guided_teachers_reads_the_weight():
  config = get('guided,distill,debug')
  student = experiments.build(config, 'distill_2').student
  read = {**frozen_of(student), 'denoiser': made(student.denoiser.model, 5)}
  values = values_of(student, read, 2)
  np.testing.assert_array_equal(values['guidance'], jnp.full(2, 0.5))  # the config's, where none is given
  out = [
    student.denoiser.x0_hat(read, {**values, 'guidance': jnp.full(2, w)})(noise(2), jnp.full(2, 0.5))
    for w in (0.0, 3.0)
  ]
  assert float(jnp.abs(out[0] - out[1]).max()) > 1e-3


@pytest.mark.slow
def test_examples_free_of_data_come_from_the_student_itself():
  experiment = build(**{'distill.data_free_fraction': 0.5})
  read = {**frozen_of(experiment), 'denoiser': made(experiment.student.denoiser.model, 7)}
  x0, values = experiment.student.examples(read, {'image': image()}, jax.random.key(1), training=False)
  states = functools.partial(experiment.states, read, x0, values)
  y, mixed, index, t = states(jax.random.key(2), experiment.marked({'image': image()})[progressive.FREE])
  plain, same, _, _ = states(jax.random.key(2), None)
  np.testing.assert_array_equal(y[3:], plain[3:])
  given, mixed_in = values['x0_vae'], mixed['x0_vae']
  np.testing.assert_array_equal(mixed_in[3:], given[3:])
  assert np.all(np.any(np.asarray(mixed_in[:3] != given[:3]), axis=(1, 2, 3)))
  np.testing.assert_array_equal(same['x0_vae'], given)
  # where a step has been taken y is a state of the student's own sampler
  key_noise = jax.random.split(jax.random.key(2), 5)[4]
  start = jax.random.normal(key_noise, (3, 8, 8, 1))
  first = jax.tree.map(lambda rows: rows[:3], mixed)
  _, trajectory = samplers.SAMPLERS['ddim'](
    experiment.student.denoiser.denoise(read, first),
    experiment.student.denoiser.schedule,
    start,
    jax.random.split(jax.random.key(0), 3),
    num_steps=2,
    trajectory=True,
  )
  assert set(np.asarray(index[:3]).tolist()) == {0, 1}
  for i in range(3):
    np.testing.assert_allclose(y[i], trajectory[int(index[i]), i], atol=1e-5)


# Training --------------------------------------------------------------------------------------------


def test_a_one_step_student_of_gaussian_data_has_its_teachers_map():
  """x0 ~ N(0, s^2): the exact denoiser is linear, and so is its DDIM map from noise to x0."""
  std, schedule = 0.5, schedules.make_schedule('cosine')
  exact = toy_denoiser.exact(schedule, std)
  optimizer = Optimizer(
    transform=optax.adam(optax.linear_schedule(0.02, 0.0, 600)), ema_decay=0.0, ema_warmup=False
  )
  experiment = build('unconditional,distill,debug', stage='distill_1')
  student, teacher = toy_denoiser.diffusion(experiment.student, schedule, optimizer)
  keys = jax.random.split(jax.random.key(0), 4)
  y = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))

  def drawn(params, num_steps):
    denoise = student.denoiser.denoise({'denoiser': params}, {})
    return samplers.SAMPLERS['ddim'](denoise, schedule, y, keys, num_steps=num_steps)

  many = drawn(exact, 16)
  params = exact
  for count in (8, 4, 2, 1):
    halving = dataclasses.replace(experiment, student=student, teacher=teacher, num_steps=count)
    frozen = {
      'teacher': params,
      'steps': jax.tree.map(jnp.asarray, distillation.halving(schedule, count)),
    }

    @jax.jit
    def train(state, frozen, halving=halving):
      def body(state, k):
        batch = toy_denoiser.batch(std, k)
        state, _ = halving.train_step(state, frozen, batch, jax.random.fold_in(jax.random.key(3), k))
        return state, None

      return jax.lax.scan(body, state, jnp.arange(600))[0]

    state = halving.start(halving.init(jax.random.key(0)), frozen)
    params = train(state, frozen).networks['denoiser'].params
  one, undistilled = drawn(params, 1), drawn(exact, 1)
  assert float(jnp.abs(one - many).max() / jnp.abs(many).max()) < 0.02
  assert float(jnp.abs(undistilled - many).max() / jnp.abs(many).max()) > 0.5


@pytest.fixture(scope='module')
def distilled(once, trained):
  """A debug run of the halvings, trained in one go."""

  def make(folder):
    config = get(**{'data.data_dir': str(trained('digits').data)})
    with pytest.MonkeyPatch.context() as patch:
      one_device_mesh(patch)
      train.run_stages(config, folder / 'run', tuple(config.stages))

  return once('distilled', make) / 'run'


def one_device_mesh(patch):
  patch.setattr('vaediff.machine.sharding.make_mesh', lambda config: make_mesh(config, jax.devices()[:1]))


def params_of(run, stage):
  config = configs.read(run)
  return Trained(config, run, stage, make_mesh(config.mesh, jax.devices()[:1])).params


@pytest.mark.slow
@pytest.mark.usefixtures('one_device')
def test_a_halving_goes_on_where_it_stopped_and_none_is_done_twice(distilled, tmp_path, capsys, trained):
  config = get(**{'data.data_dir': str(trained('digits').data)})
  run = tmp_path / 'run'
  shutil.copytree(distilled, run)
  # distill_1 was stopped after its checkpoint of step 2
  shutil.rmtree(run / 'distill_1' / 'checkpoints' / '4')
  (run / 'distill_1' / 'summary.json').unlink()
  capsys.readouterr()
  train.run_stages(config, run, tuple(config.stages))
  said = capsys.readouterr().out
  assert all(f'{name}: complete at step 4, skipped' in said for name in ('vae', 'refiner', 'distill_2'))
  assert 'distill_1: resuming at step 2 of 4' in said
  jax.tree.map(np.testing.assert_array_equal, params_of(run, 'distill_1'), params_of(distilled, 'distill_1'))


@pytest.mark.slow
@pytest.mark.usefixtures('one_device')
def test_a_teacher_of_another_run_teaches_as_one_of_this(distilled, tmp_path, trained):
  config = get(**{'distill.teacher.workdir': str(distilled), 'data.data_dir': str(trained('digits').data)})
  students_alone = ('distill_2', 'distill_1')
  with config.unlocked():
    config.stages = students_alone
  assert [config[stage].teacher.workdir for stage in students_alone] == [str(distilled), '']
  assert config.distill_1.vae.workdir == str(distilled)
  run = tmp_path / 'run'
  train.run_stages(config, run, students_alone)
  assert not (run / 'vae').exists() and not (run / 'refiner').exists()
  for stage in students_alone:
    jax.tree.map(np.testing.assert_array_equal, params_of(run, stage), params_of(distilled, stage))
  opened = Trained(configs.read(run), run, 'distill_1', make_mesh(config.mesh, jax.devices()[:1]))
  assert [stage.stage for stage in against_teacher.chain(opened)] == ['refiner', 'distill_2', 'distill_1']


@pytest.mark.slow
@pytest.mark.usefixtures('one_device')
def test_students_stand_beside_their_teacher_in_a_sweep(distilled, tmp_path):
  from vaediff.evaluation import sweep

  run = tmp_path / 'run'
  shutil.copytree(distilled, run)
  config = configs.read(run)
  mesh = make_mesh(config.mesh, jax.devices()[:1])
  opened = Trained(config, run, 'distill_1', mesh)
  assert [stage.stage for stage in against_teacher.chain(opened)] == ['refiner', 'distill_2', 'distill_1']
  sweep.sweep(opened)
  rows = json.loads((run / 'evaluation' / 'sweep.json').read_text())['rows']
  assert [(row['stage'], row['steps'], row['NFE']) for row in rows] == [
    ('refiner', 1, 1),
    ('refiner', 2, 2),
    ('distill_2', 2, 2),
    ('distill_1', 1, 1),
  ]
  assert all(row['rmse to teacher'] > 0 and row['diversity ratio'] > 0 for row in rows)
  config.evaluate.sweep.student_steps = (1,)
  chosen = sweep.chosen_students(against_teacher.chain(opened), config.evaluate.sweep)
  assert [stage.stage for stage in chosen] == ['refiner', 'distill_1']
  config.evaluate.sweep.student_steps = (1, 3)
  with pytest.raises(UserError, match="names 3; the students from 'refiner' to 'distill_1' have 2, 1 steps"):
    sweep.sweep(opened)
  itself = against_teacher.Teacher(Trained(config, run, 'refiner', mesh), 4, 8)
  same = Trained(config, run, 'refiner', mesh).with_settings(sampler='ddim', num_steps=4)
  assert itself.compare(same) == {'rmse to teacher': 0.0, 'diversity ratio': 1.0}
