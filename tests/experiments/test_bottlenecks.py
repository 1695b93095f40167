"""Codes between an autoencoder's halves: ids in and out, what is in use, and when the players learn."""

import functools
import importlib
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from some_slow import some_slow

from vaediff import experiments
from vaediff.data import pixels
from vaediff.errors import UserError
from vaediff.experiments import base, bottlenecks
from vaediff.models import codebook
from vaediff.models.functional import Model
from vaediff.run import config as configs
from vaediff.run import earlier, same_run, usage
from vaediff.spaces import encoders, tokenizers

ROOT = pathlib.Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(pathlib.Path(__file__).parent)]
from random_parameters import made  # noqa: E402

SMALL = {'model.channels': 4, 'model.codebook_size': 8}


def section(variant='vqvae', **changes):
  config = importlib.import_module('configs.digits').get_config(f'{variant},debug')
  stage = config.stages[-1]
  changes = {**SMALL, **changes}
  config.update_from_flattened_dict(
    {name if name.startswith('data.') else f'{stage}.{name}': value for name, value in changes.items()}
  )
  return config


def build(variant='vqvae', **changes):
  config = section(variant, **changes)
  return experiments.build(config, config.stages[-1])


def images(count, seed=0):
  return jnp.asarray(np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 1), np.uint8))


def in_use(model, params, x, size):
  """The parameters with codes that are near vectors of these images, so that many are in use."""
  z = jax.jit(lambda params, x: encoders.encode(model, params, x, None))(params, x)
  return {**params, encoders.CODES: codebook.data_init(z, jax.random.key(9), size).codes * 1.01}


# Ids in and out ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('normalized', [False, True])
def test_the_image_of_ids_is_the_reconstruction_bit_for_bit_and_embedded_ids_are_found_again(normalized):
  levels = {'model.channel_multipliers': (1, 1)}
  config = section(**{'model.normalized_codes': normalized, 'model.inner_channels': 6, **levels})
  experiment = experiments.build(config, 'vqvae')
  tokenizer = tokenizers.tokenizer_of(config, 'vqvae', '', 'tokenizer.stage')
  x = pixels.to_unit_range(images(4))
  params = in_use(experiment.autoencoder, made(experiment.autoencoder, 3), x, 8)
  (ids,) = tokenizer.codes(params, x)
  assert tokenizer.grids == ((4, 4),) and ids.shape == (4, 4, 4)
  assert ids.dtype == jnp.int32 and len(np.unique(ids)) > 4 and tokenizer.sizes == (8,)
  decoded = tokenizer.decode(params, (ids,))
  np.testing.assert_array_equal(decoded, experiment.reconstruct(params, x, None)[0])
  given = experiment.observe({'autoencoder': params}, {}, x)
  keys = base.sampling_keys(jax.random.split(jax.random.key(0), 4))
  drawn = experiment.sample({'autoencoder': params}, given, keys)['x0']
  np.testing.assert_array_equal(jnp.clip(decoded, -1, 1), drawn)
  embedded = tokenizer.embed(params, (ids,))
  assert embedded.shape[1:] == tokenizer.embedded
  codes = encoders.codes_of(experiment.autoencoder, params)
  np.testing.assert_array_equal(codebook.nearest(embedded, codes), ids)
  lengths = np.linalg.norm(np.asarray([*codes, *given['latents'].reshape(-1, 2)]), axis=-1)
  assert np.allclose(lengths, 1, atol=1e-5) == normalized


@pytest.mark.slow
def test_normalised_codes_do_not_depend_on_their_lengths():
  """They are compared at length 1, so that no average of them can run away."""
  experiment = build(**{'model.normalized_codes': True})
  x = pixels.to_unit_range(images(2))
  params = in_use(experiment.autoencoder, made(experiment.autoencoder, 3), x, 8)
  longer = {**params, encoders.CODES: params[encoders.CODES] * jnp.arange(1.0, 9.0)[:, None]}
  first, second = (experiment.reconstruct(p, x, None) for p in (params, longer))
  np.testing.assert_allclose(first[0], second[0], atol=1e-5)
  np.testing.assert_allclose(first[2].terms['commitment'], second[2].terms['commitment'], rtol=1e-4)


# What a posterior costs -------------------------------------------------------------------------------


def test_a_normal_bottleneck_has_its_divergence_per_dimension_of_the_image_and_its_deviation():
  """Mean 1 and variance 4: 8 latents of 0.5 (1 + 3 - ln 4) nats each, over the 16 numbers of an image."""
  kl = bottlenecks.Kl(model=Model(module=nn.Dense(1), inputs=()), loss={'kl_weight': 1e-6})
  encoded = lambda *shape: (jnp.ones(shape), jnp.full(shape, np.log(4.0), jnp.float32))
  for count in (1, 3):
    passed = kl.pass_on({}, encoded(count, 2, 2, 2), jnp.zeros((count, 4, 4, 1)), None, None)
    assert float(passed.terms['kl']) == pytest.approx(0.65343, abs=1e-5)
    np.testing.assert_array_equal(passed.z, np.ones((count, 2, 2, 2)))
  x, key = jnp.zeros((1, 128, 128, 1)), jax.random.key(0)
  z = np.asarray(kl.pass_on({}, encoded(1, 64, 64, 4), x, key, jnp.int32(0)).z)
  assert z.mean() == pytest.approx(1, abs=0.08) and z.std() == pytest.approx(2, abs=0.05)
  assert kl.factors(None) == {'kl': 1e-6}


# What is in use ---------------------------------------------------------------------------------------


def test_usage_is_that_of_the_whole_split():
  """A batch caps what it can show: 256 vectors are no 512 codes."""
  found = usage.figures({'top': np.array([8, 4, 2, 1, 1, 0, 0, 0]), 'bottom': np.full(512, 3.0)})
  assert found['top/perplexity'] == pytest.approx(3.66801617, abs=1e-8)
  assert (found['top/used'], found['top/unused']) == (5 / 8, 3)
  assert found['bottom/perplexity'] == pytest.approx(511.9999738, abs=1e-6)
  assert (found['bottom/used'], found['bottom/unused']) == (1, 0)
  first, second = np.eye(4)[0] * 9, np.eye(4)[1] * 9
  assert usage.figures({'a': first + second})['a/perplexity'] == pytest.approx(2, abs=1e-6)


@pytest.mark.slow
def test_codes_are_counted_over_images_and_repetitions_are_not():
  experiment = build()
  image = images(6)
  x = pixels.to_unit_range(image)
  params = in_use(experiment.autoencoder, made(experiment.autoencoder, 3), x, 8)
  read, mask = {'autoencoder': params}, jnp.float32([1, 1, 1, 1, 0, 0])
  counts = experiment.counts(read, {'image': image, 'mask': mask})['codebook']
  ids = codebook.nearest(encoders.encode(experiment.autoencoder, params, x[:4], None), params['codes'])
  np.testing.assert_array_equal(counts, np.bincount(np.asarray(ids).ravel(), minlength=8))
  parts = [
    experiment.counts(read, {'image': image[rows], 'mask': mask[rows]})['codebook']
    for rows in (slice(0, 3), slice(3, 6))
  ]
  np.testing.assert_array_equal(sum(parts), counts)


@pytest.mark.parametrize('kind', some_slow(['ema', 'gradient'], 'ema'))
def test_dead_codes_start_anew_with_their_averages(kind):
  """With 'gradient' there were no counts, and `restart_below` said nothing."""
  experiment = build(**{'loss.codebook': kind, 'optim.ema_decay': 0.9})
  x = pixels.to_unit_range(images(4))
  state = jax.eval_shape(experiment.init, jax.random.key(0))
  network = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state.networks['autoencoder'])
  params = in_use(experiment.autoencoder, made(experiment.autoencoder, 3), x, 8)
  params[encoders.CODES] = params[encoders.CODES].at[5].set(100.0)  # far from every vector
  average = jax.tree.map(lambda leaf: np.asarray(leaf) + 1, params)
  network = network.replace(params=params, ema_params=average)
  book = {'counts': jnp.full(8, 1.005), 'sums': params[encoders.CODES] * 1.005, 'started': jnp.bool_(True)}
  book['counts'] = book['counts'] + jnp.arange(8) * 10.0 * (jnp.arange(8) != 5)
  book['sums'] = params[encoders.CODES] * book['counts'][:, None]

  @jax.jit
  def moved(network, book):
    after = experiment.bottleneck.before_update(network, {'codebook': book}, x, jax.random.key(1))
    return after, encoders.encode(experiment.autoencoder, network.params, x, None)

  (after, extra, metrics), z = moved(network, book)
  z = z.reshape(-1, 2)
  codes = np.asarray(after.params[encoders.CODES])
  hits = np.bincount(np.asarray(codebook.nearest(z, params[encoders.CODES])), minlength=8)
  counts = 0.99 * np.asarray(book['counts']) + 0.01 * hits
  dead = counts < 1
  assert dead[5] and not dead.all() and float(metrics['codebook/dead']) == dead.mean()
  np.testing.assert_allclose(extra['codebook']['counts'], np.where(dead, 1, counts), rtol=1e-5)
  for k in np.flatnonzero(dead):
    assert np.abs(np.asarray(z) - codes[k]).sum(axis=1).min() < 1e-6
    np.testing.assert_array_equal(after.ema_params[encoders.CODES][k], codes[k])
  if kind == 'gradient':
    np.testing.assert_array_equal(codes[~dead], params[encoders.CODES][~dead])
    np.testing.assert_array_equal(after.ema_params[encoders.CODES][~dead], average[encoders.CODES][~dead])


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['ema', 'gradient'])
def test_the_entropy_term_is_in_the_loss_and_moves_no_averaged_code(kind):
  experiment = build(**{'loss.codebook': kind, 'loss.entropy_weight': 0.5})
  params = made(experiment.autoencoder, 3)
  encoded, x = (jnp.ones((1, 2, 2, 2)) * 0.1, None), jnp.zeros((1, 2, 2, 1))

  def entropy(codes):
    passed = experiment.bottleneck.pass_on({**params, encoders.CODES: codes}, encoded, x, None, None)
    return passed.terms['entropy']

  codes = 0.1 * np.random.default_rng(0).standard_normal(params[encoders.CODES].shape)
  gradient = jax.grad(entropy)(jnp.asarray(codes, jnp.float32))
  assert bool(jnp.any(gradient != 0)) == (kind == 'gradient')
  assert experiment.bottleneck.factors(None)['entropy'] == 0.5
  plain = build(**{'loss.codebook': kind}).bottleneck.pass_on(params, encoded, x, None, None)
  assert set(plain.terms) == ({'commitment', 'codebook'} if kind == 'gradient' else {'commitment'})


@pytest.mark.slow
def test_decay_is_of_kernels_alone():
  """It pulled codes that the gradient moves to 0."""
  optim = {'optim.weight_decay': 0.5, 'optim.learning_rate': 0.1, 'loss.codebook': 'gradient'}
  experiment = build('vqgan', **optim, **{'optim_discriminator.weight_decay': 0.5})
  for name, optimizer in (
    ('autoencoder', experiment.optimizer),
    ('discriminator', experiment.optimizer_discriminator),
  ):
    params = jax.tree.map(jnp.ones_like, jax.eval_shape(experiment.networks[name].init, jax.random.key(0)))
    still = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.transform.update(still, optimizer.transform.init(params), params)
    moved = {
      '/'.join(key.key for key in path): float(jnp.abs(leaf).max())
      for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
    }
    kernels = {path for path in moved if path.endswith('/kernel')}
    assert len(kernels) >= 3 and all(moved[path] > 0 for path in kernels)
    others = moved.keys() - kernels
    assert not any(moved[path] for path in others)
    assert name != 'autoencoder' or {'codes', 'encoder/conv_in/bias', 'encoder/norm_out/scale'} <= others


# When the players learn -------------------------------------------------------------------------------


def test_the_discriminator_may_learn_before_it_weighs():
  loss = {'loss.discriminator_start_step': 1, 'loss.adversarial_start_step': 3}
  experiment = build('vqgan', **loss)
  assert [experiment.kind_of(step) for step in range(5)] == ['', 'judged', 'judged', *2 * ['adversarial']]
  late = build('vqgan', **{**loss, 'loss.discriminator_start_step': 50_000})
  assert [late.kind_of(step) for step in range(4)] == ['', '', '', 'adversarial']
  assert {build('vqvae').kind_of(step) for step in (0, 10**6)} == {''}
  assert experiment.notes[-1] == 'the discriminator learns from update 1 on, and weighs from update 3 on'


@pytest.mark.slow
def test_what_it_learns_before_changes_the_discriminator_alone():
  experiment = build('vqgan', **{'loss.adversarial_start_step': 3})
  state = jax.jit(experiment.init)(jax.random.key(0))
  after = {}
  for kind in ('', 'judged'):
    step = jax.jit(functools.partial(experiment.train_step, kind=kind))
    after[kind] = step(state, {}, {'image': images(8)}, jax.random.key(1))
  (plain, without), (judged, metrics) = after[''], after['judged']
  for a, b in zip(*(jax.tree.leaves(s.networks['autoencoder'].params) for s in (plain, judged)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)
  start = state.networks['discriminator'].params
  assert jax.tree.all(jax.tree.map(np.array_equal, start, plain.networks['discriminator'].params))
  assert not jax.tree.all(jax.tree.map(np.array_equal, start, judged.networks['discriminator'].params))
  assert 'loss/discriminator' in metrics and 'loss/discriminator' not in without
  assert 'loss/adversarial' not in metrics


@pytest.mark.slow
def test_the_loss_of_the_discriminator_is_evaluated():
  experiment = build('vqgan')
  read = {name: made(model, 4) for name, model in experiment.networks.items()}
  image = images(4)
  batch = {'image': image, 'mask': jnp.float32([1, 1, 1, 0])}
  found = experiment.eval_step(read, batch, jax.random.key(0))
  x = pixels.to_unit_range(image[:3])
  x_hat = experiment.reconstruct(read['autoencoder'], x, None)[0]
  real, fake = (np.asarray(experiment.discriminator.apply(read['discriminator'], y)) for y in (x, x_hat))
  expected = 0.5 * (np.maximum(1 - real, 0) + np.maximum(1 + fake, 0)).mean()
  assert float(found['discriminator_loss']) == pytest.approx(expected, rel=1e-4)
  assert set(found) <= set(experiment.metrics)


def test_the_rate_that_counts_is_said():
  experiment = build('vqgan', **{'optim.learning_rate': 5.4e-5, 'train.batch_size': 24})
  assert experiment.notes[0] == 'learning rate 5.4e-05, whatever the batch: of 24 images, 2.25e-06 for each'
  assert len(build('vqvae').notes) == 1


@pytest.mark.parametrize(
  ('variant', 'changes', 'message'),
  [
    ('vqgan', {'loss.adversarial_start_step': 4}, r'adversarial_start_step is 4, but train.num_steps is 4: .*'
     'Start at 2, or set loss.adversarial_weight to 0'),
    ('vqgan', {'discriminator.num_layers': 2}, 'discriminator.num_layers is 2, which needs images of 12 '
     'pixels a side, and data.image_size is 8: take 1 layers'),
    ('vqvae', {'data.image_size': 10, 'model.channel_multipliers': (1, 1, 1)}, 'data.image_size is 10, but 3 '
     r'levels \(model.channel_multipliers\) need a multiple of 4, such as 8'),
    ('vqvae', {'model.codebook_size': 512}, 'restart_below is 1, but 512 codes .* share the 128 vectors'),
    ('vqvae', {'model.codebook_size': 512, 'loss.codebook': 'gradient'}, 'loss.restart_below is 1, but 512'),
    ('vqvae', {'model.codebook_size': 0}, "codebook_size is 0; it must be at least 1 for .* 'vq'"),
    ('vqvae', {'model.latent_channels': 1, 'model.normalized_codes': True}, 'channels is 1; numbers of'),
    ('vqvae', {'model.bottleneck': 'kl', 'model.codebook_size': 0, 'model.normalized_codes': True},
     "normalized_codes is True, which is for model.bottleneck 'vq', not 'kl'"),
    ('vqvae', {'model.inner_channels': -1}, 'model.inner_channels must be >= 0, got -1'),
    ('vqvae', {'loss.entropy_weight': -0.1}, 'loss.entropy_weight must be >= 0, got -0.1'),
    (
      'vqvae',
      {'loss.entropy_weight': 0.1, 'train.microbatches': 2},
      'loss.entropy_weight is 0.1 and train.microbatches is 2: .* Set train.microbatches to 1',
    ),
  ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_before_any_program(variant, changes, message, monkeypatch):
  def refused(*args, **kwargs):
    raise AssertionError('a program was made')

  monkeypatch.setattr(jax, 'jit', refused)
  with pytest.raises(UserError, match=message):
    build(variant, **changes)


def test_what_is_no_fault_without_a_discriminator_is_not_refused():
  changes = {'loss.adversarial_start_step': 9, 'discriminator.num_layers': 5, 'loss.adversarial_weight': 0.0}
  assert set(build('vqgan', **changes).networks) == {'autoencoder'}


@pytest.mark.parametrize(
  ('changed', 'value'),
  [('model.codebook_size', 4), ('model.latent_channels', 3), ('loss.codebook', 'gradient')],
)
def test_a_codebook_stays_what_it_is_when_a_stage_goes_on(changed, value, tmp_path):
  stored = section()
  place = tmp_path / 'vqvae' / 'checkpoints' / '4' / 'meta'
  place.mkdir(parents=True)
  meta = {'config': json.loads(configs.to_json(stored)), 'frozen': {}}
  (place / 'metadata').write_text(json.dumps(meta))
  same_run.check_stage(stored, tmp_path / 'vqvae', 'vqvae', training=True)
  with pytest.raises(UserError, match=changed):
    same_run.check_stage(section(**{changed: value}), tmp_path / 'vqvae', 'vqvae', training=True)


# Runs of before ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('loss', 'now'),
  [
    ({'codebook': 'ema'}, {'restart_below': 1.0, 'adversarial_weight': 0.2}),
    ({'codebook': 'gradient'}, {'restart_below': 0.0}),
    ({'adversarial_start_step': 4}, {'adversarial_weight': 0.0, 'adversarial_start_step': 4}),
  ],
)
def test_an_autoencoder_of_before_is_what_it_was(loss, now):
  """Its discriminator learned while it weighed, and codes that the gradient moved did not start anew."""
  config = section('vqgan', **{f'loss.{name}': value for name, value in loss.items()})
  stored = json.loads(configs.to_json(config))
  old = stored['vqgan']
  del old['model']['normalized_codes'], old['model']['inner_channels']
  del old['loss']['entropy_weight'], old['loss']['discriminator_start_step']
  read = configs.from_stored(stored).vqgan
  for name, value in {**loss, **now, 'discriminator_start_step': read.loss.adversarial_start_step}.items():
    assert read.loss[name] == value
  assert (read.model.normalized_codes, read.model.inner_channels, read.loss.entropy_weight) == (False, 0, 0.0)
  again = json.loads(configs.to_json(config))
  assert earlier.upgrade(again)['vqgan'] == json.loads(configs.to_json(config))['vqgan']
