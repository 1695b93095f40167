"""Distribution matching as a stage: its three networks, its two kinds of updates, and Gaussian data."""

import dataclasses
import functools
import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from some_slow import some_slow

from vaediff import experiments, optim
from vaediff.diffusion import gaussian, samplers, schedules
from vaediff.errors import UserError
from vaediff.experiments.denoiser import Denoiser
from vaediff.experiments.distribution_matching import DistributionMatching
from vaediff.machine import sharding
from vaediff.run import students

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import toy_denoiser  # noqa: E402
from random_parameters import frozen_of, made  # noqa: E402

NAMES = ('denoiser', 'fake_denoiser', 'discriminator')


def get(variant='matching,debug', **changes):
  config = importlib.import_module('configs.digits').get_config(variant)
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return students.resolve(config)


def build(variant='matching,debug', **changes):
  return experiments.build(get(variant, **changes), 'matching')


def batch(count=8):
  image = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), np.uint8)
  return {'image': image, 'mask': np.ones(count, np.float32)}


def equal(a, b):
  return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# The stage of a config --------------------------------------------------------------------------------


def test_by_default_two_steps_and_five_updates_of_the_fake_denoiser_for_one():
  experiment = build('matching')
  assert experiment.num_function_evaluations == 2 and experiment.start_times == (1.0, 0.5)
  assert set(experiment.networks) == set(NAMES) and set(experiment.frozen) == {'vae', 'prior', 'teacher'}
  assert [experiment.kind_of(step) for step in range(6)] == ['', '', '', '', 'student', '']


@pytest.mark.slow
def test_after_adversarial_distillation_it_goes_on_from_that_student():
  config = get('adversarial,matching,debug')
  assert config.stages == ('vae', 'refiner', 'adversarial', 'matching')
  experiment = experiments.build(config, 'matching')
  assert experiment.frozen['start'].stage == 'adversarial'
  assert experiment.frozen['teacher'].stage == 'refiner'
  frozen = frozen_of(experiment)
  assert not equal(frozen['start'], frozen['teacher'])
  state = jax.jit(experiment.start)(jax.jit(experiment.init)(jax.random.key(0)), frozen)
  assert equal(state.networks['denoiser'].params, frozen['start'])
  assert equal(state.networks['denoiser'].ema_params, frozen['start'])
  assert equal(state.networks['fake_denoiser'].params, frozen['teacher'])


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'matching.sample.sampler': 'ddim'}, "sample.sampler must be 'renoise'"),
    ({'matching.fake_updates': 0}, 'fake_updates must be >= 1, got 0'),
    ({'matching.loss.min_time': 0.0}, '0 < min_time < max_time <= 1, got 0.0 and 0.98'),
    ({'matching.loss.max_time': 0.01}, '0 < min_time < max_time <= 1, got 0.02 and 0.01'),
    ({'matching.loss.adversarial_weight': -1.0}, 'loss.adversarial_weight must be >= 0'),
    ({'matching.optim_fake.ema_decay': 0.9}, 'optim_fake.ema_decay must be 0'),
    ({'matching.start_stage': 'vae'}, "start_stage is 'vae', which is no stage of this run with a student"),
    ({'matching.start_probabilities': (1.0,)}, 'start_probabilities must be () or 2 numbers'),
    ({'matching.teacher.stage': 'vae'}, "teacher.stage is 'vae'"),
  ],
)
def test_values_that_are_not_allowed(changes, message):
  with pytest.raises(UserError) as error:
    build(**changes)
  assert message in str(error.value)


def test_it_goes_on_from_a_student_of_the_same_kind_only():
  changes = {'adversarial.diffusion.prediction': 'v', 'matching.diffusion.prediction': 'x0'}
  with pytest.raises(UserError, match="start_stage is 'adversarial', whose diffusion.prediction is 'v'"):
    build('adversarial,matching,debug', **{**changes, 'refiner.diffusion.prediction': 'x0'})


# What the losses read ---------------------------------------------------------------------------------


class Constant(Denoiser):
  """A student that draws one grey."""

  def x0_hat(self, read, values, without=()):
    return lambda y, t: jnp.full_like(y, 0.7)


def test_the_states_are_those_of_its_own_samples():
  experiment = build(**{'matching.start_probabilities': (0.25, 0.75)})
  known = experiment.student.denoiser
  denoiser = Constant(**{field.name: getattr(known, field.name) for field in dataclasses.fields(known)})
  student = dataclasses.replace(experiment.student, denoiser=denoiser)
  experiment = dataclasses.replace(experiment, student=student)
  like = jnp.zeros((512, 8, 8, 1))
  drawn = jax.jit(lambda key: experiment.own_states({}, {}, like, key))
  y, s = map(np.asarray, drawn(jax.random.key(0)))
  second = s == experiment.start_times[1]
  assert second.mean() == pytest.approx(0.75, abs=0.07)
  assert y[~second].mean() == pytest.approx(0.0, abs=0.05)  # pure noise
  assert y[~second].std() == pytest.approx(1.0, rel=0.03)
  schedule = denoiser.schedule
  alpha, sigma = (float(of(np.array(0.5))) for of in (schedule.alpha, schedule.sigma))
  assert y[second].mean() == pytest.approx(0.7 * alpha, abs=0.03)
  assert y[second].std() == pytest.approx(sigma, rel=0.03)


def unrolled(experiment, read, values, like, key):
  """Returns what `own_states` does, one step after the other and with the same keys."""
  key_s, key_eps = jax.random.split(key)
  times, denoiser, count = experiment.start_times, experiment.student.denoiser, like.shape[0]
  denoise = denoiser.denoise(read, values)
  noises = [jax.random.normal(key, like.shape) for key in jax.random.split(key_eps, len(times))]
  states = [noises[0]]
  for before, s, noise in zip(times[:-1], times[1:], noises[1:], strict=True):
    x0_hat = denoise(states[-1], jnp.full(count, before))
    states.append(gaussian.q_sample(x0_hat, noise, jnp.full(count, s), denoiser.schedule))
  drawn = jax.random.choice(key_s, len(times), (count,), p=jnp.asarray(experiment.start_probabilities))
  return jnp.stack(states)[drawn, jnp.arange(count)], jnp.asarray(times)[drawn]


@pytest.mark.parametrize('count', [1, 5])
def test_the_states_are_those_of_its_steps_one_after_the_other_and_have_no_slope(count):
  known = build('unconditional,matching,debug', **{'matching.sample.num_steps': count})
  schedule = schedules.make_schedule('cosine')
  student, teacher = toy_denoiser.diffusion(known.student, schedule, known.student.optimizer)
  experiment = dataclasses.replace(known, student=student, teacher=teacher)
  read, like = {'denoiser': toy_denoiser.exact(schedule, 0.5)}, jnp.zeros((32, 8, 8, 1))
  got, s = jax.jit(lambda read: experiment.own_states(read, {}, like, jax.random.key(4)))(read)
  expected, expected_s = jax.jit(lambda read: unrolled(experiment, read, {}, like, jax.random.key(4)))(read)
  np.testing.assert_array_equal(s, expected_s)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
  assert len(np.unique(s)) == count

  def total(read):
    return jnp.sum(experiment.own_states(read, {}, like, jax.random.key(4))[0])

  assert not any(np.any(leaf) for leaf in jax.tree.leaves(jax.jit(jax.grad(total))(read)))
  # what is linearised of it is nothing: no step stores anything for a backward pass
  assert 'scan' not in str(jax.make_jaxpr(jax.linearize(total, read)[1])(read))


class ByMean(DistributionMatching):
  """Its head says the mean of the noised image, times a weight."""

  def judge(self, read, y, t, values):
    return read['discriminator']['w'] * jnp.mean(y, axis=(1, 2, 3))[:, None]


def remade(known, kind, **changes):
  """Returns an object of a subclass with the same fields but for some."""
  fields = {field.name: getattr(known, field.name) for field in dataclasses.fields(known)}
  return kind(**{**fields, **changes})


@pytest.fixture(scope='module')
def by_mean():
  """The stage with that head and networks of slopes, and what it reads: the fake denoiser is the teacher."""
  known = build(
    'unconditional,matching,debug',
    **{'matching.loss.adversarial_weight': 0.5, 'matching.loss.fake_adversarial_weight': 0.125},
  )
  schedule = schedules.make_schedule('cosine')
  student, teacher = toy_denoiser.diffusion(known.student, schedule, known.student.optimizer)
  slopes = {name: toy_denoiser.exact(schedule, 0.5) for name in ('teacher', 'denoiser', 'fake_denoiser')}
  read = {**slopes, 'discriminator': {'w': np.float32(1)}}
  return remade(known, ByMean, student=student, teacher=teacher), read


def test_the_head_is_to_say_more_of_the_data_than_of_the_student(by_mean):
  """The data are darker than the student's grey here: before it has learned the head is wrong on both."""
  experiment, read = by_mean
  grey = dataclasses.replace(experiment.student, denoiser=remade(experiment.student.denoiser, Constant))
  experiment = dataclasses.replace(experiment, student=grey)
  rows = {'x0': np.full((64, 8, 8, 1), -0.7, np.float32), 'values': {}}
  run = jax.jit(lambda read, rows: experiment.fake_loss(read, rows, jax.random.key(2)))
  loss, metrics = jax.device_get(run(read, rows))
  assert metrics['logits/real'] < -0.2 and metrics['logits/fake'] > 0.2
  assert metrics['loss/discriminator'] > 2 * np.log(2)
  total = metrics['loss/fake'] + 0.125 * metrics['loss/discriminator']
  assert loss == metrics['loss'] == pytest.approx(total, rel=1e-5)


def test_the_head_alone_reaches_the_student_through_the_noised_image(by_mean):
  experiment, read = by_mean
  rows = {'x0': np.zeros((8, 8, 8, 1), np.float32), 'values': {}}

  def loss(params, read, rows):
    return experiment.student_loss({**read, 'denoiser': params}, rows, jax.random.key(1))

  slope = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (value, metrics), grads = slope(read['denoiser'], read, rows)
  assert metrics['loss/distribution'] == 0 and all(np.any(leaf) for leaf in jax.tree.leaves(grads))
  assert value == pytest.approx(0.5 * metrics['loss/adversarial'], rel=1e-5)
  # a head that says nothing teaches nothing
  _, grads = slope(read['denoiser'], {**read, 'discriminator': {'w': np.float32(0)}}, rows)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_times_of_comparison_are_between_the_two_of_the_config(by_mean):
  experiment = dataclasses.replace(by_mean[0], min_time=0.3, max_time=0.6)
  t = np.asarray(jax.jit(lambda: experiment.matching_time(jax.random.key(0), 4096))())
  assert 0.3 - 1e-3 <= t.min() < 0.305 and 0.595 < t.max() <= 0.6 + 1e-3
  assert t.mean() == pytest.approx(0.45, abs=0.01)


# Updates ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_student_is_updated_where_it_is_due_and_the_others_always():
  experiment = build(**{'matching.loss.adversarial_weight': 0.5})
  frozen = frozen_of(experiment)
  state = jax.jit(experiment.start)(jax.jit(experiment.init)(jax.random.key(0)), frozen)
  for step in range(2):
    kind = experiment.kind_of(step)
    update = jax.jit(experiment.train_step, static_argnums=4)
    after, metrics = update(state, frozen, batch(), jax.random.key(step), kind)
    kept = {name: equal(state.networks[name].params, after.networks[name].params) for name in NAMES}
    assert kept == {'denoiser': kind == '', 'fake_denoiser': False, 'discriminator': False}
    assert {'loss', 'loss/fake', 'loss/discriminator', 'loss/distribution'} <= set(metrics)
    assert (float(metrics['loss/distribution']) > 0) == (kind == 'student')
    assert jax.tree.structure(after) == jax.tree.structure(state)
    state = after


@pytest.mark.slow
def test_a_fake_denoiser_that_is_the_teacher_moves_no_image():
  experiment = build(**{'matching.loss.adversarial_weight': 0.0})
  frozen = frozen_of(experiment)
  rows = jax.jit(experiment.rows)(frozen, batch(), jax.random.key(0))
  others = {'fake_denoiser': frozen['teacher'], 'discriminator': made(experiment.discriminator, 3)}

  def loss(params, others, frozen):
    return experiment.student_loss({**frozen, **others, 'denoiser': params}, rows, jax.random.key(1))

  slope = jax.jit(jax.grad(loss, has_aux=True))
  grads, metrics = slope(frozen['teacher'], others, frozen)
  assert metrics['loss/distribution'] == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(grads))
  others['fake_denoiser'] = made(experiment.teacher.model, 4)
  grads, metrics = slope(frozen['teacher'], others, frozen)
  assert metrics['loss/distribution'] > 0 and all(np.any(leaf) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize('count', some_slow([1, 2], 1))
def test_samples_get_the_deviation_of_gaussian_data(count):
  """E[x0 | pure noise] is 0, as the teacher says; the student is to draw x0 ~ N(0, 0.25) in so many steps."""
  std = 0.5
  experiment = build(
    'unconditional,matching,debug',
    **{'matching.loss.adversarial_weight': 0.0, 'matching.sample.num_steps': count},
  )
  schedule = schedules.make_schedule('cosine')
  settings = ConfigDict(get().matching.optim.to_dict())
  settings.update({'learning_rate': 2e-2, 'ema_decay': 0.0, 'clip_norm': 0.0})
  optimizer = optim.make_optimizer(settings, 1500)
  student, teacher = toy_denoiser.diffusion(experiment.student, schedule, optimizer)
  experiment = dataclasses.replace(
    experiment, student=student, teacher=teacher, optimizer_fake=optimizer, fake_updates=5
  )
  frozen = {'teacher': toy_denoiser.exact(schedule, std)}

  @jax.jit
  def train(state):
    def update(state, number, kind):
      images, key = toy_denoiser.batch(std, number), jax.random.fold_in(jax.random.key(3), number)
      return experiment.train_step(state, frozen, images, key, kind)[0]

    def body(state, k):
      state = jax.lax.fori_loop(0, 4, lambda j, state: update(state, 5 * k + j, ''), state)
      return update(state, 5 * k + 4, 'student'), None

    return jax.lax.scan(body, state, jnp.arange(300))[0]

  assert [experiment.kind_of(j) for j in range(5)] == [*4 * [''], 'student']
  state = jax.jit(lambda: experiment.start(experiment.init(jax.random.key(0)), frozen))()
  y, keys = jax.random.normal(jax.random.key(1), (64, 8, 8, 1)), jax.random.split(jax.random.key(0), 64)

  @jax.jit
  def deviation(params):
    denoise = student.denoiser.denoise({'denoiser': params}, {})
    return samplers.SAMPLERS['renoise'](denoise, schedule, y, keys, num_steps=count).std()

  after = float(deviation(train(state).networks['denoiser'].params))
  assert deviation(frozen['teacher']) < 0.8 * std
  assert after == pytest.approx(std, rel=0.1)


@pytest.mark.slow
def test_one_device_equals_eight():
  config = get(**{'matching.loss.adversarial_weight': 0.5})
  experiment = experiments.build(config, 'matching')
  frozen = frozen_of(experiment)
  given = {'image': np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), np.uint8)}

  def update(mesh):
    state = jax.jit(experiment.start)(jax.jit(experiment.init)(jax.random.key(0)), frozen)
    rows = sharding.put_batch(given, sharding.batch_sharding(mesh))
    step = jax.jit(functools.partial(experiment.train_step, kind='student'))
    return step(
      *(sharding.replicate(x, mesh) for x in (state, frozen)),
      rows,
      sharding.replicate(jax.random.key(1), mesh),
    )

  one, eight = (update(sharding.make_mesh(config.mesh, jax.devices()[:count])) for count in (1, 8))
  for name, value in one[1].items():
    np.testing.assert_allclose(eight[1][name], value, rtol=1e-3, atol=1e-5, err_msg=name)
  for name in NAMES:
    a, b = (x[0].networks[name] for x in (one, eight))
    mean, other = (optax.tree_utils.tree_get(x.opt_state, 'mu') for x in (a, b))
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3 * abs(y).max()), other, mean
    )

    def same(x, y, mean):  # Adam makes a whole step of a gradient of nothing, and of its rounding
      sure = np.asarray(abs(mean) >= 0.01 * abs(mean).max())
      np.testing.assert_allclose(np.asarray(x)[sure], np.asarray(y)[sure], atol=3e-5)

    jax.tree.map(same, b.params, a.params, mean)
