"""A cascade as a run: stages in any order, samples stage by stage, what they were made of."""

import importlib
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vaediff import experiments, modes
from vaediff.errors import UserError
from vaediff.evaluation import networks, sets, sweep
from vaediff.evaluation.measures import Figure
from vaediff.experiments.base import SampleKeys
from vaediff.machine import sharding
from vaediff.modes import checked, train
from vaediff.run import checkpoint, draw, loop
from vaediff.run import config as configs
from vaediff.run.trained import Trained

pytestmark = pytest.mark.xdist_group('cascade')


def made(data, variant='cascade,label,debug', **changes):
  config = importlib.import_module('configs.digits').get_config(variant)
  config.data.data_dir = str(data)
  for stage in ('base', 'sr_8'):
    config[stage].train.update({'num_steps': 2, 'grid_every_steps': 2})
  config.update_from_flattened_dict(changes)
  return config


@pytest.fixture(scope='module')
def one():
  make_mesh = sharding.make_mesh
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'make_mesh', lambda config: make_mesh(config, jax.devices()[:1]))
    yield


@pytest.fixture(scope='module')
def runs(tmp_path_factory, one):
  """The folder in which lies the run of both stages, trained in their order."""
  folder = tmp_path_factory.mktemp('cascade')
  train.run_stages(made(folder / 'data'), folder / 'together', ('base', 'sr_8'))
  return folder


@pytest.fixture(scope='module')
def more(runs):
  """The same with each stage trained for itself: the last alone in its folder, then the first after it."""
  config = made(runs / 'data')
  train.run_stages(config, runs / 'alone', ('sr_8',))
  shutil.copytree(runs / 'alone', runs / 'reverse')
  train.run_stages(config, runs / 'reverse', ('base',))
  return runs


def opened(workdir, stage='sr_8', **changes):
  config = configs.read(workdir)
  config[stage].sample.update(changes)
  return Trained(config, workdir, stage, sharding.make_mesh(config.mesh))


def state_of(workdir, stage):
  config = configs.read(workdir)
  experiment, mesh = experiments.build(config, stage), sharding.make_mesh(config.mesh)
  return checkpoint.Checkpointer(workdir / stage, 9).restore(loop.abstract_state(experiment, mesh))[0]


@pytest.mark.slow
@pytest.mark.parametrize('stage', ['base', 'sr_8'])
def test_the_order_of_training_changes_no_byte(more, stage):
  first, second = (state_of(more / name, stage) for name in ('together', 'reverse'))
  jax.tree.map(np.testing.assert_array_equal, first, second)
  moved = jax.tree.map(lambda leaf: bool(np.any(leaf)), first.networks)
  assert any(jax.tree.leaves(moved))


@pytest.mark.slow
def test_the_last_stage_draws_the_whole_chain(runs):
  trained, base = opened(runs / 'together'), opened(runs / 'together', 'base')
  images, small = trained.draw(np.arange(4)), base.draw(np.arange(4))
  assert list(images) == ['low', 'x0'] and images['x0'].shape == (4, 8, 8, 1)
  assert small['x0'].shape == (4, 4, 4, 1) and small['x0'].std() > 10
  np.testing.assert_array_equal(images['low'], small['x0'].repeat(2, axis=1).repeat(2, axis=2))
  assert (runs / 'together' / 'samples.png').exists()
  assert trained.draws_alone and trained.experiment.titles['low'] == 'low resolution'
  another = trained.draw(np.arange(4), seed=5)
  np.testing.assert_array_equal(another['low'][:, ::2, ::2], base.draw(np.arange(4), seed=5)['x0'])
  assert np.any(another['low'] != images['low'])


@pytest.mark.slow
def test_image_i_is_the_same_among_others(runs):
  trained = opened(runs / 'together')
  whole, part = trained.draw(np.arange(4)), trained.draw(np.array([9, 2, 7, 2]))
  for name, value in whole.items():
    assert np.abs(part[name][1].astype(int) - value[2]).max() <= 1
    assert np.array_equal(part[name][1], part[name][3])


@pytest.mark.slow
def test_one_label_is_that_of_every_stage(runs):
  """What is given to the last stage is given to those before it, where it is the same thing."""
  trained, base = opened(runs / 'together'), opened(runs / 'together', 'base')
  seen = []
  maker = trained.maker(trained.experiment.makers[0])
  drawn = maker.draw
  maker.draw = lambda indices, given, *more, **by_name: (
    seen.append(given) or drawn(indices, given, *more, **by_name)
  )
  label = np.array([7, 7, 1], np.int32)
  trained.draw(np.arange(3), {'label': label})
  trained.draw(np.array([3, 14, 5]))
  assert [given['label'].tolist() for given in seen] == [[7, 7, 1], [3, 4, 5]]
  assert all(set(given) == {'label'} for given in seen)  # each stage starts from noise of its own
  assert set(base.experiment.inputs) == {'label', 'noise'}


@pytest.mark.slow
def test_a_given_image_takes_the_place_of_samples(more):
  trained = opened(more / 'alone')
  low = np.zeros((2, 4, 4, 1), np.float32)
  assert (trained.draw(np.arange(2), {'low': low})['low'] == 128).all()
  with pytest.raises(UserError, match='low-resolution image must be 4 x 4 x 1, .* got 8 x 8 x 1'):
    trained.draw(np.arange(2), {'low': np.zeros((2, 8, 8, 1), np.float32)})


@pytest.mark.slow
def test_without_the_stage_before_it_repeats_images_and_draws_none(more):
  trained = opened(more / 'alone')
  assert not trained.draws_alone
  with pytest.raises(UserError, match='no checkpoint in .*base.*train that stage first'):
    trained.draw(np.arange(2))
  data, labels = trained.eval_images(3)
  again = trained.draw_all(trained.observe(data, labels))
  mean = data.reshape(3, 4, 2, 4, 2, 1).mean(axis=(2, 4))
  assert np.abs(again['low'][:, ::2, ::2] - mean).max() <= 0.5001
  with Image.open(more / 'alone' / 'reconstructions.png') as picture:
    assert np.asarray(picture).std() > 0
  assert not (more / 'alone' / 'samples.png').exists()


@pytest.mark.slow
def test_samples_are_made_of_the_stages_before(more):
  together, alone = opened(more / 'together').made_of, opened(more / 'alone').made_of
  assert together.keys() - alone.keys() == {"the samples of 'base'"}
  assert together["the stage 'sr_8'"] == alone["the stage 'sr_8'"]
  config = configs.read(more / 'together')
  config.base.sample.num_steps = 3
  other = Trained(config, more / 'together', 'sr_8', sharding.make_mesh(config.mesh)).made_of
  name = "the samples of 'base'"
  assert other.pop(name) != together[name]
  assert other == {key: value for key, value in together.items() if key != name}


@pytest.mark.slow
def test_the_stage_before_may_be_of_another_run(more):
  """It is what its own run says, however often it was trained there; how it is sampled is said here."""
  config, base = configs.read(more / 'alone'), opened(more / 'together', 'base', num_steps=3)
  config.base.train.num_steps = 7
  config.base.sample.num_steps = 3
  config.sr_8.conditions.low_resolution.workdir = str(more / 'together')
  trained = Trained(config, more / 'alone', 'sr_8', sharding.make_mesh(config.mesh))
  assert trained.draws_alone
  drawn = trained.draw(np.arange(3))
  np.testing.assert_array_equal(drawn['low'][:, ::2, ::2], base.draw(np.arange(3))['x0'])


@pytest.mark.slow
def test_a_sweep_of_levels_has_the_distance_of_reconstructions_beside_that_of_samples(runs, monkeypatch):
  """As many images as samples are made of the evaluation images, the first of these in turn."""
  trained = opened(runs / 'together', batch_size=4)
  trained.config.evaluate.update({'num_images': 6, 'extractors': ('classifier', 'inception')})
  data, labels = trained.eval_images(4)
  monkeypatch.setattr(trained, 'eval_images', lambda count: (data, labels))
  given, seen, compared = trained.observe(data, labels), [], []
  stream = types.SimpleNamespace(add=seen.append, finish=lambda: {'features': 'seen'})
  known = networks.Networks(features={}, lpips=None, missing={'inception': 'no weights'})
  known.features['classifier'] = types.SimpleNamespace(stream=lambda: stream)
  real = sets.Real(train={}, held_out={})
  real.train['classifier'] = 'real'
  figure = {'fd_classifier': Figure(value=1.5)}
  monkeypatch.setattr(sweep, 'distance_figures', lambda *of: compared.append(of[:3]) or figure)
  found = sweep.of_reconstructions(trained, known, real)
  assert found == {'fd_classifier of reconstructions': Figure(value=1.5)}
  assert compared == [('classifier', ['seen'], 'real')]
  in_turn = {name: value[[0, 1, 2, 3, 0, 1]] for name, value in given.items()}
  wanted = trained.draw(np.arange(6), in_turn)['x0']
  assert [len(part) for part in seen] == [4, 2]
  assert np.abs(np.concatenate(seen).astype(int) - wanted).max() <= 1


@pytest.mark.slow
def test_the_cost_of_a_sample_is_that_of_the_whole_chain(runs):
  last, base = opened(runs / 'together'), opened(runs / 'together', 'base')
  whole, first = sweep.giga_macs(last), sweep.giga_macs(base)
  twice = sweep.giga_macs(last.with_settings(num_steps=2 * last.settings.num_steps))
  assert 0 < first < whole
  assert twice - first == pytest.approx(2 * (whole - first), rel=0.01)


@pytest.mark.slow
def test_the_level_of_samples_changes_the_last_stage_alone(runs):
  trained = opened(runs / 'together')
  clean, noisy = trained.draw(np.arange(4)), trained.with_settings(aug_level=0.4).draw(np.arange(4))
  np.testing.assert_array_equal(clean['low'], noisy['low'])
  assert trained.made_of != trained.with_settings(aug_level=0.4).made_of
  with pytest.raises(UserError, match='sample.aug_level is 0.6, outside'):
    trained.with_settings(aug_level=0.6)


@pytest.mark.slow
def test_every_mode_of_the_last_stage(runs, tmp_path):
  config = configs.read(runs / 'together')
  for mode in ('sample', 'reconstruct', 'interpolate'):
    modes.MODES[mode](configs.Run(config, runs / 'together', ('base', 'sr_8'), tmp_path))
  for file in ('samples.png', 'reconstructions.png', 'interpolation.png'):
    assert (tmp_path / file).exists()


@pytest.mark.slow
def test_small_images_are_not_compared_with_large_ones(runs):
  config = configs.read(runs / 'together')
  run = configs.Run(config, runs / 'together', ('base',))
  with pytest.raises(UserError, match='config.base is to be evaluated, .* 4 pixels a side, the data 8'):
    checked.check(run, 'evaluate')
  config.base.train.best_measure = 'fd_classifier'
  with pytest.raises(UserError, match="config.base has train.best_measure = 'fd_classifier', .* 4 pixels"):
    checked.check(run, 'sample')
  config.base.train.best_measure = 'val/loss'
  checked.check(configs.Run(config, runs / 'together', ('base', 'sr_8')), 'evaluate')


def test_no_two_stages_have_a_key_in_common():
  """The parts of one stage's keys, and what is split of them, are no keys of another."""
  indices, seen = jnp.arange(3), []

  def keys_below(key, levels):
    seen.append(jax.random.key_data(key).tobytes())
    for part in jax.random.split(key) if levels else ():
      keys_below(part, levels - 1)

  with jax.debug_key_reuse(False):
    for depth in range(3):
      for keys in draw.image_keys(0, indices, depth):
        for key in keys:
          keys_below(key, 3)
    assert len(set(seen)) == len(seen) == 3 * 3 * 3 * 15
    for first, own in zip(draw.image_keys(0, indices), draw.image_keys(0, indices, 0), strict=True):
      np.testing.assert_array_equal(jax.random.key_data(first), jax.random.key_data(own))
  assert isinstance(draw.image_keys(0, indices, 2), SampleKeys)


@pytest.mark.long
def test_a_trained_stage_does_what_its_small_image_says(tmp_path, one):
  """What it makes of real small images, made small again, is the small image; not so at a high level."""
  config = importlib.import_module('configs.digits').get_config('cascade')
  config.data.data_dir = str(tmp_path / 'data')
  config.sr_8.train.update({'num_steps': 1600, 'save_every_steps': 1600, 'eval_every_steps': 1600})
  config.sr_8.train.grid_every_steps = 0
  config.sr_8.sample.update({'num_steps': 10, 'num_images': 64})
  config.reconstruct.num_images = 16
  train.run_stages(config, tmp_path / 'run', ('sr_8',))
  trained = opened(tmp_path / 'run')
  data, labels = trained.eval_images(64)

  def away(level):
    drawn = trained.with_settings(aug_level=level).draw_all(trained.observe(data, labels))
    small, wanted = (x.reshape(64, 4, 2, 4, 2).mean(axis=(2, 4)) / 255 for x in (drawn['x0'], data))
    return float(np.sqrt(np.mean((small - wanted) ** 2)))

  errors = [away(level) for level in (0.0, 0.1, 0.4)]
  assert errors[0] < 0.05
  assert errors[0] < errors[1] < errors[2]
