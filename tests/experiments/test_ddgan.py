"""The denoising GAN stage: its two kinds of updates, its losses, devices, and a toy problem."""

import functools
import importlib
import pathlib
import sys

import as_trained
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vaediff import experiments
from vaediff.errors import UserError
from vaediff.machine import sharding
from vaediff.models.functional import Model

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parent.parent.parent)]
toy_gan = importlib.import_module('toy_gan')


def updates(experiment, num_updates, mesh=None, batch_size=32):
  """Returns state and metrics after so many updates of the kinds that the host chooses."""
  images = toy_gan.data(0, 256)
  state = jax.jit(experiment.init)(jax.random.key(0))
  steps = {kind: jax.jit(functools.partial(experiment.train_step, kind=kind)) for kind in ('', 'r1')}
  history = []
  for k in range(num_updates):
    batch = {'image': images[np.arange(k, k + batch_size) % 256]}
    if mesh is not None:
      batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    state, metrics = steps[experiment.kind_of(k)](state, {}, batch, jax.random.key(k))
    history.append(jax.device_get(metrics))
  return state, history


def test_both_kinds_are_chosen_by_the_step():
  experiment = toy_gan.make(2)
  assert [experiment.kind_of(step) for step in range(9)] == ['r1', '', '', '', 'r1', '', '', '', 'r1']
  state, batch = jax.jit(experiment.init)(jax.random.key(0)), {'image': jnp.asarray(toy_gan.data(0, 32))}
  step = jax.jit(experiment.train_step, static_argnums=4)
  slopes = {kind: float(step(state, {}, batch, jax.random.key(1), kind)[1]['r1']) for kind in ('', 'r1')}
  assert slopes['r1'] > 0 == slopes['']  # the kind is an argument: R1 is taken where it is 'r1' alone
  without = toy_gan.make(2, loss={'r1_gamma': 0.0, 'r1_every_steps': 4, 'reconstruction': 'none'})
  assert {without.kind_of(step) for step in range(9)} == {''}


@pytest.mark.slow
def test_metrics_are_the_same_in_both_kinds_and_r1_is_kept_between():
  state, history = updates(toy_gan.make(2), 5)
  assert len({frozenset(metrics) for metrics in history}) == 1
  assert history[0]['r1'] == history[1]['r1'] == history[3]['r1'] != history[4]['r1']
  assert float(state.extra['r1']) == history[4]['r1'] > 0
  assert int(state.step) == 5
  average, now = (
    jax.tree.leaves(t)[0] for t in (state.eval_params['generator'], state.networks['generator'].params)
  )
  assert np.abs(average - now).max() > 0
  assert state.networks['discriminator'].ema_params is None


class OfTheNext(nn.Module):
  """A discriminator that reads its second argument alone."""

  @nn.compact
  def __call__(self, x_t, t, x_next, condition=None, *, deterministic=True):
    return nn.Dense(1, name='out')(x_next.reshape(len(x_next), -1) ** 3)[:, 0]


@pytest.mark.slow
def test_r1_has_no_part_in_the_second_argument():
  judge = toy_gan.make(2).discriminator
  blind = Model(module=OfTheNext(), inputs=judge.inputs)
  _, history = updates(toy_gan.make(2, discriminator=blind, discriminator_float32=blind), 1)
  assert history[0]['r1'] == 0.0 and history[0]['grad_norm/discriminator'] > 0
  _, history = updates(toy_gan.make(2), 1)
  assert history[0]['r1'] > 0


def test_losses_are_what_they_are_called():
  _, history = updates(
    toy_gan.make(2, loss={'r1_gamma': 0.0, 'r1_every_steps': 1, 'reconstruction': 'linear'}), 3
  )
  for k, metrics in enumerate(history):
    assert metrics['reconstruction_weight'] == pytest.approx(1 - k / 1000)
    total = metrics['loss/adversarial'] + metrics['reconstruction_weight'] * metrics['loss/reconstruction']
    assert metrics['loss'] == pytest.approx(total, rel=1e-5)


class Nothing(nn.Module):
  """A generator that draws zero."""

  @nn.compact
  def __call__(self, x_next, t, z, condition=None, *, deterministic=True):
    return jnp.zeros_like(x_next)


class Mean(nn.Module):
  """A discriminator whose logit is the mean of its first argument."""

  @nn.compact
  def __call__(self, x_t, t, x_next, condition=None, *, deterministic=True):
    return jnp.mean(x_t, axis=(1, 2, 3))


def simple(num_steps):
  """The stage of such players; x0 is to be 2."""
  known = toy_gan.make(num_steps)
  judge = Model(module=Mean(), inputs=known.discriminator.inputs)
  generator = Model(module=Nothing(), inputs=known.generator.inputs)
  return toy_gan.make(num_steps, generator=generator, discriminator=judge, discriminator_float32=judge)


TWO = np.full((8, 1, 1, 2), 2, np.float32)


def test_the_discriminator_is_to_say_more_of_real_than_of_fake_with_a_small_slope():
  """At t = 0 real is x0, of logit 2, and fake is 0; gamma is 0.05, and |grad D|^2 of a mean of two 1/2."""
  experiment = simple(1)

  @functools.partial(jax.jit, static_argnums=0)
  def run(regularised, rows):
    return experiment.discriminator_loss({}, {}, rows, jax.random.key(3), regularised=regularised)

  apart = np.log1p(np.exp(-2)) + np.log(2)
  for regularised, added in ((False, 0), (True, 0.5 * 0.05 * 0.5)):
    loss, metrics = run(regularised, {'x0': TWO})
    assert metrics['loss/discriminator'] == pytest.approx(apart, abs=1e-3)
    assert loss - metrics['loss/discriminator'] == pytest.approx(added, abs=1e-5)
    assert metrics['logits/real'] == pytest.approx(2, abs=1e-2) and metrics['logits/fake'] == 0
  assert metrics['r1'] == pytest.approx(0.5)


def test_the_generators_state_is_judged_and_its_image_compared():
  experiment = simple(2)

  @jax.jit
  def run(rows, weight):
    loss, metrics = experiment.generator_loss({}, {}, weight, rows, jax.random.key(3))
    return loss, metrics, experiment.fake({}, rows, jax.random.key(3))

  loss, metrics, drawn = jax.device_get(run({'x0': TWO}, 0.25))
  assert set(drawn['t']) == {0, 1} and not np.any(drawn['x0_hat'])
  logits = np.mean(drawn['x_t_hat'], axis=(1, 2, 3))
  deception = np.mean(np.log1p(np.exp(-logits)))
  assert abs(deception - np.log(2)) > 0.02  # what an image of zeros would get
  assert metrics['loss/adversarial'] == pytest.approx(deception, rel=1e-5)
  assert metrics['loss/reconstruction'] == 2
  assert loss == pytest.approx(deception + 0.25 * 2, rel=1e-5)


def test_the_generator_is_held_in_the_discriminators_loss():
  experiment = toy_gan.make(2)
  rows = {'x0': jnp.asarray(toy_gan.data(0, 8), jnp.float32) / 100}
  params, judge = map(as_trained.params_of, (experiment.generator.init, experiment.discriminator.init))

  def loss(params):
    return experiment.discriminator_loss(judge, params, rows, jax.random.key(3), regularised=False)[0]

  assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params)))


@pytest.mark.slow
def test_one_device_equals_eight():
  one, _ = updates(toy_gan.make(4), 5)
  eight, _ = updates(toy_gan.make(4), 5, mesh=sharding.make_mesh(digits('ddgan').mesh))
  for name in ('generator', 'discriminator'):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
      one.networks[name].params,
      eight.networks[name].params,
    )


@pytest.mark.slow
def test_a_state_that_was_stored_goes_on_as_if_it_had_not_been():
  whole, _ = updates(toy_gan.make(2), 6)
  experiment = toy_gan.make(2)
  images, state = toy_gan.data(0, 256), updates(toy_gan.make(2), 3)[0]
  stored = jax.tree.map(np.asarray, state)  # what a checkpoint holds: both optimizers, average, last R1
  state = jax.tree.map(jnp.asarray, stored)
  for k in range(3, 6):
    step = jax.jit(functools.partial(experiment.train_step, kind=experiment.kind_of(k)))
    state, _ = step(state, {}, {'image': images[np.arange(k, k + 32)]}, jax.random.key(k))
  jax.tree.map(
    np.testing.assert_array_equal, jax.tree.map(np.asarray, state), jax.tree.map(np.asarray, whole)
  )


@pytest.mark.long
def test_four_steps_cover_the_modes():
  """Four steps cover all 25 modes, where one step, a plain GAN, drops some; prints both.

  By how much depends on R1: of one and four steps with gamma 0.01 cover 22 and 24 modes, with 0.05 24 and 25,
  and with 0.3 both cover all (12,000 updates, seed 0).
  """
  found = {}
  for num_steps in (1, 4):
    experiment = toy_gan.stable(num_steps, 12_000)
    found[num_steps] = toy_gan.covered(experiment, toy_gan.train(experiment, 12_000, 256, 0))
    print(
      f'T = {num_steps}: {found[num_steps][0]} of 25 modes, {found[num_steps][1]:.3f} within 4 deviations'
    )
  assert found[4][0] == 25
  assert found[1][0] < 25


# By config ----------------------------------------------------------------------------------------


def digits(variant, **changes):
  config = importlib.import_module('configs.digits').get_config(f'{variant},debug')
  config.update_from_flattened_dict(changes)
  return config


SHAPES = {'ddgan': (8, 8, 1), 'wavelet': (4, 4, 4), 'latent': (4, 4, 2), 'adversarial_refiner': (8, 8, 1)}


@pytest.mark.parametrize('variant', SHAPES)
def test_spaces_by_config(variant):
  experiment = experiments.build(digits(variant), 'ddgan')
  assert experiment.inputs['noise'].shape == SHAPES[variant]
  given = {'noise', 'x0_vae', 'z'} if variant == 'adversarial_refiner' else {'noise'}
  assert set(experiment.inputs) == given
  assert experiment.num_function_evaluations == 4
  assert set(experiment.frozen) == {
    'latent': {'autoencoder', 'latents'}, 'adversarial_refiner': {'vae', 'prior'}
  }.get(variant, set())  # fmt: skip


@pytest.mark.parametrize(
  ('variant', 'changes', 'message'),
  [
    ('ddgan', {'ddgan.space': 'fourier'}, "space is 'fourier'; valid: pixel, wavelet, latent"),
    (
      'ddgan',
      {'ddgan.model.network': 'unet'},
      "model.network is 'unet'; valid: ncsnpp, wavelet_ncsnpp, uvit",
    ),
    (
      'ddgan',
      {'ddgan.diffusion.condition': 'formulation2'},
      "diffusion.condition is 'formulation2'; valid: none, formulation1",
    ),
    (
      'adversarial_refiner',
      {'ddgan.diffusion.x0_vae_source': 'precomputed'},
      "diffusion.x0_vae_source is 'precomputed'; valid: sample, mean",
    ),
    ('ddgan', {'ddgan.loss.r1_every_steps': 0}, 'loss.r1_every_steps must be >= 1, got 0'),
    ('ddgan', {'ddgan.loss.reconstruction': 'sigmoid'}, "loss.reconstruction is 'sigmoid'; valid: none"),
    ('ddgan', {'ddgan.diffusion.num_steps': 0}, 'diffusion.num_steps must be >= 1, got 0'),
    ('ddgan', {'ddgan.train.batch_size': 6}, 'train.microbatches is 6: it must be a multiple'),
    ('ddgan', {'ddgan.optim_discriminator.ema_decay': 0.9}, 'only the generator is averaged, got 0.9'),
    (
      'ddgan',
      {'ddgan.optim.end_learning_rate': 1.0},
      r'end_learning_rate must be in \[0, optim.learning_rate\]',
    ),
    ('latent', {'ddgan.model.bounded': True}, 'model.bounded = True .* cannot reach'),
    ('latent', {'ddgan.autoencoder.scaling': 'tanh'}, "bottleneck = 'none', got 'kl'"),
    ('latent', {'ddgan.autoencoder.stage': 'vae'}, "is 'vae', which is no autoencoder stage of this config"),
    ('latent', {'ddgan.autoencoder.decoder_stage': 'vae'}, 'which is no light decoder'),
    ('adversarial_refiner', {'ddgan.vae.stage': 'data'}, "vae.stage is 'data', which is no VAE stage"),
  ],
)
def test_bad_settings_are_named(variant, changes, message):
  with pytest.raises(UserError, match=message):
    experiments.build(digits(variant, **changes), 'ddgan')
