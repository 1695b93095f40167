"""The diffusion's contracts: one path for both formulations, drops, guidance, flips, batch independence."""

import dataclasses
import importlib
import itertools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from some_slow import some_slow

from vaediff import experiments
from vaediff.conditions import prior
from vaediff.conditions.base import Conditions
from vaediff.errors import UserError
from vaediff.experiments import base
from vaediff.models.unet import convert_formulation
from vaediff.run import guard
from vaediff.types import Values

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from random_parameters import frozen_of, made, values_of  # noqa: E402

SMALL = {'refiner.model.channel_multipliers': (1,), 'refiner.model.attention_resolutions': ()}


def build(variant='debug', **changes):
  config = importlib.import_module('configs.digits').get_config(variant)
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return experiments.build(config, 'refiner')


def read_of(experiment):
  return {**frozen_of(experiment), 'denoiser': made(experiment.denoiser.model, 0)}


def keys(count, seed=5):
  return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(count))


def images(count=6):
  return jnp.asarray(np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), np.uint8))


def noise(count=6, seed=2):
  return jax.random.normal(jax.random.key(seed), (count, 8, 8, 1))


def sample(experiment, read, given, rows):
  own = base.sampling_keys(rows)
  return experiment.sample(read, {**experiment.draw(read, own, jnp.arange(len(rows))), **given}, own)


# Both formulations ------------------------------------------------------------------------------------


@pytest.mark.parametrize('sampler', some_slow(['ddpm', 'ddim', 'heun', 'dpmpp_2m'], 'ddpm'))
def test_formulations_are_one_model_in_two_coordinates(sampler):
  """T6: with the first convolution converted, the same noise gives the same images, clipping included."""
  second = build('formulation2,debug', **{'refiner.sample.sampler': sampler})
  first = build('formulation1,debug', **{'refiner.sample.sampler': sampler})
  read = read_of(second)
  converted = {**read, 'denoiser': convert_formulation(read['denoiser'], to=1, image_channels=1)}
  z = jax.random.normal(jax.random.key(1), (4, 16))
  run = jax.jit(lambda read: sample(first, read, {'z': z}, keys(4))['x0'])
  a = jax.jit(lambda read: sample(second, read, {'z': z}, keys(4))['x0'])(read)
  np.testing.assert_allclose(a, run(converted), atol=1e-4)
  assert float(np.max(np.abs(a - run(read)))) > 1e-2


@pytest.mark.slow
def test_formulation2_with_a_black_hole_for_condition_is_formulation1():
  """x0_vae = 0 shifts nothing, so both give the same loss bit for bit."""
  losses = []
  for variant in ('formulation1,debug', 'formulation2,debug'):
    experiment = build(variant)
    read = read_of(experiment)
    values = experiment.conditions.values({}, {'x0_vae': jnp.zeros((4, 8, 8, 1)), 'z': jnp.zeros((4, 16))})
    x0 = jax.random.normal(jax.random.key(8), (4, 8, 8, 1))
    losses.append(experiment.denoiser.losses(read, x0, values, jax.random.key(9), training=False))
  np.testing.assert_array_equal(*losses)


# The PCA of a code --------------------------------------------------------------------------------------


def changed(params, seed=1):
  """Noise on all that a network has, but for what reads the PCA."""
  rng = np.random.default_rng(seed)
  moved = jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape, np.float32), params)
  return {**moved, **{name: params[name] for name in params if name == 'pca_mlp'}}


@pytest.mark.slow
def test_with_the_pca_it_begins_as_the_network_without():
  """Its parameters but for the projection are those of the other, and so is its loss, whatever the code."""
  others = {'refiner.diffusion.condition': 'none', 'refiner.model.scale_shift_norm': True}
  denoiser = build('pca,debug', **others).denoiser
  plain = build('unconditional,debug', **others).denoiser
  params = changed(jax.jit(denoiser.model.init)(jax.random.key(0)))
  without = {name: value for name, value in params.items() if name != 'pca_mlp'}
  shapes = lambda tree: jax.tree.map(jnp.shape, tree)
  assert shapes(without) == shapes(jax.eval_shape(plain.model.init, jax.random.key(0)))
  y0 = jax.random.normal(jax.random.key(3), (4, 8, 8, 1))
  losses = [
    jax.jit(lambda params, values, one=one: one.losses(
      {'denoiser': params}, y0, values, jax.random.key(4), training=False
    ))(own, values)
    for one, own, values in (
      (denoiser, params, {'pca': 4 * jnp.sign(y0.reshape(4, -1)[:, :16])}),
      (plain, without, {}),
    )
  ]  # fmt: skip
  np.testing.assert_allclose(*losses, atol=1e-6)


@pytest.mark.slow
def test_an_update_with_a_code_that_is_not_finite_is_left_out(one_device):
  """Norms of gradients are logged, and a bad update is skipped: nothing of it stays."""
  experiment = build('formulation2,pca,debug')
  read = frozen_of(experiment)
  section = importlib.import_module('configs.digits').get_config('debug').refiner.train
  section.on_bad_step = 'skip'
  update = jax.jit(guard.guarded(experiment.train_step, section))
  state = jax.jit(guard.with_counts(experiment.init))(jax.random.key(0))
  batch = {'image': images(8), 'label': jnp.zeros(8, jnp.int32)}
  good, metrics = update(state, read, batch, jax.random.key(1))
  norms = [value for name, value in metrics.items() if 'norm' in name]
  assert norms and all(np.isfinite(value) and value > 0 for value in norms)
  broken = {**read, 'pca': {**read['pca'], 'mean': read['pca']['mean'] * np.float32('nan')}}
  bad, metrics = update(good, broken, batch, jax.random.key(2))
  assert metrics['skipped_updates'] == 1 and not np.isfinite(metrics['loss'])
  for before, after in zip(jax.tree.leaves(good.networks), jax.tree.leaves(bad.networks), strict=True):
    np.testing.assert_array_equal(before, after)


# Sampling ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('sampler', ['ddpm', 'ddim'])
def test_image_i_depends_on_its_key_and_condition_alone(sampler):
  experiment = build(**{'refiner.sample.sampler': sampler, 'refiner.sample.eta': 0.5})
  read = read_of(experiment)
  z = jax.random.normal(jax.random.key(1), (16, 16))
  run = jax.jit(lambda given, rows: sample(experiment, read, given, rows))
  whole = run({'z': z}, keys(16))['x0']
  for size in (1, 3):
    part = run({'z': z[:size]}, keys(16)[:size])['x0']
    np.testing.assert_allclose(part, whole[:size], atol=2e-5)


def test_a_sample_starts_from_a_code_of_the_prior_and_noise():
  """The key of an image is split: one half draws its conditions, the other its noise and its sampler."""
  experiment = build()
  assert {name: x.shape for name, x in experiment.inputs.items()} == {
    'z': (16,), 'x0_vae': (8, 8, 1), 'noise': (8, 8, 1),
  }  # fmt: skip
  mixture = {'weights': jnp.ones(1), 'means': jnp.full((1, 16), 3.0), 'diag': jnp.full((1, 16), 0.1)}
  read = {**read_of(experiment), 'prior': mixture}
  drawn = experiment.draw(read, base.sampling_keys(keys(400)), jnp.arange(400))
  assert set(drawn) == {'z', 'noise'}
  of_conditions, rest = jnp.moveaxis(jax.vmap(jax.random.split)(keys(400)), 1, 0)
  np.testing.assert_array_equal(drawn['z'], prior.draw(mixture, of_conditions, 16))
  of_noise = jax.vmap(lambda key: jax.random.split(key)[0])(rest)
  expected = jax.vmap(lambda key: jax.random.normal(key, (8, 8, 1)))(of_noise)
  np.testing.assert_array_equal(drawn['noise'], expected)
  assert drawn['z'].mean() == pytest.approx(3.0, abs=0.01)
  assert drawn['noise'].std() == pytest.approx(1.0, abs=0.02)


@pytest.mark.slow
def test_what_is_given_takes_the_place_of_what_is_drawn():
  experiment = build()
  read = read_of(experiment)
  own = base.sampling_keys(keys(3))
  given = experiment.draw(read, own, jnp.arange(3))
  image = noise(3).clip(-1, 1)
  plain, other = (
    experiment.sample(read, {**given, **more}, base.sampling_keys(keys(3)))
    for more in ({}, {'x0_vae': image})
  )
  assert list(plain) == ['x0_vae', 'x0']
  np.testing.assert_array_equal(other['x0_vae'], image)
  decoded = experiment.frozen['vae'].model.apply(read['vae'], given['z'], method='decode')
  np.testing.assert_allclose(plain['x0_vae'], decoded, atol=1e-6)
  assert float(jnp.abs(plain['x0'] - other['x0']).max()) > 1e-3


@pytest.mark.slow
def test_refine_start_begins_at_the_noised_vae_image():
  """With t_start near 0 and a network that predicts eps = 0, the result is x0_vae itself."""
  experiment = build(**{'refiner.sample.t_start': 0.001, 'refiner.sample.num_steps': 1})
  read = read_of(experiment)
  # the zero-initialised output, and a VAE whose images are in the range
  read |= {'denoiser': experiment.denoiser.model.init(jax.random.key(0))}
  read |= {'vae': experiment.frozen['vae'].model.init(jax.random.key(1))}
  result = sample(experiment, read, {'z': jnp.ones((4, 16))}, keys(4))
  np.testing.assert_allclose(result['x0'], result['x0_vae'], atol=0.06)


# Dropped conditions and guidance ----------------------------------------------------------------------


@pytest.fixture(scope='module')
def guided():
  """A diffusion that is trained with dropped conditions, what it reads, and its output at one state."""
  experiment = build('formulation2,guided,z,debug', **SMALL, **{'refiner.sample.clip': 'none'})
  read = read_of(experiment)

  @jax.jit
  def output(values: Values, drop: Values):
    return experiment.denoiser.output(read, noise(3), jnp.full(3, 0.5), values, drop)

  return experiment, read, output


def constant(value, count=3):
  return {'x0_vae': jnp.full((count, 8, 8, 1), value), 'z': jnp.full((count, 16), value)}


def dropped(mask):
  return {'x0_vae': jnp.asarray(mask), 'z': jnp.asarray(mask)}


def test_guidance_reads_y_without_shift_and_the_nulls(guided):
  """A dropped example of Formulation 2 does not see x0_vae at all: neither as input nor as shift."""
  _, _, output = guided
  some = [True, False, True]
  a, b = (output(constant(value), dropped(some)) for value in (0.3, -0.8))
  np.testing.assert_array_equal(a[::2], b[::2])
  assert float(jnp.abs(a[1] - b[1]).max()) > 1e-3
  everywhere = [output(constant(value), dropped([True] * 3)) for value in (0.3, -0.8)]
  np.testing.assert_array_equal(*everywhere)
  kept = output(constant(0.3), dropped([False] * 3))
  assert float(jnp.max(jnp.abs(kept - everywhere[0]))) > 1e-3
  np.testing.assert_array_equal(kept, output(constant(0.3), {}))  # what is not named is kept


def test_a_dropped_example_has_no_shift(guided):
  experiment, _, _ = guided
  denoiser, y, values = experiment.denoiser, noise(3), constant(0.3)
  some = dropped([True, False, True])
  state = denoiser.state(y, values, some)
  np.testing.assert_array_equal(state[::2], y[::2])
  np.testing.assert_array_equal(state[1], y[1] + values['x0_vae'][1])
  np.testing.assert_array_equal(denoiser.state(y, values, {}), y + values['x0_vae'])
  # the shift belongs to x0_vae: dropping something else keeps it
  np.testing.assert_array_equal(denoiser.state(y, values, {'z': some['z']}), y + values['x0_vae'])
  first = build('formulation1,guided,z,debug').denoiser
  assert first.state(y, values, some) is y


@pytest.mark.slow
def test_to_go_without_a_condition_is_to_drop_it_everywhere(guided):
  experiment, read, output = guided
  assert experiment.conditions.droppable == ('vae',) and experiment.can_be_guided
  without = experiment.conditions.without(('vae',), 3)
  assert set(without) == {'x0_vae', 'z'}
  np.testing.assert_array_equal(output(constant(0.3), without), output(constant(0.3), dropped([True] * 3)))
  assert experiment.conditions.without((), 3) == experiment.conditions.without(('label',), 3) == {}
  y, t = noise(3), jnp.full(3, 0.5)
  of_mask = dataclasses.replace(experiment.denoiser, conditions=Dropping(experiment.conditions.each))
  for names in ((), ('vae',)):
    a = experiment.denoiser.x0_hat(read, constant(0.3), names)(y, t)
    b = of_mask.x0_hat(read, constant(0.3), names)(y, t)
    np.testing.assert_array_equal(a, b)


class Dropping(Conditions):
  """Names every mask, also of what is kept."""

  def without(self, names, count):
    return dropped([bool(names)] * count)


@pytest.mark.parametrize(
  ('sample_settings', 'weight', 'calls'),
  some_slow([
    ({'guidance_weight': 0.0}, 0.0, 1),
    ({'guidance_weight': 0.7}, 0.7, 2),
    ({'guidance_weight': 0.0, 'guidance': (('vae', 0.5),)}, 0.5, 2),
    ({'guidance_weight': 0.0, 'guidance': (('vae', -0.25),)}, -0.25, 2),
    ({'guidance_weight': 0.7, 'guidance': (('vae', 0.5),)}, 1.2, 3),
  ], {'guidance_weight': 0.7, 'guidance': (('vae', 0.5),)}),
)  # fmt: skip
def test_guidance_is_a_sum_of_terms(guided, sample_settings, weight, calls):
  _, read, _ = guided
  changes = {f'refiner.sample.{name}': value for name, value in sample_settings.items()}
  experiment = build('formulation2,guided,z,debug', **SMALL, **{'refiner.sample.clip': 'none', **changes})
  denoiser, values = experiment.denoiser, values_of(experiment, read, 3)
  assert denoiser.calls_per_step == calls
  assert experiment.num_function_evaluations == calls * experiment.settings['num_steps']
  y, t = noise(3), jnp.array([0.2, 0.5, 0.9])

  @jax.jit
  def all_of(read, values):
    predicted, dropped = denoiser.x0_hat(read, values), denoiser.x0_hat(read, values, ('vae',))
    return predicted(y, t), dropped(y, t), denoiser.denoise(read, values)(y, t)

  x0_hat, null, found = all_of(read, values)
  np.testing.assert_allclose(found, (1 + weight) * x0_hat - weight * null, atol=1e-6, rtol=1e-6)
  assert float(jnp.abs(x0_hat - null).max()) > 1e-3


def test_a_weight_among_the_values_takes_the_place_of_the_configured_one(guided):
  experiment, read, _ = guided
  assert experiment.settings['guidance_weight'] > 0
  denoiser, values = experiment.denoiser, values_of(experiment, read, 3)
  y, t, w = noise(3), jnp.array([0.2, 0.5, 0.9]), jnp.array([0.0, 1.0, 3.0])

  @jax.jit
  def all_of(read, values, w):
    predicted, dropped = denoiser.x0_hat(read, values), denoiser.x0_hat(read, values, ('vae',))
    return predicted(y, t), dropped(y, t), denoiser.denoise(read, {**values, 'guidance': w})(y, t)

  x0_hat, null, got = all_of(read, values, w)
  weights = w[:, None, None, None]
  np.testing.assert_allclose(got, (1 + weights) * x0_hat - weights * null, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize('given', [('label', 1.0), ('vae', -1.0), ('vae',), ('vae', float('nan'))])
def test_guidance_that_cannot_be_is_refused(given):
  message = r'refiner: sample.guidance must be pairs \(condition, weight > -1\) of conditions .*, vae; got'
  with pytest.raises(UserError, match=message):
    build('guided,debug', **{'refiner.sample.guidance': (given,)})


def test_guidance_needs_a_condition_that_training_drops():
  with pytest.raises(UserError, match='of which there are none; got'):
    build('debug', **{'refiner.sample.guidance': (('vae', 1.0),)})


@pytest.mark.slow
def test_training_drops_the_conditions_of_some_examples(guided):
  """The loss of a dropped example does not know its condition; evaluation drops none."""
  experiment, read, _ = guided
  changed = dataclasses.replace(experiment.conditions.each[0], dropout=0.5)
  denoiser = dataclasses.replace(experiment.denoiser, conditions=Conditions((changed,)))

  def losses(value, training):
    key = jax.random.key(3)
    return denoiser.losses(read, noise(32), constant(value, 32), key, training=training)

  kept = np.asarray(losses(0.3, True) != losses(-0.8, True))
  key_drop = jax.random.split(jax.random.key(3), 4)[2]
  np.testing.assert_array_equal(kept, ~np.asarray(jax.random.bernoulli(key_drop, 0.5, (32,))))
  assert 4 < kept.sum() < 28
  assert bool(jnp.all(losses(0.3, False) != losses(-0.8, False)))


# Examples ---------------------------------------------------------------------------------------------


def test_condition_and_image_flip_together():
  experiment = build(**{'refiner.train.flip': True, 'refiner.diffusion.x0_vae_source': 'precomputed'})
  assert set(experiment.stored) == {'x0_vae', 'z'}
  batch = {'image': images(32), 'x0_vae': images(32), 'z': jnp.zeros((32, 16))}
  x0, values = experiment.examples({}, batch, jax.random.key(3), training=True)
  np.testing.assert_array_equal(x0, values['x0_vae'])
  plain, _ = experiment.examples({}, batch, jax.random.key(3), training=False)
  flipped = np.any(np.asarray(x0 != plain), axis=(1, 2, 3))
  assert 4 < flipped.sum() < 28


@pytest.mark.slow
def test_what_is_stored_of_an_image_is_its_mean_code_and_that_decoded():
  experiment = build(**{'refiner.diffusion.x0_vae_source': 'precomputed'})
  read, x = frozen_of(experiment), noise().clip(-1, 1)
  vae = experiment.frozen['vae'].model
  mean, _ = vae.apply(read['vae'], x, method='encode')
  stored = experiment.store(read, {}, x)
  assert set(stored) == set(experiment.stored)
  np.testing.assert_array_equal(stored['z'], mean)
  np.testing.assert_array_equal(stored['x0_vae'], vae.apply(read['vae'], mean, method='decode'))
  assert build().store(read, {}, x) == {}


@pytest.mark.parametrize('source', ['sample', 'mean'])
def test_x0_vae_is_fresh_or_fixed_at_each_step(source):
  experiment = build(**{'refiner.diffusion.x0_vae_source': source})
  read = frozen_of(experiment)
  seen = jax.jit(lambda *args: experiment.examples(*args, training=False)[1]['x0_vae'])
  draws = [seen(read, {'image': images()}, jax.random.key(k)) for k in (0, 1)]
  assert bool(jnp.all(draws[0] == draws[1])) == (source == 'mean')


KINDS = itertools.product(
  ['linear', 'cosine'], ['constant', 'snr', 'truncated_snr', 'min_snr', 'v'], ['eps', 'x0', 'v']
)
SOME = [('linear', 'constant', 'eps'), ('linear', 'truncated_snr', 'x0'), ('cosine', 'min_snr', 'v')]


@pytest.mark.parametrize(('schedule', 'weight', 'prediction'), some_slow(list(KINDS), *SOME))
def test_every_prediction_weight_and_schedule_gives_a_finite_loss(prediction, weight, schedule):
  experiment = build(
    **{
      'refiner.diffusion.prediction': prediction,
      'refiner.diffusion.loss_weight': weight,
      'refiner.diffusion.schedule': schedule,
    },
    **SMALL,
  )
  read = read_of(experiment)
  x0, values = experiment.examples(read, {'image': images()}, jax.random.key(1), training=False)
  lossy = jax.jit(lambda *args: experiment.denoiser.losses(*args, jax.random.key(2), training=True))
  losses = lossy(read, x0, values)
  assert losses.shape == (6,) and bool(jnp.all(jnp.isfinite(losses)))


# Where a network comes from ---------------------------------------------------------------------------


@pytest.mark.slow
def test_a_network_of_the_state_has_a_gradient_where_a_frozen_one_has_none():
  """The same condition, its VAE handed in among what is differentiated: nothing else changes."""
  experiment = build('formulation2,z,debug', **SMALL)
  read = read_of(experiment)

  def loss(params, hold):
    both = {**read, **params, 'vae': hold(params['vae'])}
    key_example, key_loss = jax.random.split(jax.random.key(1))
    y0, values = experiment.examples(both, {'image': images()}, key_example, training=True)
    return jnp.mean(experiment.denoiser.losses(both, y0, values, key_loss, training=True))

  params = {name: read[name] for name in ('denoiser', 'vae')}
  (alone, of_one), (joint, of_both) = (
    jax.jit(jax.value_and_grad(lambda params, hold=hold: loss(params, hold)))(params)
    for hold in (jax.lax.stop_gradient, lambda vae: vae)
  )
  assert float(alone) == pytest.approx(float(joint), rel=1e-6)
  equal = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
  jax.tree.map(equal, of_one['denoiser'], of_both['denoiser'])
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_one['vae']))
  # every leaf, also those of the log variance: z is drawn, and reparameterised
  assert set(of_both['vae']) == {'encoder', 'decoder'}
  assert all(np.any(leaf) for leaf in jax.tree.leaves(of_both['vae']))


@pytest.mark.slow
def test_an_update_changes_its_own_network_alone():
  experiment = build('formulation2,z,debug', **SMALL)
  frozen = frozen_of(experiment)
  state = jax.jit(experiment.init)(jax.random.key(0))
  after, metrics = jax.jit(experiment.train_step)(state, frozen, {'image': images(8)}, jax.random.key(1))
  assert set(after.networks) == {'denoiser'} == set(experiment.networks)
  assert not experiment.networks.keys() & experiment.frozen.keys()
  assert set(metrics) == {'loss', 'grad_norm/denoiser'} and metrics['grad_norm/denoiser'] > 0
  assert int(after.step) == 1 and experiment.kind_of(0) == ''


# Settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'refiner.diffusion.prediction': 'noise'},
      "diffusion.prediction is 'noise'; valid: x0, eps, v",
    ),
    (
      {'refiner.diffusion.condition_dropout': 1.0},
      r'condition_dropout must be in \[0, 1\), got 1.0',
    ),
    ({'refiner.sample.guidance_weight': 1.0}, 'guidance_weight > 0 needs a network trained with'),
    ({'refiner.sample.t_start': 0.0}, r'sample.t_start must be in \(0, 1\], got 0.0'),
    ({'refiner.diffusion.condition': 'none', 'refiner.sample.t_start': 0.5}, 'does not have'),
    (
      {'refiner.optim.schedule': 'step'},
      "optim.schedule must be 'constant', 'cosine' or 'linear', got 'step'",
    ),
    ({'refiner.optim.ema_decay': 1.0}, r'optim.ema_decay must be in \[0, 1\), got 1.0'),
    (
      {
        'refiner.diffusion.x0_vae_source': 'precomputed',
        'refiner.diffusion.z_conditioning': True,
        'refiner.train.flip': True,
      },
      'stored z belongs to the image as it is',
    ),
  ],
)
def test_values_that_cannot_work_are_refused(changes, message):
  with pytest.raises(UserError, match=f'config.refiner: .*{message}'):
    build(**changes)
