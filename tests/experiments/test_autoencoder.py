"""The autoencoder stage: its bottlenecks, codes, players, and the latents that later stages read."""

import functools
import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from vaediff import experiments, spaces
from vaediff.data import pixels, sources
from vaediff.errors import UserError
from vaediff.experiments import autoencoder, base
from vaediff.machine import sharding
from vaediff.models import codebook
from vaediff.models.autoencoder import LAST_KERNEL
from vaediff.run import frozen as frozen_networks
from vaediff.run import guard, measurements
from vaediff.spaces import encoders

sys.path[:0] = [str(pathlib.Path(__file__).parent.parent.parent), str(pathlib.Path(__file__).parent)]
from random_parameters import made  # noqa: E402


def digits(variant='latent', **changes):
  config = importlib.import_module('configs.digits').get_config(f'{variant},debug')
  config.autoencoder.loss.update({'adversarial_weight': 0.5, 'adversarial_start_step': 2})
  config.autoencoder.optim.learning_rate = 1e-4
  config.update_from_flattened_dict(changes)
  return config


def images(count, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 1), np.uint8)


def updates(experiment, num_updates, state=None, first=0, mesh=None):
  state = jax.jit(experiment.init)(jax.random.key(0)) if state is None else state
  history, steps = [], {}
  for k in range(first, num_updates):
    batch = {'image': images(8, k)}
    if mesh is not None:
      batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    kind = experiment.kind_of(k)
    if kind not in steps:
      steps[kind] = jax.jit(functools.partial(experiment.train_step, kind=kind))
    state, metrics = steps[kind](state, {}, batch, jax.random.key(k))
    history.append(jax.device_get(metrics))
  return state, history


@pytest.fixture(scope='module')
def vq():
  """A VQ stage whose discriminator starts at the third update, and its state after four."""
  config = digits('vq', **{'autoencoder.optim.ema_decay': 0.9})
  experiment = experiments.build(config, 'autoencoder')
  return experiment, *updates(experiment, 4)


@pytest.mark.slow
def test_the_discriminator_starts_at_its_step(vq):
  experiment, state, history = vq
  assert [experiment.kind_of(step) for step in range(4)] == ['', '', 'adversarial', 'adversarial']
  assert ['loss/discriminator' in metrics for metrics in history] == [False, False, True, True]
  assert all(np.isfinite(value) for metrics in history for value in metrics.values())
  assert history[-1]['adaptive_weight'] > 0 and int(state.step) == 4


@pytest.mark.slow
def test_codes_start_at_vectors_of_the_first_batch_and_follow_averages(vq):
  experiment, state, history = vq
  start = jax.jit(experiment.init)(jax.random.key(0))
  one, _ = updates(experiment, 1)
  x = pixels.to_unit_range(jnp.asarray(images(8)))
  z = encoders.encode(experiment.autoencoder, start.networks['autoencoder'].params, x, None).reshape(-1, 2)
  codes = one.networks['autoencoder'].params['codes']
  distance = np.linalg.norm(np.asarray(codes)[:, None] - np.asarray(z), axis=-1)
  assert float(distance.min(axis=1).max()) < 0.2 * float(np.linalg.norm(z, axis=-1).mean())
  assert not np.allclose(codes, start.networks['autoencoder'].params['codes'])
  network = state.networks['autoencoder']
  np.testing.assert_array_equal(network.params['codes'], network.ema_params['codes'])
  book = state.extra['codebook']
  np.testing.assert_allclose(book['sums'] / book['counts'][:, None], network.params['codes'], rtol=1e-3)
  assert 0 < history[-1]['codebook/used'] <= 1 < history[-1]['codebook/perplexity'] <= 16


@pytest.mark.slow
def test_codes_can_follow_the_gradient(vq):
  del vq
  experiment = experiments.build(
    digits('vq', **{'autoencoder.loss.codebook': 'gradient', 'autoencoder.loss.adversarial_weight': 0.0}),
    'autoencoder',
  )
  assert set(experiment.networks) == {'autoencoder'}
  one, history = updates(experiment, 1)
  two, _ = updates(experiment, 2, one, first=1)
  before, after = (state.networks['autoencoder'].params['codes'] for state in (one, two))
  assert 1e-6 < float(jnp.abs(before - after).max()) < 1e-3  # one step of Adam
  assert history[0]['loss/codebook'] > 0


@pytest.mark.slow
def test_a_state_that_was_stored_goes_on_as_if_it_had_not_been(vq):
  experiment, whole, _ = vq
  half, _ = updates(experiment, 2)
  state = jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, half))
  state, _ = updates(experiment, 4, state, first=2)
  jax.tree.map(
    np.testing.assert_array_equal, jax.tree.map(np.asarray, state), jax.tree.map(np.asarray, whole)
  )


@pytest.mark.slow
def test_one_device_equals_eight(vq):
  experiment, one, history = vq
  mesh = sharding.make_mesh(digits().mesh)
  eight, others = updates(experiment, 4, mesh=mesh)
  assert mesh.size == 8
  for a, b in zip(history, others, strict=True):
    assert a['codebook/perplexity'] == pytest.approx(b['codebook/perplexity'], rel=1e-4)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
    one.networks['autoencoder'].params,
    eight.networks['autoencoder'].params,
  )


def small(**changes):
  """A VQ stage without noise of any kind, so that parts of a batch see what the whole sees."""
  changes = {'model.channels': 4, 'model.codebook_size': 8, 'optim.ema_decay': 0.9, **changes}
  return experiments.build(
    digits('vq', **{f'autoencoder.{name}': value for name, value in changes.items()}), 'autoencoder'
  )


@pytest.mark.slow
def test_codes_that_follow_the_gradient_are_averaged_like_every_parameter():
  """They were overwritten by the codes themselves, one update behind."""
  changes = {'loss.codebook': 'gradient', 'loss.adversarial_weight': 0.0, 'optim.learning_rate': 1e-2}
  experiment = small(**changes, **{'loss.restart_below': 0.0})
  states = [updates(experiment, 1)[0]]
  for k in (1, 2):
    states.append(updates(experiment, k + 1, states[-1], first=k)[0])
  averages = [np.asarray(state.networks['autoencoder'].ema_params['codes']) for state in states]
  codes = [np.asarray(state.networks['autoencoder'].params['codes']) for state in states]
  for k in (1, 2):
    np.testing.assert_allclose(averages[k], 0.9 * averages[k - 1] + 0.1 * codes[k], atol=1e-6)
    assert np.abs(averages[k] - codes[k]).max() > 1e-3
  # the average starts with the codes that the first batch gave, not with those of the initialisation
  assert np.abs(averages[0] - codes[0]).max() < 0.02


@pytest.fixture(scope='module')
def split():
  """The third update, of both players, of a batch in one part and in four: state and metrics."""
  found = {}
  for parts in (1, 4):
    experiment = small(**{'train.microbatches': parts, 'loss.adversarial_start_step': 0})
    found[parts] = updates(experiment, 1)
  return found


@pytest.mark.slow
def test_the_adaptive_weight_of_a_split_batch_is_that_of_the_batch(split):
  """A mean over parts of ratios of norms is another number."""
  (_, [whole]), (_, [parts]) = split[1], split[4]
  assert parts['adaptive_weight'] == pytest.approx(whole['adaptive_weight'], rel=1e-4)
  for name in ('loss', 'grad_norm/autoencoder', 'loss/adversarial', 'loss/commitment'):
    assert parts[name] == pytest.approx(whole[name], rel=1e-4), name
  assert whole['adaptive_weight'] > 1.0


@pytest.mark.slow
def test_the_codebook_of_a_split_batch_is_that_of_the_batch(split):
  (whole, [metrics]), (parts, [others]) = split[1], split[4]
  for name in ('counts', 'sums'):
    np.testing.assert_allclose(parts.extra['codebook'][name], whole.extra['codebook'][name], rtol=1e-5)
  np.testing.assert_allclose(
    *(state.networks['autoencoder'].params['codes'] for state in (whole, parts)), rtol=1e-5
  )
  for name in ('codebook/used', 'codebook/perplexity', 'codebook/dead'):
    assert metrics[name] == others[name]


@pytest.mark.slow
def test_codes_start_at_vectors_in_the_first_update_that_counts():
  """With on_bad_step = 'skip' and a bad first update they never did."""
  experiment = small(**{'loss.adversarial_weight': 0.0})

  def bad_at_first(state, frozen, batch, key):
    after, metrics = experiment.train_step(state, frozen, batch, key)
    return after, {**metrics, 'loss': jnp.where(state.step == 0, jnp.nan, metrics['loss'])}

  policy = ConfigDict({'on_bad_step': 'skip', 'spike_factor': 0.0})
  step = jax.jit(guard.guarded(bad_at_first, policy))
  start = jax.jit(guard.with_counts(experiment.init))(jax.random.key(0))
  skipped, _ = step(start, {}, {'image': images(8)}, jax.random.key(0))
  params = start.networks['autoencoder'].params
  np.testing.assert_array_equal(skipped.networks['autoencoder'].params['codes'], params['codes'])
  assert int(skipped.step) == 1 and not bool(skipped.extra['codebook']['started'])
  first, _ = step(skipped, {}, {'image': images(8)}, jax.random.key(1))
  assert bool(first.extra['codebook']['started'])
  z = encoders.encode(experiment.autoencoder, params, pixels.to_unit_range(jnp.asarray(images(8))), None)
  known = codebook.data_init(z, jax.random.split(jax.random.split(jax.random.key(1), 4)[1])[0], 8)
  known = codebook.ema_update(known, z, codebook.nearest(z, known.codes), 0.99)
  alive = np.asarray(known.counts) >= 1.0
  assert alive.any()
  codes = np.asarray(first.networks['autoencoder'].params['codes'])
  np.testing.assert_allclose(codes[alive], np.asarray(known.codes)[alive], rtol=1e-5)
  second, _ = step(first, {}, {'image': images(8, 1)}, jax.random.key(2))
  assert np.abs(np.asarray(second.networks['autoencoder'].params['codes']) - codes)[alive].max() < 0.1


@pytest.mark.slow
def test_the_last_kernel_is_the_decoders(vq):
  experiment, state, _ = vq
  params = state.networks['autoencoder'].params
  kernel = autoencoder.last_kernel(params)
  assert LAST_KERNEL[-1] == 'kernel' and kernel.shape[-1] == 1
  doubled = autoencoder.with_last_kernel(params, 2 * kernel)
  np.testing.assert_array_equal(autoencoder.last_kernel(doubled), 2 * kernel)
  assert jax.tree.structure(doubled) == jax.tree.structure(params)
  x = jnp.zeros((1, 8, 8, 1))
  assert (
    float(jnp.abs(experiment.autoencoder.apply(doubled, x) - experiment.autoencoder.apply(params, x)).max())
    > 0
  )


def test_each_player_has_its_own_side_of_the_hinge_loss():
  """The decoder is to raise the logits of reconstructions, the discriminator those of images alone."""
  experiment = experiments.build(digits(), 'autoencoder')
  judge = made(experiment.discriminator, 4)
  x, x_hat = np.random.default_rng(0).uniform(-2, 2, (2, 4, 8, 8, 1)).astype(np.float32)

  @jax.jit
  def both(judge, x, x_hat):
    logits = experiment.discriminator.apply(judge, x), experiment.discriminator.apply(judge, x_hat)
    return experiment.deception(judge, x_hat), experiment.discriminator_loss(judge, x, x_hat), logits

  deception, (loss, metrics), logits = jax.device_get(both(judge, x, x_hat))
  real, fake = logits
  assert abs(real.mean() - fake.mean()) > 1e-2 and abs(fake.mean()) > 1e-2
  assert deception == pytest.approx(-fake.mean(), rel=1e-4)
  expected = 0.5 * (np.maximum(1 - real, 0) + np.maximum(1 + fake, 0)).mean()
  swapped = 0.5 * (np.maximum(1 - fake, 0) + np.maximum(1 + real, 0)).mean()
  assert loss == pytest.approx(expected, rel=1e-4) and abs(expected - swapped) > 1e-2
  assert metrics['logits/real'] == pytest.approx(real.mean(), rel=1e-4)
  assert metrics['logits/fake'] == pytest.approx(fake.mean(), rel=1e-4)


def test_statistics_are_those_of_all_images():
  image = images(9)
  source = sources.ArraySource(images=image, labels=np.zeros(9, np.int32), label_names=(), num_classes=0)

  class Halves(base.Experiment):
    """The latents are the columns of the image, left and right half as two channels, far from zero."""

    networks, init, train_step, eval_step = {}, None, None, None  # it is not trained here

    def observe(self, read, batch, x, key=None):
      assert key.shape == x.shape[:1]  # a posterior's noise is that of the image, whatever the batch
      x = (x[..., 0] + 1) / 2 + 100.0
      return {'latents': jnp.stack([x[:, :, :4], x[:, :, 4:]], axis=-1)}

  mesh = sharding.make_mesh(digits().mesh)
  found = measurements.moments_of_latents(Halves(), {}, source, 8, mesh, 0)
  x = image[..., 0].astype(np.float64) / 255 + 100.0
  expected = np.stack([x[:, :, :4], x[:, :, 4:]], axis=-1)
  for name in measurements.STATISTICS:
    np.testing.assert_allclose(found[name], getattr(expected, name)(axis=(0, 1, 2)), rtol=1e-5)
  assert int(found['count']) == 9


@pytest.mark.slow
@pytest.mark.parametrize('scaling', ['std', 'max', 'tanh'])
def test_scaled_latents_come_back(scaling):
  changes = {'ddgan.autoencoder.scaling': scaling, 'ddgan.model.bounded': scaling != 'std'}
  config = digits('free' if scaling == 'tanh' else 'latent', **changes)
  space = spaces.make_space(config, 'ddgan')
  params = jax.jit(space.source.model.init)(jax.random.key(0))
  statistics = {'mean': [0.5, -1.0], 'std': [0.5, 2.0], 'min': [-3.0, -1.0], 'max': [1.0, 2.0]}
  read = {'autoencoder': params, 'latents': {k: jnp.array(v) for k, v in statistics.items()}}
  x = pixels.to_unit_range(jnp.asarray(images(2)))
  z = jax.jit(lambda params, x: encoders.encode(space.source.model, params, x, None))(params, x)
  y = jax.jit(space.encode)(read, x, None)
  expected = {
    'std': (z - jnp.array([[[[0.5, -1.0]]]])) / jnp.array([[[[0.5, 2.0]]]]),
    'max': z / 3.0,
    'tanh': z,
  }
  np.testing.assert_allclose(y, expected[scaling], atol=1e-5)
  decoded = jax.jit(lambda params, z: encoders.decode(space.source.model, params, z))(params, z)
  np.testing.assert_allclose(jax.jit(space.decode_map)(read, y), decoded, atol=1e-4)
  clipped = jax.jit(space.decode)(read, 10 * y)
  assert set(clipped) == {'x0'} and float(jnp.abs(clipped['x0']).max()) <= 1


def test_what_reads_latents_reads_their_statistics(tmp_path):
  """They are made when they are missing (tests/run/test_measurements.py), but not of nothing."""
  config = digits()
  mesh = sharding.make_mesh(config.mesh)
  experiment = experiments.build(config, 'ddgan')
  statistics = experiment.frozen['latents']
  assert (statistics.stage, statistics.measurement) == ('autoencoder', 'latents')
  with pytest.raises(UserError, match=r'no checkpoint in .*autoencoder/checkpoints: train that stage first'):
    measurements.load(statistics, config, tmp_path, mesh)
  fresh = frozen_networks.fresh(experiment, mesh)
  assert set(fresh) == {'autoencoder', 'latents'}
  assert set(fresh['latents']) == set(measurements.STATISTICS)
  assert all(value.shape == (2,) for value in fresh['latents'].values())


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'autoencoder.loss.pixel': 'huber'}, "loss.pixel is 'huber'; valid: l1, l2"),
    ({'autoencoder.loss.codebook': 'kmeans'}, "loss.codebook is 'kmeans'; valid: ema, gradient"),
    ({'autoencoder.loss.kl_weight': -1.0}, 'loss.kl_weight must be >= 0, got -1.0'),
    ({'autoencoder.loss.perceptual': 'lpips_resnet'}, "LPIPS network 'resnet' is unknown"),
    ({'autoencoder.model.bottleneck': 'fsq'}, "model.bottleneck is 'fsq'; choose one of kl, none, vq"),
    ({'autoencoder.model.codebook_size': 4}, "codebook_size is 4; it must be 0 without 'vq'"),
    (
      {'autoencoder.model.bottleneck': 'vq', 'autoencoder.model.codebook_size': 512},
      r'loss.restart_below is 1, but 512 codes .* share the 128 vectors of a batch',
    ),
  ],
)
def test_bad_settings_are_named(changes, message):
  with pytest.raises(UserError, match=message):
    experiments.build(digits(**changes), 'autoencoder')
