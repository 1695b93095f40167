"""A diffusion with a learned variance: what its losses move, its state, samples, students and refusals."""

import dataclasses
import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from some_slow import some_slow

from vaediff import experiments
from vaediff.diffusion import importance, likelihood
from vaediff.errors import UserError
from vaediff.experiments import base
from vaediff.run import students

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from random_parameters import frozen_of, made, values_of  # noqa: E402

LEARNED = 'unconditional,learned_variance,debug'
BOUND = {'refiner.loss.objective': 'bound', 'refiner.loss.time_sampler': 'loss_second_moment'}


def config_of(variant, **changes):
  config = importlib.import_module('configs.digits').get_config(variant)
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return config


def build(variant=LEARNED, **changes):
  return experiments.build(config_of(variant, **changes), 'refiner')


def images(count=8):
  return jnp.asarray(np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), np.uint8))


def read_of(experiment):
  return {**frozen_of(experiment), 'denoiser': made(experiment.denoiser.model, 0)}


def keys(count, seed=5):
  return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(count))


# Losses -----------------------------------------------------------------------------------------------


def gradients_of_halves(experiment, term):
  """The largest gradient of one term with respect to the last bias: of the prediction, of the variance."""
  read = read_of(experiment)
  y0 = images().astype(jnp.float32) / 127.5 - 1

  def loss(params):
    terms = experiment.denoiser.loss_terms(
      {**read, 'denoiser': params}, y0, {}, jax.random.key(1), training=False
    )
    return jnp.mean(terms[term])

  bias = jax.jit(jax.grad(loss))(read['denoiser'])['conv_out']['bias']
  return np.max(np.abs(bias[:1])), np.max(np.abs(bias[1:]))


@pytest.mark.slow
def test_the_hybrid_bound_moves_the_variance_alone_and_the_simple_loss_the_prediction_alone():
  experiment = build()
  of_prediction, of_variance = gradients_of_halves(experiment, 'bound')
  assert of_prediction == 0 and of_variance > 0
  of_prediction, of_variance = gradients_of_halves(experiment, 'simple')
  assert of_prediction > 0 and of_variance == 0


@pytest.mark.slow
def test_the_bound_alone_moves_both():
  of_prediction, of_variance = gradients_of_halves(build(**BOUND), 'loss')
  assert of_prediction > 0 and of_variance > 0


@pytest.mark.slow
def test_the_hybrid_loss_is_the_sum():
  experiment = build()
  read, y0 = read_of(experiment), images().astype(jnp.float32) / 127.5 - 1
  terms = experiment.denoiser.loss_terms(read, y0, {}, jax.random.key(1), training=False)
  np.testing.assert_allclose(terms['loss'], terms['simple'] + 0.001 * terms['bound'], rtol=1e-6)
  alone = dataclasses.replace(experiment.denoiser, objective='bound')
  np.testing.assert_array_equal(alone.losses(read, y0, {}, jax.random.key(1), training=False), terms['bound'])
  fixed = build('unconditional,debug')
  read['denoiser'] = made(fixed.denoiser.model, 0)
  terms = fixed.denoiser.loss_terms(read, y0, {}, jax.random.key(1), training=False)
  assert set(terms) == {'loss'}


def test_the_bound_of_training_is_that_of_the_evaluation():
  """T vb_t, averaged over all t, is the sum of both other terms: x0_hat is within the bound, not clipped."""
  experiment = build()
  y0 = images(1).astype(jnp.float32) / 127.5 - 1
  model = dataclasses.replace(experiment.denoiser.model, module=Small())
  denoiser = dataclasses.replace(experiment.denoiser, model=model, prediction='x0')
  read = {'denoiser': {}}
  t = (jnp.arange(1000) + 1) / 1000
  many = jnp.repeat(y0, 1000, axis=0)
  trained = jax.jit(
    lambda: denoiser.loss_terms(read, many, {}, jax.random.key(1), training=False, t=t)['bound'].mean()
  )()
  terms = jax.jit(
    lambda: likelihood.bound_terms(
      denoiser.bounded_with_fraction(read, {}), denoiser.schedule, y0, keys(1), 999, 'learned'
    )
  )()
  evaluated = likelihood.bits_per_dimension(terms['steps'] + terms['decoder'], 64)[0]
  # the two differ by nothing but the noise of y, which this network does not read
  assert float(trained) == pytest.approx(float(evaluated), rel=1e-4)


class Small(nn.Module):
  """A network that says x0 = 0.1 and f = 0.75, whatever it reads."""

  def __call__(self, x_t, t, values={}, drop={}, *, deterministic=True):  # noqa: B006
    return jnp.concatenate([jnp.full_like(x_t, 0.1), jnp.full_like(x_t, 0.5)], axis=-1)


@pytest.mark.slow
@pytest.mark.parametrize('space', ['', 'latent_diffusion,', 'wavelet_diffusion,'])
def test_it_trains_in_every_space(space):
  experiment = build(f'unconditional,{space}learned_variance,debug')
  state = jax.jit(experiment.init)(jax.random.key(0))
  step = jax.jit(experiment.train_step)
  for k in range(2):
    state, metrics = step(state, frozen_of(experiment), {'image': images()}, jax.random.key(k))
  assert set(metrics) == {'loss', 'simple', 'bound', 'grad_norm/denoiser'}
  assert all(np.isfinite(value) for value in metrics.values())
  assert experiment.denoiser.of_bytes == (space == '')
  assert state.extra == {}


# Times that are drawn by their losses -------------------------------------------------------------------


def trained(microbatches, num_steps=3, **changes):
  experiment = build(**BOUND, **{'refiner.train.microbatches': microbatches, **changes})
  state = jax.jit(experiment.init)(jax.random.key(0))
  step = jax.jit(experiment.train_step)
  for k in range(num_steps):
    state, metrics = step(state, {}, {'image': images()}, jax.random.key(k))
  return experiment, state, metrics


@pytest.mark.slow
@pytest.mark.parametrize('microbatches', [1, 2])
def test_the_history_is_in_the_state_and_has_each_loss_in_its_place(microbatches):
  experiment, state, metrics = trained(microbatches)
  history = state.extra['losses']
  assert history['losses'].shape == (1000, importance.MEMORY)
  assert int(history['counts'].sum()) == 3 * 8
  key_times = jax.random.split(jax.random.key(2))[0]
  index, _ = importance.draw(importance.start(1000), key_times, 8)  # still uniform
  assert np.all(np.asarray(history['counts'])[index] > 0)
  seen = np.sort(np.asarray(history['losses'])[np.asarray(history['losses']) != 0])
  assert len(seen) == 3 * 8
  assert set(metrics) == {'loss', 'simple', 'bound', 'grad_norm/denoiser'}


@pytest.mark.slow
def test_the_losses_of_parts_are_those_of_the_whole(monkeypatch):
  """A batch of two parts has each loss where the example is: here a loss is the brightness of its image."""
  batch = {'image': images()}
  for microbatches in (1, 2, 4):
    experiment = build(**BOUND, **{'refiner.train.microbatches': microbatches})
    monkeypatch.setattr(
      type(experiment.denoiser), 'loss_terms',
      lambda self, read, y0, values, key, *, training, t: {
        'loss': y0.mean((1, 2, 3)) + 0 * read['denoiser']['conv_out']['bias'][0] + 1000 * t
      },
    )  # fmt: skip
    state = jax.eval_shape(experiment.init, jax.random.key(0))
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
    after, _ = jax.jit(experiment.train_step)(state, {}, batch, jax.random.key(4))
    index, _ = importance.draw(importance.start(1000), jax.random.split(jax.random.key(4))[0], 8)
    losses = (batch['image'] / 127.5 - 1).mean((1, 2, 3)) + index + 1
    expected = importance.update(importance.start(1000), index, losses)
    np.testing.assert_allclose(after.extra['losses']['losses'], expected['losses'], rtol=1e-5)
    np.testing.assert_array_equal(after.extra['losses']['counts'], expected['counts'])


# Samples and the bound ----------------------------------------------------------------------------------


def sample(experiment, read, rows, **settings):
  experiment = dataclasses.replace(experiment, settings={**experiment.settings, **settings})
  own = base.sampling_keys(rows)
  given = experiment.draw(read, own, jnp.arange(len(rows)))
  return experiment.sample(read, given, own)['x0']


@pytest.mark.slow
def test_samplers_that_read_no_variance_work_on_the_prediction():
  learned, fixed = build(), build('unconditional,debug')
  read = read_of(learned)
  conv_out = {name: leaf[..., :1] for name, leaf in read['denoiser']['conv_out'].items()}
  alone = {**read, 'denoiser': {**read['denoiser'], 'conv_out': conv_out}}
  for settings in ({'sampler': 'ddim'}, {'sampler': 'ddpm', 'variance': 'large'}, {'sampler': 'dpmpp_2m'}):
    settings |= {'grid': 'uniform', 'num_steps': 3}
    first, second = sample(learned, read, keys(2), **settings), sample(fixed, alone, keys(2), **settings)
    np.testing.assert_allclose(first, second, atol=1e-5)
  own = sample(learned, read, keys(2), sampler='ddpm', variance='learned', grid='uniform', num_steps=3)
  large = sample(learned, read, keys(2), sampler='ddpm', variance='large', grid='uniform', num_steps=3)
  assert np.max(np.abs(own - large)) > 1e-3


@pytest.mark.slow
def test_guidance_is_of_the_mean_and_one_pass_gives_both():
  experiment = build('label,unconditional,learned_variance,debug', **{'refiner.sample.guidance_weight': 2.0})
  read, denoiser = read_of(experiment), experiment.denoiser
  values = values_of(experiment, read, 3)
  y, t = jax.random.normal(jax.random.key(0), (3, 8, 8, 1)), jnp.full(3, 0.4)
  x0_hat, fraction = denoiser.with_fraction(read, values)(y, t)
  np.testing.assert_allclose(x0_hat, denoiser.denoise(read, values)(y, t), atol=1e-6)
  np.testing.assert_array_equal(fraction, denoiser.x0_hat_and_fraction(read, values)(y, t)[1])
  clipped, unclipped = denoiser.with_unclipped(read, values)(y, t)
  np.testing.assert_allclose(clipped, np.clip(unclipped, -1, 1), atol=1e-6)
  assert np.max(np.abs(unclipped)) > 1


@pytest.mark.slow
def test_the_bound_is_of_the_steps_that_are_asked_for():
  experiment = build()
  read, batch = read_of(experiment), {'image': images(4)}
  settings = {**experiment.settings, 'bound_steps': 25, 'grid': 'both_ends'}
  found = {}
  for variance in ('small', 'large', 'learned'):
    short = dataclasses.replace(experiment, settings={**settings, 'variance': variance})
    terms = jax.jit(lambda short=short: short.bound(read, batch, keys(4), 1000))()
    assert set(terms) == {'prior', 'steps', 'decoder'}
    found[variance] = float(sum(terms.values()).mean())
  assert found['small'] > found['large']
  assert len(set(found.values())) == 3


def test_a_bound_of_steps_that_a_grid_has_not_is_named():
  """Where a sweep has chosen the grid, after the stage was built."""
  experiment = build('unconditional,debug')
  settings = {**experiment.settings, 'grid': 'leading', 'num_steps': 25, 'bound_steps': 41}
  short = dataclasses.replace(experiment, settings=settings)
  with pytest.raises(UserError, match=r'^sample.bound_steps is 41, but no stride'):
    short.bound({}, {'image': images(2)}, keys(2), 1000)


def test_fewer_steps_of_a_published_grid_are_counted():
  experiment = build(**{'refiner.sample.grid': 'published_quadratic', 'refiner.sample.num_steps': 50})
  assert experiment.num_function_evaluations == 49


# Students -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_student_starts_as_the_prediction_of_its_teacher():
  config = students.resolve(config_of('unconditional,learned_variance,distill,debug'))
  stage = config.stages[-1]
  assert config[stage].diffusion.variance == 'fixed'
  assert config[stage].sample.variance == 'large'
  first = next(name for name in config.stages if name.startswith('distill'))
  experiment = experiments.build(config, first)
  assert experiment.teacher.variance == 'learned'
  read = frozen_of(experiment)
  state = experiment.start(jax.jit(experiment.init)(jax.random.key(0)), read)
  params = state.networks['denoiser'].params
  np.testing.assert_array_equal(params['conv_out']['kernel'], read['teacher']['conv_out']['kernel'][..., :1])
  y, t = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), jnp.full(2, 0.4)
  own = {**read, 'denoiser': params}
  np.testing.assert_allclose(
    experiment.student.denoiser.output(own, y, t, {}), experiment.teacher.output(own, y, t, {}), atol=1e-5
  )


# Configs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'name', ['afhq256', 'celeba256', 'celeba64', 'celebahq128', 'cifar10', 'digits', 'emoji64', 'fashion_mnist',
           'lsun_church256']
)  # fmt: skip
@pytest.mark.parametrize('variant', ['learned_variance', 'unconditional,latent_diffusion,learned_variance'])
def test_every_config_has_the_variant(name, variant):
  config = importlib.import_module(f'configs.{name}').get_config(variant)
  experiment = experiments.build(config, 'refiner')
  assert experiment.denoiser.variance == 'learned'
  assert experiment.settings['variance'] == 'learned'
  assert experiment.denoiser.model.module.learned_variance


@pytest.mark.parametrize(
  ('name', 'parameters', 'shape'),
  some_slow(
    [('celeba256', 274_056_163, (64, 64, 3)), ('lsun_church256', 294_966_916, (32, 32, 4))], 'celeba256'
  ),
)
def test_published_latent_diffusion(name, parameters, shape):
  config = importlib.import_module(f'configs.{name}').get_config('unconditional,latent_diffusion')
  experiment = experiments.build(config, 'refiner')
  params = jax.eval_shape(experiment.denoiser.model.init, jax.random.key(0))
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters
  assert experiment.space.shape == shape


@pytest.mark.parametrize(
  ('variant', 'changes', 'message'),
  [
    (LEARNED, {'diffusion.schedule': 'cosine'}, r"needs a table of steps.*'cosine' is continuous"),
    ('debug', {'sample.variance': 'learned'}, r"sample.variance = 'learned' needs a network trained"),
    ('debug', {'loss.objective': 'bound'}, r"loss.objective = 'bound' needs diffusion.variance"),
    (LEARNED, {'loss.time_sampler': 'loss_second_moment'}, r"loss.time_sampler = .* 'hybrid' use"),
    (LEARNED, {'loss.vlb_weight': -1.0}, r'loss.vlb_weight must be >= 0'),
    (LEARNED, {'sample.bound_steps': 1}, r'bound_steps must be 0 .* or >= 2, got 1'),
    (LEARNED, {'sample.bound_steps': 1001}, r'bound_steps must be at most the 1000 steps'),
    (
      'debug',
      {'sample.grid': 'leading', 'sample.num_steps': 25, 'sample.bound_steps': 41},
      r'^config.refiner: sample.bound_steps is 41, but no stride .* near it 40 and 42 exist',
    ),
    ('debug', {'sample.grid': 'leading', 'sample.num_steps': 37}, r'num_steps is 37, but no stride'),
    ('debug', {'sample.grid': 'published_uniform', 'sample.t_start': 0.5}, r'sample.t_start must be 1'),
    ('debug', {'sample.grid': 'leading', 'diffusion.schedule': 'cosine'}, r'this schedule is continuous'),
    ('debug', {'diffusion.variance': 'often'}, r'diffusion.variance'),
  ],
)
def test_what_does_not_go_together(variant, changes, message):
  with pytest.raises(UserError, match=message):
    build(variant, **{f'refiner.{field}': value for field, value in changes.items()})


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('diffusion.variance', 'learned', r"diffusion.variance = 'learned' is not distilled"),
    ('sample.grid', 'leading', r"sample.grid = 'leading' starts below t = 1"),
  ],
)
def test_what_a_student_cannot_have(field, value, message):
  config = students.resolve(config_of('unconditional,distill,debug'))
  stage = config.stages[-1]
  with config.unlocked():
    config.update_from_flattened_dict({f'{stage}.{field}': value})
  with pytest.raises(UserError, match=message):
    experiments.build(config, stage)
