"""Relaxed codes of an autoencoder: gradients, schedules, hard codes afterwards, logit-Laplace, refusals."""

import functools
import importlib
import itertools
import math
import pathlib
import sys

import as_trained
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from some_slow import some_slow

from vaediff import experiments
from vaediff.data import pixels
from vaediff.errors import UserError
from vaediff.experiments import base, pixel_loss
from vaediff.machine import cost, sharding
from vaediff.modes import describe
from vaediff.run import earlier
from vaediff.spaces import tokenizers

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent.parent))
LAPLACE = {'model.pixel_map': 0.1, 'loss.pixel': 'logit_laplace', 'loss.pixel_weight': 1.0}


def made(name='digits', variant='dvae,debug', **changes):
  config = importlib.import_module(f'configs.{name}').get_config(variant)
  config.dvae.update_from_flattened_dict(changes)
  return config


def built(**changes):
  return experiments.build(made(**changes), 'dvae')


def images(count, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 1), np.uint8)


@pytest.fixture(scope='module')
def opened():
  """A stage, with the logits of a network that has learned something: not near zero."""
  experiment = built()
  params = as_trained.params_of(experiment.autoencoder.init)
  return experiment, {**params, 'codes': 10 * params['codes']}  # they start at a deviation of 1


# Training -------------------------------------------------------------------------------------------


def test_gradients_reach_encoder_codes_and_head_relaxed_and_straight_through(opened):
  experiment, params = opened
  hard = experiment.bottleneck
  hard = type(hard)(model=hard.model, loss={**hard.loss, 'straight_through': True})
  x = pixels.to_unit_range(jnp.asarray(images(2)))

  def loss(params, bottleneck):
    logits = experiment.autoencoder.apply(params, x, method='logits')
    z = bottleneck.relaxed(params, logits, jax.random.key(1), 0.5)
    x_hat = experiment.autoencoder.apply(params, z, method='decode')
    return jnp.mean(experiment.pixel_loss(x, x_hat, x_hat)), z

  grad = jax.grad(loss, has_aux=True)
  both = jax.jit(lambda params: (grad(params, experiment.bottleneck), grad(params, hard)))(params)
  for gradients, _ in both:
    for name in ('encoder', 'codes', 'logits_head', 'decoder'):
      assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients[name])), name
  distance = np.abs(np.asarray(both[1][1])[..., None, :] - np.asarray(params['codes'])).max(-1).min(-1)
  assert distance.max() < 1e-5  # one code each
  distance = np.abs(np.asarray(both[0][1])[..., None, :] - np.asarray(params['codes'])).max(-1).min(-1)
  assert distance.min() > 1e-3  # mixtures


@pytest.mark.slow
def test_what_is_passed_on_is_drawn_in_training_alone(opened):
  experiment, params = opened
  logits = experiment.autoencoder.apply(params, pixels.to_unit_range(jnp.asarray(images(4))), method='logits')
  run = functools.partial(experiment.bottleneck.pass_on, params, logits, None)
  first, second = (run(jax.random.key(k), jnp.int32(0)) for k in range(2))
  assert np.any(first.z != second.z)
  still = run(None, None)
  np.testing.assert_array_equal(still.z, params['codes'][jnp.argmax(logits, -1)])
  for passed in (first, second, still):
    assert 0 < passed.terms['kl_per_token'] <= math.log(16)
    assert 1 <= passed.metrics['codebook/perplexity'] <= 16
  assert first.metrics['codebook/tau'] == 1.0 and first.metrics['codebook/kl_weight'] == 0.0


def test_temperature_and_weight_follow_their_schedules():
  bottleneck = built(
    **{'loss.tau_steps': 150_000, 'loss.kl_token_weight': 6.6 / 192, 'loss.kl_warmup_steps': 5000}
  ).bottleneck
  np.testing.assert_allclose(bottleneck.tau(jnp.int32(37_500)), 0.862706, atol=1e-6)
  weights = [bottleneck.factors(step)['kl_per_token'] for step in (0, 2500, 5000, 10**6, None)]
  np.testing.assert_allclose(weights, [0, 0.0171875, 0.034375, 0.034375, 0.034375], rtol=1e-6)


@pytest.mark.parametrize(
  ('kind', 'network'),
  some_slow(list(itertools.product(['', 'adversarial'], ['taming', 'openai'])), ('adversarial', 'openai')),
)
def test_a_density_trains_beside_a_discriminator(network, kind):
  """Traced alone: shapes of outputs, images and gradients fit, and the adaptive weight finds its kernel."""
  experiment = built(
    **LAPLACE, **{'loss.adversarial_weight': 0.5, 'model.network': network, 'train.microbatches': 2}
  )
  state = jax.eval_shape(experiment.init, jax.random.key(0))
  step = functools.partial(experiment.train_step, kind=kind)
  batch = {'image': jax.ShapeDtypeStruct((8, 8, 8, 1), jnp.uint8)}
  after, metrics = jax.eval_shape(step, state, {}, batch, jax.random.key(0))
  assert jax.tree.structure(after) == jax.tree.structure(state)
  assert ('adaptive_weight' in metrics) == bool(kind)
  assert {'codebook/tau', 'codebook/kl_weight', 'loss/kl_per_token'} <= metrics.keys()


# Afterwards -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_evaluation_reads_hard_codes_and_reports_relaxed_ones_beside(opened):
  experiment, params = opened
  batch = {'image': jnp.asarray(images(4)), 'mask': jnp.array([1.0, 1, 1, 0])}
  step = jax.jit(experiment.eval_step)
  found, other = (step({'autoencoder': params}, batch, jax.random.key(k)) for k in range(2))
  assert found.keys() == {'loss', 'mse', 'mse_relaxed', 'kl_per_token'} <= experiment.metrics.keys()
  for name in ('loss', 'mse', 'kl_per_token'):
    assert found[name] == other[name]
  assert found['mse_relaxed'] != other['mse_relaxed']
  x = pixels.to_unit_range(batch['image'])
  ids = jnp.argmax(experiment.autoencoder.apply(params, x, method='logits'), -1)
  x_hat = experiment.autoencoder.apply(params, params['codes'][ids], method='decode')
  error = jnp.mean(jnp.square(jnp.clip(x_hat, -1, 1) - x)[:3]) / 4
  np.testing.assert_allclose(found['mse'], error, rtol=1e-4)
  assert 0 <= found['kl_per_token'] <= math.log(16)
  counts = experiment.counts({'autoencoder': params}, batch)['codebook']
  np.testing.assert_array_equal(counts, np.bincount(np.ravel(ids[:3]), minlength=16))


def test_a_tokenizer_has_the_ids_and_they_are_the_image_that_is_reconstructed(opened):
  experiment, params = opened
  found = tokenizers.tokenizer_of(made(), 'dvae', '', 'tokenizer.stage')
  assert (found.grids, found.sizes, found.embedded) == (((4, 4),), (16,), (4, 4, 4))
  x = pixels.to_unit_range(jnp.asarray(images(4)))

  @jax.jit
  def seen(params, x):
    logits = experiment.autoencoder.apply(params, x, method='logits')
    return found.codes(params, x), logits, experiment.observe({'autoencoder': params}, {}, x)

  ids, logits, given = seen(params, x)
  np.testing.assert_array_equal(ids[0], np.argmax(logits, -1))
  assert len(np.unique(ids[0])) > 2 and ids[0].dtype == jnp.int32
  keys = base.sampling_keys(jax.random.split(jax.random.key(1), 4))
  again = experiment.sample({'autoencoder': params}, given, keys)['x0']
  np.testing.assert_array_equal(jnp.clip(found.decode(params, ids), -1, 1), again)


# The logit-Laplace ----------------------------------------------------------------------------------


def loss_of(outputs, **changes):
  fields = {'kind': 'logit_laplace', 'weight': 1.0, 'margin': 0.1, 'least_scale': math.exp(-5)}
  outputs = jnp.full((1, 2, 2, 2), jnp.array(outputs))
  x = jnp.full((1, 2, 2, 1), -0.5)
  return pixel_loss.PixelLoss(**{**fields, **changes})(x, jnp.zeros((1, 2, 2, 1)), outputs)[0]


def test_the_pixel_loss_is_the_density_with_a_floor_below_its_scale():
  np.testing.assert_allclose(loss_of((-0.5, -2.0), least_scale=1e-9), -0.3012972, atol=1e-6)
  np.testing.assert_allclose(loss_of((-0.5, -2.0)), -0.3012972, atol=1e-6)
  logit = math.log(0.3 / 0.7)  # x' of -0.5, exactly known: without a floor its density has no end
  assert loss_of((logit, -50.0), least_scale=1e-20) < -40
  np.testing.assert_allclose(loss_of((logit, -50.0)), math.log(2) - 5 + math.log(0.21), atol=1e-4)
  np.testing.assert_allclose(loss_of((0.0, 0.0), kind='l2', weight=10.0), 2.5)
  np.testing.assert_allclose(loss_of((0.0, 0.0), kind='l1', weight=1.0), 0.5)


# Configs --------------------------------------------------------------------------------------------


def test_the_published_one_has_its_parameters_schedules_and_notes(capsys):
  config = made('celeba256', 'dvae')
  row = describe.describe(config, ('dvae',))[0]
  assert row['parameters'] == 97_616_006
  loss, optim = config.dvae.loss, config.dvae.optim
  assert (loss.pixel, config.dvae.model.pixel_map) == ('logit_laplace', 0.1)
  assert (loss.tau_start, loss.tau_end, loss.tau_steps, loss.kl_warmup_steps) == (1, 1 / 16, 150_000, 5000)
  assert (optim.learning_rate, optim.end_learning_rate, optim.weight_decay) == (1e-4, 1.25e-6, 1e-4)
  shown = capsys.readouterr().out
  assert 'dvae: logits: 1024 tokens x 8192 codes, float32: 17,179.9 MB for 512 images' in shown
  assert 'dvae: KL: weight 0.034375 per token: beta = 6.6 with the 192 numbers' in shown


def test_the_published_relaxed_vqgan_has_its_parameters_and_schedule():
  config = importlib.import_module('configs.celeba256').get_config('vqgan_f8_gumbel')
  model = experiments.build(config, 'vqgan').autoencoder
  assert cost.num_parameters(jax.eval_shape(model.init, jax.random.key(0))) == 68_995_971
  loss = config.vqgan.loss
  assert (loss.tau_start, loss.tau_end, loss.tau_steps) == (0.9, 1e-6, 1_000_001)
  assert (loss.kl_token_weight, loss.straight_through) == (1e-8, True)
  found = tokenizers.tokenizer_of(config, 'vqgan', '', 'tokenizer.stage')
  assert (found.grids, found.sizes) == (((32, 32),), (8192,))


@pytest.mark.parametrize(
  ('name', 'grid', 'size', 'pixel'),
  [
    ('digits', (4, 4), 64, 'l2'),
    ('fashion_mnist', (8, 8), 256, 'l2'),
    ('emoji64', (8, 8), 256, 'logit_laplace'),
    ('celeba256', (32, 32), 8192, 'logit_laplace'),
  ],
)
def test_every_data_set_has_its_codes(name, grid, size, pixel):
  config = made(name, 'dvae')
  found = tokenizers.tokenizer_of(config, 'dvae', '', 'tokenizer.stage')
  assert (found.grids, found.sizes, config.dvae.loss.pixel) == ((grid,), (size,), pixel)
  assert config.stages == ('dvae',)
  if pixel == 'l2':
    assert config.dvae.model.logits_scale == 0.1 and config.dvae.loss.kl_token_weight == 0.01
    assert config.dvae.loss.pixel_weight == 10 and config.dvae.model.pixel_map == 0
    assert config.dvae.loss.tau_steps < config.dvae.train.num_steps
  experiment = experiments.build(config, 'dvae')
  params = jax.eval_shape(experiment.autoencoder.init, jax.random.key(0))
  assert params['codes'].shape == (size, config.dvae.model.latent_channels)
  assert cost.num_parameters(params['logits_head']) % size == 0


def test_the_memory_of_the_logits_is_that_of_the_batch():
  notes = built(**{'train.batch_size': 64}).notes
  assert notes[-2].startswith('logits: 16 tokens x 16 codes, float32: 0.1 MB for 64 images')
  assert notes[-1].startswith('KL: weight 0.01 per token: beta = 0.04 with the 4 numbers of the image')
  config = importlib.import_module('configs.digits').get_config('vq,debug')
  assert not any('logits' in note for note in experiments.build(config, 'autoencoder').notes)


def test_an_autoencoder_stored_before_relaxed_codes_reads_as_it_was():
  now = importlib.import_module('configs.digits').get_config('vq').autoencoder.to_dict()
  before = {'model': dict(now['model']), 'loss': dict(now['loss'])}
  for part, settings in earlier.RELAXED.items():
    for name, value in settings.items():
      assert before[part].pop(name) == value
  stored = {**now, **before}
  config = earlier.upgrade({'stages': ('autoencoder',), 'data': {'num_classes': 10}, 'autoencoder': stored})
  assert config['autoencoder']['model'] == now['model'] and config['autoencoder']['loss'] == now['loss']


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'loss.tau_end': 0.0}, 'loss.tau_end must be > 0, got 0.0'),
    ({'loss.tau_end': -0.5}, 'loss.tau_end must be > 0, got -0.5'),
    ({'loss.tau_start': 0.0}, 'loss.tau_start must be > 0, got 0.0'),
    ({'loss.tau_end': 2.0}, r'loss.tau_end is 2, above loss.tau_start = 1: .* \(0, loss.tau_start\]'),
    ({'loss.pixel': 'logit_laplace'}, "'logit_laplace' and model.pixel_map is 0: .* as 0.1, or loss.pixel"),
    ({'model.pixel_map': 0.1}, "model.pixel_map is 0.1, .* but loss.pixel is 'l2', .* to logit_laplace"),
    ({'model.pixel_map': 0.5}, 'model.pixel_map must be <= 0.49, got 0.5'),
    ({**LAPLACE, 'train.spike_factor': 3.0}, 'train.spike_factor is 3: .* below zero'),
    ({'model.codebook_size': 1}, "model.codebook_size is 1; it must be at least 2 for .* 'gumbel'"),
    ({'model.codebook_size': 0}, 'model.codebook_size is 0; it must be at least 2'),
    ({'model.network': 'dalle'}, "model.network is 'dalle'; valid: taming, openai"),
    ({'model.network': 'openai', 'model.dropout': 0.1}, "model.dropout is 0.1, but model.network = 'openai'"),
    (
      {'model.bottleneck': 'vq', 'model.network': 'openai'},
      "model.bottleneck is 'vq', but .* 'gumbel' alone",
    ),
    ({'loss.least_scale': 0.0}, 'loss.least_scale must be > 0, got 0.0'),
    ({'model.logits_scale': 0.0}, 'model.logits_scale must be > 0, got 0.0'),
  ],
)
def test_mistakes_are_refused_by_name_before_any_program(changes, message, monkeypatch):
  monkeypatch.setattr(jax, 'jit', lambda *args, **kwargs: pytest.fail('a program was made'))
  with pytest.raises(UserError, match=f'^config.dvae: {message}' if 'must be' in message[:40] else message):
    built(**changes)


def test_a_stage_without_codes_is_no_tokenizer():
  config = importlib.import_module('configs.digits').get_config('latent')
  with pytest.raises(UserError, match="bottleneck is 'kl', which has no codes; with codes: vq, gumbel"):
    tokenizers.tokenizer_of(config, 'autoencoder', '', 'tokenizer.stage')


@pytest.mark.slow
def test_one_device_equals_eight():
  """Noise is of each image, wherever it lies; Adam's eps leaves what has no gradient where it is."""
  experiment, states = built(**{'optim.eps': 1e-4}), []
  for count in (1, 8):
    where = sharding.batch_sharding(sharding.make_mesh(made().mesh, jax.devices()[:count]))
    state, step = jax.jit(experiment.init)(jax.random.key(0)), jax.jit(experiment.train_step)
    for number in range(2):
      batch = jax.device_put({'image': images(8, number)}, where)
      state, metrics = step(state, {}, batch, jax.random.key(number))
    states.append((jax.device_get(state.networks['autoencoder'].params), float(metrics['loss'])))
  (one, loss), (eight, other) = states
  assert loss == pytest.approx(other, rel=1e-5) and len(where.device_set) == 8
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, eight)
