"""The stage of VQ-VAE-2: its codes at every level, its loss, and reconstruction by level."""

import dataclasses
import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff import experiments
from vaediff.data import pixels
from vaediff.errors import UserError
from vaediff.evaluation import codebooks
from vaediff.experiments.base import sampling_keys
from vaediff.machine import sharding
from vaediff.models import codebook
from vaediff.modes import reconstruct, train
from vaediff.run import trained
from vaediff.spaces import hierarchies, tokenizers

pytestmark = pytest.mark.xdist_group('hierarchy')  # one worker: the tests share what is dear


def config_of(**changes):
  """Three levels of images of 16 pixels: grids of 1x1, 2x2 and 4x4."""
  config = importlib.import_module('configs.digits').get_config('vqvae2,debug')
  config.data.image_size = 16
  changes = {f'vqvae2.{name}': value for name, value in changes.items()}
  config.update_from_flattened_dict({'vqvae2.model.num_levels': 3, **changes})
  return config


def build(**changes):
  return experiments.build(config_of(**changes), 'vqvae2')


def build_levels(levels):
  config = config_of(**{'model.num_levels': levels})
  config.data.image_size = 32
  return hierarchies.hierarchy_model(config.vqvae2.model, config.data)


def images(count, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 1), np.uint8)


STEPS = {}
"""By the number of a stage: its compiled update, which holds the stage."""


def updates(experiment, count, state=None, first=0, mesh=None):
  state = jax.jit(experiment.init)(jax.random.key(0)) if state is None else state
  step, history = STEPS.setdefault(id(experiment), jax.jit(experiment.train_step)), []
  for k in range(first, count):
    batch = {'image': images(8, k)}
    if mesh is not None:
      batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    state, metrics = step(state, {}, batch, jax.random.key(k))
    history.append(jax.device_get(metrics))
  return state, history


def params_of(state):
  return state.networks['hierarchy'].params


@pytest.fixture(scope='module')
def decayed():
  """With averages of all kinds and decay, none of which may move the codes; three updates, one and two."""
  experiment = build(**{'optim.ema_decay': 0.9, 'optim.weight_decay': 0.5, 'optim.learning_rate': 1e-2})
  one, history = updates(experiment, 1)
  three, more = updates(experiment, 3, one, first=1)
  return experiment, one, three, [*history, *more]


@pytest.mark.slow
def test_the_codes_of_every_level_start_at_vectors_of_the_first_batch(decayed):
  """Of the vectors that the codes above give, as they are by then."""
  experiment = build(**{'loss.codebook_decay': 0.999999, 'loss.restart_below': 0.0})
  state = jax.jit(experiment.init)(jax.random.key(0))
  x = pixels.to_unit_range(jnp.asarray(images(8)))
  network, books, metrics = jax.jit(experiment.move_codes)(state, x, jax.random.key(3))
  found = {}

  def seen(level, z):
    name = experiment.names[level]
    codes, rows = network.params[hierarchies.codes_key(name)], np.asarray(z).reshape(-1, 4)
    found[name] = np.linalg.norm(np.asarray(codes)[:, None] - rows, axis=-1).min(axis=1)
    found[name] /= np.linalg.norm(rows - rows.mean(axis=0), axis=-1).mean()
    return codebook.lookup(codes, codebook.nearest(z, codes))

  hierarchies.walk(experiment.hierarchy, params_of(state), x, seen)
  assert list(found) == ['top', 'middle', 'bottom']
  for name, distances in found.items():
    assert distances.max() < 1e-3, name
    assert bool(books[name]['started'])
    assert 0 < metrics[f'codebook/{name}/used'] <= 1 <= metrics[f'codebook/{name}/perplexity'] <= 8
    before = params_of(state)[hierarchies.codes_key(name)]
    assert np.abs(network.params[hierarchies.codes_key(name)] - before).max() > 1e-3
  # none starts anew in a second update
  again, _, _ = jax.jit(experiment.move_codes)(
    state.replace(networks={'hierarchy': network}, extra={'codebook': books}), x, jax.random.key(4)
  )
  for name in experiment.names:
    key = hierarchies.codes_key(name)
    np.testing.assert_allclose(again.params[key], network.params[key], rtol=1e-3, atol=1e-6)


def test_only_averages_move_the_codes(decayed):
  experiment, one, three, history = decayed
  moved, _, _ = jax.jit(experiment.move_codes)(
    one, pixels.to_unit_range(jnp.asarray(images(8, 1))), jax.random.split(jax.random.key(1), 3)[1]
  )
  two, _ = updates(experiment, 2, one, first=1)
  for name in experiment.names:
    key = hierarchies.codes_key(name)
    np.testing.assert_allclose(params_of(two)[key], moved.params[key], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(params_of(three)[key], three.networks['hierarchy'].ema_params[key])
  terms = [f'loss/commitment/{name}' for name in experiment.names]
  for metrics in history:
    expected = metrics['loss/reconstruction'] + 0.25 * sum(metrics[term] for term in terms)
    assert metrics['loss'] == pytest.approx(expected, rel=1e-6)
    assert {f'codebook/{name}/dead' for name in experiment.names} <= metrics.keys()


def test_a_state_that_was_stored_goes_on_as_if_it_had_not_been(decayed):
  experiment, one, three, _ = decayed
  stored = jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, one))
  assert set(stored.extra['codebook']) == {'top', 'middle', 'bottom'}
  state, _ = updates(experiment, 3, stored, first=1)
  jax.tree.map(np.testing.assert_array_equal, state, three)


@pytest.mark.slow
def test_gradients_reach_every_part_but_the_codes(decayed):
  experiment, one, _, _ = decayed
  x = pixels.to_unit_range(jnp.asarray(images(8)))
  grads = jax.jit(jax.grad(lambda params: experiment.losses(params, x)[0]))(params_of(one))
  for name, part in grads.items():
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(part))
    assert (largest == 0) if name.startswith('codes_') else largest > 0, name


@pytest.mark.slow
def test_parts_of_a_batch_and_eight_devices_are_the_batch(decayed):
  experiment, one, _, history = decayed
  changes = {'optim.ema_decay': 0.9, 'optim.weight_decay': 0.5, 'optim.learning_rate': 1e-2}
  mesh = sharding.make_mesh(config_of().mesh)
  assert mesh.size == 8
  others = {
    'parts': updates(build(**changes, **{'train.microbatches': 4}), 1),
    'devices': updates(experiment, 1, mesh=mesh),
  }
  for what, (state, [metrics]) in others.items():
    for name, value in history[0].items():
      assert metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-7), (what, name)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
      state.extra['codebook'],
      one.extra['codebook'],
    )


# Reconstruction by level --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_level_that_is_left_out_is_its_mean_code_or_zeros(decayed):
  _, _, three, _ = decayed
  params, x = params_of(three), pixels.to_unit_range(jnp.asarray(images(4)))
  usage = {f'level_{level}': np.linspace(0, 0.25, 8).astype(np.float32) for level in range(3)}
  read = {'hierarchy': params, tokenizers.FREQUENCIES: usage}
  keys, images_of = sampling_keys(jax.random.split(jax.random.key(0), 4)), {}
  for fill in ('mean', 'zeros'):
    experiment = build(**{'sample.fill': fill})
    assert set(experiment.for_sampling) == ({tokenizers.FREQUENCIES} if fill == 'mean' else set())
    ids = experiment.observe(read, {}, x)
    assert {name: value.shape[1:] for name, value in ids.items()} == {
      name: struct.shape for name, struct in experiment.inputs.items()
    }
    images_of |= experiment.sample(read, ids, keys)
    assert list(experiment.titles) == [f'x0_{fill}_below_top', f'x0_{fill}_below_top_middle', 'x0']
  assert set(images_of) == {
    'x0', 'x0_mean_below_top', 'x0_mean_below_top_middle', 'x0_zeros_below_top', 'x0_zeros_below_top_middle'
  }  # fmt: skip
  mean = usage['level_2'] @ np.asarray(params['codes_bottom'])
  levels = (('top', 'codes_0'), ('middle', 'codes_1'))
  vectors = [params[hierarchies.codes_key(name)][ids[own]] for name, own in levels]
  for fill, vector in (('mean', mean), ('zeros', np.zeros(4))):
    bottom = jnp.broadcast_to(jnp.asarray(vector, jnp.float32).reshape(1, 1, 1, 4), (4, 4, 4, 4))
    carried = hierarchies.join(experiment.hierarchy, params, [*vectors, bottom])
    expected = jnp.clip(hierarchies.decode(experiment.hierarchy, params, carried), -1, 1)
    np.testing.assert_allclose(images_of[f'x0_{fill}_below_top_middle'], expected, atol=1e-6)
  assert float(jnp.abs(images_of['x0_mean_below_top'] - images_of['x0_zeros_below_top']).max()) > 1e-5
  assert float(jnp.abs(images_of['x0_mean_below_top'] - images_of['x0_mean_below_top_middle']).max()) > 1e-5
  deepest = dataclasses.replace(experiment, hierarchy=build_levels(4))  # results are sorted by name
  assert list(deepest.partial) == sorted(deepest.partial) and list(deepest.partial.values()) == [1, 2, 3]
  alone = experiment.alone()
  assert list(alone.sample({'hierarchy': params}, ids, keys)) == ['x0'] and not alone.for_sampling


def test_evaluation_is_of_the_ids_alone(decayed):
  """The figure is that of the images that the stage draws of its ids."""
  experiment, _, three, _ = decayed
  read, image = {'hierarchy': params_of(three)}, images(4)
  x = pixels.to_unit_range(jnp.asarray(image))
  mask = jnp.array([1.0, 1.0, 0.0, 1.0])
  found = experiment.eval_step(read, {'image': jnp.asarray(image), 'mask': mask}, jax.random.key(0))
  keys = sampling_keys(jax.random.split(jax.random.key(0), 4))
  drawn = experiment.alone().sample(read, experiment.observe(read, {}, x), keys)['x0']
  errors = jnp.mean(jnp.square(drawn - x), axis=(1, 2, 3)) / 4
  assert float(found['mse']) == pytest.approx(float((errors * mask).sum() / 3), rel=1e-5)
  assert set(found) == {'loss', 'mse'} < set(experiment.metrics)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'model.num_levels': 0}, r'config.vqvae2: model.num_levels must be >= 1, got 0'),
    ({'model.num_levels': 5}, r'config.vqvae2: model.num_levels must be <= 4, got 5'),
    ({'model.num_levels': 4}, r'data.image_size is 16, .* multiple of 32, such as 32, or set'),
    ({'sample.fill': 'median'}, "sample.fill is 'median'; valid: mean, zeros"),
    (
      {'loss.restart_below': 1.0},
      r'the level of 1x1 codes: loss.restart_below is 1, but 8 codes .* share the 8 vectors of a batch',
    ),
  ],
)
def test_bad_settings_are_named(changes, message, monkeypatch):
  monkeypatch.setattr(jax, 'jit', None)  # before any program
  with pytest.raises(UserError, match=message):
    build(**changes)


@pytest.mark.parametrize(
  ('name', 'grids'),
  [('digits', (1, 2)), ('fashion_mnist', (4, 8)), ('emoji64', (4, 8, 16)), ('celeba256', (32, 64))],
)
def test_data_sets_have_the_levels_that_their_sides_allow(name, grids):
  config = importlib.import_module(f'configs.{name}').get_config('vqvae2')
  assert config.stages == ('vqvae2',)
  experiment = experiments.build(config, 'vqvae2')
  assert tuple(struct.shape for struct in experiment.inputs.values()) == tuple((side, side) for side in grids)


# On real images ----------------------------------------------------------------------------------

FASHION = pathlib.Path('/usr/share/datasets/fashion-mnist')


@pytest.mark.long
@pytest.mark.skipif(not FASHION.exists(), reason='the idx files of Fashion-MNIST are not here')
def test_two_levels_of_fashion_mnist_are_better_than_clustered_patches(tmp_path, one_device):
  """0.0087 is the error of k-means of raw 4x4 patches, with as many codes on the same grid as the bottom."""
  config = importlib.import_module('configs.fashion_mnist').get_config('idx,small,vqvae2')
  config.data.data_dir = str(tmp_path / 'data')
  config.reconstruct.num_images = 2000
  train.run_stages(config, tmp_path / 'run', ('vqvae2',))
  opened = trained.Trained(config, tmp_path / 'run', 'vqvae2', sharding.make_mesh(config.mesh))
  errors = {**reconstruct.reconstruct(opened), **reconstruct.reconstruct(opened.with_settings(fill='zeros'))}
  assert errors['mse/x0'] < 0.0087
  for fill in ('mean', 'zeros'):
    assert errors[f'mse/x0_{fill}_below_top'] >= 1.5 * errors['mse/x0']
  figures = codebooks.figures(opened)
  for name in ('top', 'bottom'):
    assert figures[f'codebook/{name}/perplexity'].value >= 8
  model, params = opened.experiment.hierarchy, opened.params['hierarchy']
  data, labels = opened.eval_images(8)
  seen = opened.observe(data, labels)
  ids = tuple(jnp.asarray(seen[name]) for name in opened.experiment.inputs)
  image = hierarchies.decode(model, params, hierarchies.embed(model, params, ids))
  for level in range(2):
    without = hierarchies.embed(model, params, ids, {level: jnp.zeros(8)})
    assert float(jnp.abs(hierarchies.decode(model, params, without) - image).mean()) > 0.01
