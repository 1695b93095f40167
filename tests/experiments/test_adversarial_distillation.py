"""Adversarial distillation as a stage: its start, its two players, what they share, and its diversity."""

import dataclasses
import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff import experiments
from vaediff.diffusion import ladd, samplers
from vaediff.errors import UserError
from vaediff.experiments import grid_student
from vaediff.experiments.denoiser import Denoiser
from vaediff.machine import sharding
from vaediff.run import students

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from random_parameters import frozen_of, made, values_of  # noqa: E402

SMALLER = {'refiner.model.channel_multipliers': (1,), 'refiner.model.attention_resolutions': ()}


def get(variant='adversarial,debug', **changes):
  config = importlib.import_module('configs.digits').get_config(variant)
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return students.resolve(config)


def build(variant='adversarial,debug', **changes):
  return experiments.build(get(variant, **changes), 'adversarial')


def started(experiment, frozen):
  return jax.jit(lambda frozen: experiment.start(experiment.init(jax.random.key(0)), frozen))(frozen)


def images(count=8, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 1), np.uint8)


def noise(count=4, seed=3):
  return jax.random.normal(jax.random.key(seed), (count, 8, 8, 1))


def swapped(experiment, kind):
  """The stage with another kind of denoiser in its student."""
  known = experiment.student.denoiser
  denoiser = kind(**{field.name: getattr(known, field.name) for field in dataclasses.fields(known)})
  return dataclasses.replace(experiment, student=dataclasses.replace(experiment.student, denoiser=denoiser))


def rows_of(experiment, frozen):
  return {'x0': jnp.clip(noise(), -1, 1), 'values': values_of(experiment.student, frozen, 4)}


# The stage of a config --------------------------------------------------------------------------------


def test_by_default_two_steps_with_new_noise_between():
  experiment = build('adversarial')
  assert experiment.num_function_evaluations == 2
  assert experiment.student.settings['sampler'] == 'renoise'
  assert experiment.start_times == (1.0, 0.5) and experiment.start_probabilities == (0.5, 0.5)
  assert set(experiment.networks) == {'denoiser', 'discriminator'}
  assert set(experiment.frozen) == {'vae', 'prior', 'teacher'}
  shapes = [x.shape[1:] for x in experiment.discriminator.inputs[1:]]
  assert shapes == [(8, 8, 32), (4, 4, 64), (4, 4, 64)]


def test_start_times_have_the_probabilities_of_the_config():
  """LADD's (arXiv:2403.12015), with as many steps."""
  changes = {'adversarial.sample.num_steps': 4, 'adversarial.start_probabilities': (0.7, 0.1, 0.0, 0.2)}
  experiment = build(**changes)
  x0 = jnp.zeros((4000, 1, 1, 1))
  y, s = experiment.states(x0, jax.random.key(0), experiment.probabilities(jnp.int32(0)))
  shares = [float(jnp.mean(s == t)) for t in (1.0, 0.75, 0.5, 0.25)]
  np.testing.assert_allclose(shares, (0.7, 0.1, 0.0, 0.2), atol=0.03)
  late = np.asarray(s == 0.25)
  expected = float(experiment.student.denoiser.schedule.sigma(np.array(0.25)))
  assert np.asarray(y)[late].std() == pytest.approx(expected, rel=0.08)


def test_the_first_updates_have_probabilities_of_their_own():
  changes = {
    'adversarial.sample.num_steps': 4,
    'adversarial.start_probabilities': (0.7, 0.1, 0.1, 0.1),
    'adversarial.warmup.num_steps': 500,
    'adversarial.warmup.start_probabilities': (0.0, 0.0, 0.5, 0.5),
  }
  experiment = build(**changes)
  for step, wanted in ((0, (0, 0, 0.5, 0.5)), (499, (0, 0, 0.5, 0.5)), (500, (0.7, 0.1, 0.1, 0.1))):
    np.testing.assert_allclose(experiment.probabilities(jnp.int32(step)), wanted, rtol=1e-6)
  changes['adversarial.warmup.num_steps'] = 0
  np.testing.assert_allclose(build(**changes).probabilities(jnp.int32(0)), (0.7, 0.1, 0.1, 0.1), rtol=1e-6)


@pytest.mark.parametrize(('side', 'mean'), [(128, 1.0 - np.log(16)), (8, 1.0), (0, 1.0)])
def test_levels_of_the_heads_are_shifted_to_the_side_of_the_maps(side, mean):
  """Digits are 8x8: at the level of LADD's maps of 128x128 nothing is left of them."""
  experiment = build(**{'adversarial.loss.renoise_side': side, 'adversarial.loss.renoise_std': 0.1})
  t, eps = experiment.renoising(jax.random.key(0), jnp.zeros((2000, 8, 8, 1)))
  t, schedule = np.asarray(t, np.float64), experiment.student.denoiser.schedule
  assert np.mean(np.log(schedule.sigma(t) / schedule.alpha(t))) == pytest.approx(mean, abs=0.02)
  assert eps.shape == (2000, 8, 8, 1)


@pytest.mark.slow
def test_a_student_of_few_steps_can_be_the_teacher():
  changes = {
    'teacher.stage': 'distill_2',
    'teacher_calls': 1,
    'sample.sampler': 'ddim',
    'train.microbatches': 2,
  }
  changes = {f'adversarial.{field}': value for field, value in changes.items()}
  config = get('guided,distill,adversarial,debug', **changes)
  assert config.stages[-3:] == ('distill_2', 'distill_1', 'adversarial')
  experiment = experiments.build(config, 'adversarial')
  assert experiment.teacher_source.stage == 'distill_2'
  # both read the guidance weight, which is the first teacher's
  assert experiment.student.denoiser.reads_weight and experiment.student.settings['guidance_weight'] == 0.5
  networks = {name: experiment.frozen[name].model for name in ('teacher', 'vae')}
  shapes = {name: jax.eval_shape(model.init, jax.random.key(0)) for name, model in networks.items()}
  shapes['prior'] = {}
  state = jax.eval_shape(experiment.init, jax.random.key(0))
  batch = {'image': images(), 'mask': np.ones(8, np.float32)}
  after, metrics = jax.eval_shape(experiment.train_step, state, shapes, batch, jax.random.key(1))
  assert jax.tree.structure(after) == jax.tree.structure(state) and metrics['loss'].shape == ()
  jax.eval_shape(experiment.eval_step, {**shapes, **state.eval_params}, batch, jax.random.key(1))


@pytest.mark.parametrize('grid', ['karras', 'quadratic', 'both_ends'])
def test_a_distilled_teacher_is_called_at_its_own_times_alone(grid):
  changes = {
    'teacher.stage': 'distill_2',
    'teacher_calls': 1,
    'sample.sampler': 'ddim',
    'sample.num_steps': 2,
    'sample.grid': grid,
  }
  config = get('distill,adversarial,debug', **{f'adversarial.{field}': v for field, v in changes.items()})
  with pytest.raises(UserError, match=f"sample.grid is '{grid}'.*'distill_2' .* 2 steps .*valid: uniform"):
    experiments.build(config, 'adversarial')
  with config.unlocked():
    config.adversarial.sample.grid = 'uniform'
  assert experiments.build(config, 'adversarial').start_times == (1.0, 0.5)
  with config.unlocked():
    config.adversarial.sample.update({'grid': grid, 'num_steps': 1})
  assert experiments.build(config, 'adversarial').start_times == (1.0,)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'adversarial.sample.sampler': 'heun'}, "sample.sampler is 'heun'; valid: renoise, ddim"),
    ({'adversarial.start_probabilities': (1.0,)}, 'must be () or 2 numbers'),
    ({'adversarial.start_probabilities': (0.5, 0.6)}, 'that sum to 1, got (0.5, 0.6)'),
    ({'adversarial.warmup.start_probabilities': (1.0,)}, 'warmup.start_probabilities must be () or 2'),
    ({'adversarial.warmup.num_steps': -1}, 'warmup.num_steps must be >= 0, got -1'),
    ({'adversarial.teacher_calls': 0}, 'teacher_calls must be >= 1, got 0'),
    ({'adversarial.loss.adversarial_weight': 0.0}, 'loss.adversarial_weight must be > 0, got 0.0'),
    ({'adversarial.loss.distillation_weight': -1.0}, 'loss.distillation_weight must be >= 0, got -1.0'),
    ({'adversarial.loss.r1_gamma': -1.0}, 'loss.r1_gamma must be >= 0'),
    ({'adversarial.optim_discriminator.ema_decay': 0.9}, 'optim_discriminator.ema_decay must be 0'),
    ({'adversarial.discriminator.channels': 5}, 'discriminator.channels is 5'),
    ({'adversarial.diffusion.loss_weight': 'none'}, "diffusion.loss_weight is 'none'"),
    ({'adversarial.teacher.stage': 'vae'}, "teacher.stage is 'vae'"),
  ],
)
def test_bad_settings_are_named(changes, message):
  with pytest.raises(UserError) as error:
    build(**changes)
  assert message in str(error.value)


@pytest.mark.parametrize(
  ('stages', 'message'),
  [
    (('refiner', 'adversarial'), 'predicts eps, whose error'),
    (('refiner',), "prediction is 'v', but the student"),
  ],
)
def test_a_teacher_that_predicts_eps_is_refused(stages, message):
  """Where the config does not put a student that predicts v between the two."""
  config = get()
  with config.unlocked():
    for stage in stages:
      config[stage].diffusion.prediction = 'eps'
  with pytest.raises(UserError, match=message):
    experiments.build(config, 'adversarial')


def test_between_a_teacher_that_predicts_eps_and_its_student_is_one_that_predicts_v():
  config = get(**{'refiner.diffusion.prediction': 'eps'})
  assert config.stages == ('vae', 'refiner', 'adversarial_v', 'adversarial')
  assert experiments.build(config, 'adversarial').teacher_source.stage == 'adversarial_v'


def test_a_distilled_teacher_is_called_on_its_own_grid():
  with pytest.raises(UserError, match=r'knows the times of 2 steps only; .* got 2 x 2'):
    build('distill,adversarial,debug', **{'adversarial.teacher.stage': 'distill_2'})


# What the players read --------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_student_starts_as_its_teacher():
  experiment = build()
  frozen = frozen_of(experiment)
  state = started(experiment, frozen)
  jax.tree.map(np.testing.assert_array_equal, state.networks['denoiser'].params, frozen['teacher'])
  jax.tree.map(np.testing.assert_array_equal, state.eval_params['denoiser'], frozen['teacher'])
  assert state.networks['discriminator'].ema_params is None
  values, t = values_of(experiment.student, frozen, 4), jnp.full(4, 0.7)
  read = {**frozen, 'denoiser': state.networks['denoiser'].params}
  student, teacher = (
    jax.jit(lambda y, read, denoiser=denoiser: denoiser.denoise(read, values)(y, t))(noise(), read)
    for denoiser in (experiment.student.denoiser, experiment.teacher)
  )
  np.testing.assert_array_equal(student, teacher)


@pytest.mark.slow
def test_formulation2_without_a_shift_is_formulation1():
  maps = []
  for variant in ('formulation1,adversarial,debug', 'formulation2,adversarial,debug'):
    experiment = build(variant)
    frozen = frozen_of(experiment)
    values = {'x0_vae': jnp.zeros((4, 8, 8, 1))}
    maps.append(experiment.feature_maps(frozen, noise(), values, jnp.full(4, 0.4), noise(seed=5)))
  jax.tree.map(np.testing.assert_array_equal, *maps)


@pytest.mark.slow
def test_formulation2_shifts_what_the_teachers_encoder_reads():
  experiment = build('formulation2,adversarial,debug')
  frozen = frozen_of(experiment)
  values, t = values_of(experiment.student, frozen, 4), jnp.full(4, 0.4)
  teacher, schedule = experiment.teacher, experiment.teacher.schedule
  x_t = schedule.alpha(t)[0] * noise() + schedule.sigma(t)[0] * noise(seed=5) + values['x0_vae']
  expected = teacher.model.apply(frozen['teacher'], x_t, t, values, method='features')
  got = experiment.feature_maps(frozen, noise(), values, t, noise(seed=5))
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


class Oracle(Denoiser):
  """A student that knows the image."""

  def x0_hat(self, read, values, without=()):
    x0 = read[self.network]['x0']
    return lambda y, t: jnp.repeat(x0, len(y) // len(x0), axis=0)


@pytest.mark.slow
def test_an_image_cannot_be_told_from_itself():
  """Real and fake have condition, time and noise in common."""
  experiment = swapped(build(**{'adversarial.loss.r1_gamma': 0.0}), Oracle)
  frozen = frozen_of(experiment)
  rows = rows_of(experiment, frozen)
  x0 = rows['x0']
  heads = made(experiment.discriminator, 3)
  probabilities = experiment.probabilities(jnp.int32(0))

  @jax.jit
  def run(x0):
    key = jax.random.key(6)
    read = {**frozen, 'denoiser': {'x0': x0}}
    return experiment.discriminator_loss(heads, read, rows, key, probabilities)

  loss, metrics = run(x0)
  assert metrics['logits/real'] == metrics['logits/fake'] != 0
  assert loss >= 2.0  # relu(1 - D) + relu(1 + D)
  _, metrics = run(x0[::-1])
  assert metrics['logits/real'] != metrics['logits/fake']


def test_the_batch_is_laid_out_pair_by_pair():
  a, b = noise(4, 0), noise(4, 1)
  both = grid_student.interleave(a, b)
  np.testing.assert_array_equal(both[2:4], jnp.stack([a[1], b[1]]))
  for got, expected in zip(grid_student.deinterleave(both, 2), (a, b), strict=True):
    np.testing.assert_array_equal(got, expected)


# Updates ----------------------------------------------------------------------------------------------


def update(step, frozen, state, k, mesh=None):
  batch = {'image': images(8, k)}
  if mesh is not None:
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
  return step(state, frozen, batch, jax.random.key(k))


@pytest.fixture(scope='module')
def run():
  """The stage, its compiled step, and the states and metrics of three updates on one device.

  Where no logit is beyond 1 a head's bias has the gradient 1 - 1, of whose rounding Adam would make a step.
  """
  changes = {'loss.distillation_weight': 2.5, 'loss.adversarial_weight': 0.3}
  changes |= {'optim.eps': 1e-3, 'optim_discriminator.eps': 1e-3}
  experiment = build(**SMALLER, **{f'adversarial.{field}': value for field, value in changes.items()})
  frozen, step = frozen_of(experiment), jax.jit(experiment.train_step)
  states, history = [started(experiment, frozen)], []
  for k in range(3):
    state, metrics = update(step, frozen, states[-1], k)
    states.append(state)
    history.append(jax.device_get(metrics))
  return experiment, step, states, history


def test_an_update_moves_both_players_and_the_average(run):
  _, _, (before, *_, state), history = run
  assert int(state.step) == 3
  for name in ('denoiser', 'discriminator'):
    leaves = (jax.tree.leaves(x.networks[name].params) for x in (before, state))
    assert all(np.any(a != b) for a, b in zip(*leaves, strict=True) if a.size > 1), name
  student = state.networks['denoiser']
  assert np.any(student.ema_params['conv_in']['kernel'] != student.params['conv_in']['kernel'])
  assert set(history[0]) == {
    'loss', 'loss/adversarial', 'loss/distillation', 'loss/discriminator', 'logits/real', 'logits/fake', 'r1',
    'grad_norm/denoiser', 'grad_norm/discriminator',
  }  # fmt: skip


@pytest.mark.slow
def test_losses_are_what_they_are_called(run):
  *_, history = run
  for metrics in history:
    total = 0.3 * metrics['loss/adversarial'] + 2.5 * metrics['loss/distillation']
    assert metrics['loss'] == pytest.approx(total, rel=1e-5)
    assert metrics['r1'] > 0 and metrics['loss/discriminator'] > 0


@pytest.mark.slow
def test_a_state_that_was_stored_goes_on_as_if_it_had_not_been(run):
  experiment, step, states, _ = run
  state = jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, states[2]))
  state, _ = update(step, frozen_of(experiment), state, 2)
  jax.tree.map(np.testing.assert_array_equal, state, states[3])


@pytest.mark.slow
def test_one_device_equals_eight(run):
  experiment, _, states, history = run
  mesh = sharding.make_mesh(get().mesh)
  assert mesh.size == 8
  step, frozen, state = jax.jit(experiment.train_step), frozen_of(experiment), states[0]
  for k in range(2):
    state, metrics = update(step, frozen, state, k, mesh)
    for name, value in history[k].items():
      np.testing.assert_allclose(metrics[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
  for name in ('denoiser', 'discriminator'):
    one, eight = (x.networks[name].params for x in (states[2], state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, eight)


@pytest.mark.slow
def test_the_adversary_alone_reaches_the_student_through_the_teachers_encoder():
  """Without the distillation loss the teacher is not sampled: its way up need not be there."""
  experiment = build(**{'adversarial.loss.distillation_weight': 0.0})
  frozen = frozen_of(experiment)
  rows = rows_of(experiment, frozen)
  heads, params = made(experiment.discriminator, 3), frozen['teacher']
  encoder = {k: v for k, v in params.items() if not k.startswith(('up_', 'norm_out', 'conv_out'))}
  assert len(encoder) < len(params)

  def loss(params, heads):
    probabilities = experiment.probabilities(jnp.int32(0))
    read = {'teacher': encoder, 'denoiser': params}
    return experiment.student_loss(read, heads, rows, jax.random.key(7), probabilities)

  slope = jax.jit(jax.grad(loss, has_aux=True))
  grads, metrics = slope(params, heads)
  assert set(metrics) == {'loss', 'loss/adversarial'}
  assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))
  # heads that say nothing teach nothing
  silent = jax.tree.map(jnp.zeros_like, heads)
  grads, _ = slope(params, silent)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
def test_the_student_and_the_teacher_are_held_in_the_discriminators_loss():
  experiment = build()
  frozen = frozen_of(experiment)
  rows = rows_of(experiment, frozen)

  def loss(student, teacher):
    read = {**frozen, 'denoiser': student, 'teacher': teacher}
    heads = made(experiment.discriminator, 3)
    probabilities = experiment.probabilities(jnp.int32(0))
    return experiment.discriminator_loss(heads, read, rows, jax.random.key(8), probabilities)[0]

  grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(frozen['teacher'], frozen['teacher'])
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


# Evaluation -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_target_is_the_teachers_sample():
  experiment = build('formulation2,adversarial,debug', **{'adversarial.teacher_calls': 3})
  frozen = frozen_of(experiment)
  values = values_of(experiment.student, frozen, 4)
  got = jax.jit(lambda y: experiment.target(frozen, y, jnp.ones(4), values))(noise())
  teacher = experiment.teacher.denoise(frozen, values)
  keys = jax.random.split(jax.random.key(9), 4)
  expected = samplers.SAMPLERS['ddim'](teacher, experiment.teacher.schedule, noise(), keys, num_steps=3)
  np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.slow
def test_the_teacher_itself_has_diversity_ratio_one_and_no_error():
  experiment = build(**{'adversarial.teacher_calls': 1, 'adversarial.sample.num_steps': 1})
  frozen = frozen_of(experiment)
  batch = {'image': images(), 'mask': np.array([1, 1, 1, 1, 1, 1, 0, 0], np.float32)}
  evaluate = jax.jit(experiment.eval_step)
  read = {**frozen, 'denoiser': frozen['teacher']}
  values = evaluate(read, batch, jax.random.key(0))
  assert set(values) == {'loss', 'diversity', 'diversity_ratio'}
  assert float(values['diversity_ratio']) == pytest.approx(1.0, rel=1e-4) and values['diversity'] > 1e-4
  assert float(values['loss']) < 1e-8
  # masked examples count for nothing
  other = {**batch, 'image': np.concatenate([batch['image'][:6], batch['image'][:2]])}
  again = evaluate(read, other, jax.random.key(0))
  assert float(again['diversity']) == pytest.approx(float(values['diversity']), rel=1e-5)


def test_a_student_that_ignores_its_noise_has_no_diversity():
  experiment = swapped(build(**SMALLER, **{'adversarial.teacher_calls': 1}), Oracle)
  batch = {'image': images(), 'mask': np.ones(8, np.float32)}
  read = {**frozen_of(experiment), 'denoiser': {'x0': jnp.clip(noise(8), -1, 1)}}
  values = jax.jit(experiment.eval_step)(read, batch, jax.random.key(0))
  assert values['diversity'] == values['diversity_ratio'] == 0 and values['loss'] > 0


def test_the_distillation_loss_has_the_weight_of_its_name():
  experiment = build()
  a, b, s = noise(), noise(seed=5), jnp.array([1.0, 0.5, 0.25, 0.1])
  snr = np.exp(experiment.student.denoiser.schedule.logsnr(np.asarray(s)))
  expected = np.maximum(snr, 1) * np.asarray(ladd.squared_distance(a, b))
  np.testing.assert_allclose(experiment.distillation_losses(a, b, s), expected, rtol=1e-3)
