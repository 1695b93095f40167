"""What later stages read of a trained one is measured once: when it is trained, or when it is first read."""

import importlib
import io
import json
import pathlib
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from some_slow import some_slow

from vaediff import experiments
from vaediff.conditions import pca, prior
from vaediff.data import pixels, sources
from vaediff.errors import UserError
from vaediff.evaluation import during_training
from vaediff.machine import sharding
from vaediff.run import checkpoint, draw, guard, loop, measurements, review
from vaediff.run import config as configs
from vaediff.run import frozen as frozen_networks
from vaediff.run.opened import Opened
from vaediff.run.trained import Trained
from vaediff.spaces import tokenizers

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
pytestmark = pytest.mark.xdist_group('trained')  # one worker: the tests share what is dear


def digits(folder, variant='debug', **changes):
  config = importlib.import_module('configs.digits').get_config(variant)
  config.data.data_dir = str(folder / 'data')
  config.update_from_flattened_dict(changes)
  return config


def mesh_of(config, devices=1):
  return sharding.make_mesh(config.mesh, jax.devices()[:devices])


def store(config, workdir, stage, step=4, seed=0):
  """Stores a stage as `loop.train` would: parameters of step 0, said to be of another."""
  state = jax.jit(guard.with_counts(experiments.build(config, stage).init))(jax.random.key(seed))
  checkpointer = checkpoint.Checkpointer(workdir / stage, 2)
  checkpointer.save(step, state, {'stage': stage, 'config': json.loads(config.to_json())})
  checkpointer.close()


def files(folder, pattern='*.npz'):
  return sorted(path.name for path in folder.glob(pattern))


@pytest.fixture(scope='module')
def untrained(tmp_path_factory):
  """A folder with the checkpoints of a VAE, an autoencoder and one with levels of codes, nothing measured."""
  folder = tmp_path_factory.mktemp('measurements')
  store(digits(folder), folder / 'run', 'vae')
  store(digits(folder, 'latent,debug'), folder / 'run', 'autoencoder')
  store(digits(folder, 'vqvae2,debug'), folder / 'run', 'vqvae2')
  yield folder
  assert files(folder / 'run', '*/*.npz') == []  # tests change copies of it


@pytest.fixture
def run(untrained, tmp_path):
  return pathlib.Path(shutil.copytree(untrained / 'run', tmp_path / 'run'))


def target_of(config, folder, mesh):
  own = Opened(folder.name, folder)
  return measurements.Target(config=config, stage=folder.name, folder=folder, opened=own, mesh=mesh)


def source_of(config, stage, name):
  """What a stage declares that it reads by this name."""
  return experiments.build(config, stage).frozen[name]


# Made when missing --------------------------------------------------------------------------------


@pytest.mark.slow
def test_statistics_are_made_when_they_are_missing_and_then_read(untrained, run, capsys):
  config = digits(untrained, 'latent,debug')
  source = source_of(config, 'ddgan', 'latents')
  made = measurements.load(source, config, run, mesh_of(config))
  (path,) = (run / 'autoencoder').glob('*.npz')
  assert path.name.startswith('latents-')
  assert 'autoencoder: measuring the latents of 1500 training images' in capsys.readouterr().out
  assert set(made) == set(measurements.STATISTICS)
  assert all(value.shape == (2,) and value.dtype == np.float32 for value in made.values())
  assert (made['std'] > 0).all() and (made['min'] < made['mean']).all() and (made['mean'] < made['max']).all()
  before = path.stat().st_mtime_ns
  again = measurements.load(source, config, run, mesh_of(config))
  assert capsys.readouterr().out == '' and path.stat().st_mtime_ns == before
  path.unlink()
  config.autoencoder.sample.batch_size = 7  # a posterior's noise belongs to the image, not to the batch
  anew = measurements.load(source, config, run, mesh_of(config))
  for name, value in made.items():
    np.testing.assert_array_equal(again[name], value)
    np.testing.assert_allclose(anew[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_statistics_of_a_newer_checkpoint_are_others(untrained, run):
  config = digits(untrained, 'latent,debug')
  source = source_of(config, 'ddgan', 'latents')
  measurements.load(source, config, run, mesh_of(config))
  store(config, run, 'autoencoder', step=8)  # the same parameters: the step is no identity
  measurements.load(source, config, run, mesh_of(config))
  assert len(files(run / 'autoencoder', 'latents-*.npz')) == 1
  store(config, run, 'autoencoder', step=12, seed=1)
  measurements.load(source, config, run, mesh_of(config))
  assert len(files(run / 'autoencoder', 'latents-*.npz')) == 2


def test_what_is_measured_of_other_images_is_not_read_as_that_of_the_first(untrained, run, monkeypatch):
  """With data.check_fingerprint off others may be measured: their figures are stored as theirs."""
  config, there = digits(untrained), {'fingerprint': 'first'}
  monkeypatch.setattr(checkpoint, 'load_meta', lambda *_: {'data': {'train': 'first'}})
  monkeypatch.setattr(sources, 'open_source', lambda data, split: types.SimpleNamespace(**there))
  target = target_of(config, run / 'vae', mesh_of(config))

  def measured():
    made = lambda: {'mean': np.array(list(there['fingerprint'].encode()))}
    found = measurements.stored_or_made(target, 'test', {}, ('mean',), made)
    return bytes(found['mean'].tolist()).decode()

  assert measured() == 'first' and measured() == 'first'
  there['fingerprint'] = 'other'
  assert measured() == 'first'  # of the stage's own images, whatever lies there: to read it none are opened
  config.data.check_fingerprint = False
  assert measured() == 'other'
  there['fingerprint'] = 'first'
  config.data.check_fingerprint = True
  assert measured() == 'first' and len(files(run / 'vae', 'test-*.npz')) == 2

  def lost(data, split):
    raise UserError('no images are there')

  config.data.check_fingerprint = False
  monkeypatch.setattr(sources, 'open_source', lost)
  assert measured() == 'first'


def test_a_prior_is_fitted_when_it_is_missing_and_anew_for_other_settings(untrained, run, capsys):
  config = digits(untrained)
  assert config.vae.prior.kind == 'gmm'
  source = source_of(config, 'refiner', 'prior')
  made = measurements.load(source, config, run, mesh_of(config))
  assert set(made) == {'weights', 'means', 'diag'} and made['means'].shape[1] == 16
  np.testing.assert_allclose(made['weights'].sum(), 1, rtol=1e-5)
  (name,) = files(run / 'vae')
  assert name.startswith('prior-')
  assert 'fitting a Gaussian mixture (diag, 1-2 components) to 64 latents' in capsys.readouterr().out
  for key, value in measurements.load(source, config, run, mesh_of(config)).items():
    np.testing.assert_array_equal(value, made[key])
  assert capsys.readouterr().out == ''
  config.vae.prior.update({'covariance': 'tied', 'num_components': (1,)})
  other = measurements.load(source, config, run, mesh_of(config))
  assert set(other) == {'weights', 'means', 'tied'} and other['tied'].shape == (16, 16)
  assert len(files(run / 'vae')) == 2 and name in files(run / 'vae')
  config.vae.prior.kind = 'normal'
  assert measurements.load(source, config, run, mesh_of(config)) == {}
  assert len(files(run / 'vae')) == 2


def test_images_are_encoded_and_read_once_for_the_prior_and_those_of_classes(untrained, run, monkeypatch):
  """What is fitted to is the same as where the prior has been stored before."""
  config = digits(untrained, 'debug', **{'vae.prior.num_components': (1,)})
  target, stored = target_of(config, run / 'vae', mesh_of(config)), measurements.stored_or_made
  monkeypatch.setattr(measurements, 'stored_or_made', lambda *args: args[-1]())  # as in a folder that is full
  encoded, read = [], []
  posteriors, read_images = measurements.posteriors, sources.ArraySource.read
  monkeypatch.setattr(measurements, 'posteriors', lambda *args: encoded.append(1) or posteriors(*args))
  counted = lambda self, indices: read.append(len(indices)) or read_images(self, indices)
  monkeypatch.setattr(sources.ArraySource, 'read', counted)
  alone = measurements.prior_of_classes(target)
  assert encoded == [1] and read == [64]
  monkeypatch.setattr(measurements, 'stored_or_made', stored)
  measurements.fitted_prior(target)
  for name, value in measurements.prior_of_classes(target).items():
    np.testing.assert_array_equal(value, alone[name])


def test_statistics_are_of_one_compiled_program(untrained, run, monkeypatch):
  config, made, jit = digits(untrained, 'latent,debug'), [], jax.jit
  experiment, read = measurements.opened(target_of(config, run / 'autoencoder', mesh_of(config)))
  source = sources.open_source(config.data, 'train')
  monkeypatch.setattr(jax, 'jit', lambda *args, **named: made.append(jit(*args, **named)) or made[-1])
  measurements.moments_of_latents(experiment, read, source, 750, mesh_of(config), 0)
  assert [one._cache_size() for one in made if one.__name__ == 'moments'] == [1]


@pytest.mark.slow
def test_the_pca_of_codes_is_that_of_all_means_and_is_measured_once(untrained, run, capsys):
  config = digits(untrained, 'pca,debug', **{'refiner.diffusion.pca.num_directions': 4})
  mesh, source = mesh_of(config), source_of(config, 'refiner', 'pca')
  made = measurements.load(source, config, run, mesh)
  said = capsys.readouterr().out
  assert 'vae: measuring the directions of the codes of 1500 training images' in said
  assert 'the PCA of the code has 4 of 16 directions, with signal fractions from ' in said
  experiment, read = measurements.opened(target_of(config, run / 'vae', mesh))
  image = sources.open_source(config.data, 'train').read(np.arange(1500))['image']
  mean, logvar = jax.jit(experiment.posterior)(read, pixels.to_unit_range(jnp.asarray(image)))
  mean, noise = np.float64(mean), np.exp(np.float64(logvar)).mean(axis=0)
  covariance = np.cov(mean.T, bias=True)
  with np.load(next((run / 'vae').glob('pca-*.npz'))) as stored:
    assert set(stored) == {*pca.SPECTRUM, measurements.MADE_OF} and stored['count'] == 1500
    v, signal, spread = (stored[name] for name in ('directions', 'signal', 'spread'))
  np.testing.assert_allclose(v @ np.diag(signal) @ v.T, covariance, atol=1e-5 * np.abs(covariance).max())
  np.testing.assert_allclose(spread, np.diag(v.T @ (covariance + np.diag(noise)) @ v), rtol=1e-4)
  np.testing.assert_allclose(made['mean'], mean.mean(axis=0), atol=1e-5)
  np.testing.assert_allclose(made['directions'], v[:, :4], atol=1e-6)
  np.testing.assert_allclose(made['scale'], np.sqrt(spread[:4] + 0.01 * spread.max()), rtol=1e-6)
  # other directions of the same file; and of a collapsed VAE none, which is said
  config.refiner.diffusion.pca.num_directions = 0
  other = measurements.load(source_of(config, 'refiner', 'pca'), config, run, mesh)
  np.testing.assert_array_equal(other['directions'][:, :4], made['directions'])
  assert 'measuring' not in capsys.readouterr().out and len(files(run / 'vae', 'pca-*.npz')) == 1
  config.refiner.diffusion.pca.min_signal = 0.99
  with pytest.raises(UserError, match="the code of stage 'vae' says nothing of the image"):
    measurements.load(source_of(config, 'refiner', 'pca'), config, run, mesh)


def test_how_often_codes_are_used_is_counted_when_it_is_missing(untrained, run, capsys):
  """Over all training images and each once, whatever the batches."""
  config = digits(untrained, 'vqvae2,debug', **{'vqvae2.sample.batch_size': 700})
  mesh, tokenizer = mesh_of(config), tokenizers.tokenizer_of(config, 'vqvae2', '', 'prior.tokenizer.stage')
  usage, folder = tokenizers.frequencies(tokenizer), run / 'vqvae2'
  made = measurements.load(usage, config, run, mesh)
  assert {name: value.shape for name, value in made.items()} == {'level_0': (8,), 'level_1': (8,)}
  said = capsys.readouterr().out
  assert 'vqvae2: counting the codes of 1500 training images' in said and '1x1: ' in said
  _, read = measurements.opened(target_of(config, folder, mesh))
  image = sources.open_source(config.data, 'train').read(np.arange(1500))['image']
  ids = jax.jit(tokenizer.codes)(read['hierarchy'], pixels.to_unit_range(jnp.asarray(image)))
  for level, rows in enumerate(ids):
    expected = np.bincount(np.asarray(rows).ravel(), minlength=8) / rows.size
    np.testing.assert_allclose(made[f'level_{level}'], expected, atol=1e-6)
  assert len(files(run / 'vqvae2', 'code_frequencies-*.npz')) == 1
  for key, value in measurements.load(usage, config, run, mesh).items():
    np.testing.assert_array_equal(value, made[key])
  assert capsys.readouterr().out == ''


@pytest.mark.slow
def test_codes_to_fit_to_do_not_depend_on_batches_and_devices(untrained, run):
  config = digits(untrained)
  source = sources.open_source(config.data, 'train')
  codes = []
  for devices, size in ((1, 16), (1, 5), (8, 16)):
    mesh = mesh_of(config, devices)
    experiment, read = measurements.opened(target_of(config, run / 'vae', mesh))
    found, labels = measurements.drawn_codes(experiment, read, source, 20, size, mesh, 3)
    np.testing.assert_array_equal(labels, source.read(np.arange(20))['label'])
    codes.append(found)
  assert codes[0].shape == (20, 16) and codes[0].std() > 0.1
  for other in codes[1:]:
    np.testing.assert_allclose(other, codes[0], rtol=1e-4, atol=1e-4)


def test_those_of_another_run_are_read_there(untrained, run, tmp_path):
  config = digits(untrained, **{'refiner.vae.workdir': str(run), 'stages': ('refiner',)})
  source = source_of(config, 'refiner', 'prior')
  assert measurements.load(source, config, tmp_path / 'mine', mesh_of(config))
  assert len(files(run / 'vae')) == 1 and not (tmp_path / 'mine').exists()


def test_nothing_is_measured_of_a_stage_that_is_not_trained(untrained, tmp_path):
  for variant, stage, name in (('latent,debug', 'ddgan', 'latents'), ('debug', 'refiner', 'prior')):
    config = digits(untrained, variant)
    with pytest.raises(UserError, match='no checkpoint in .*: train that stage first'):
      measurements.load(source_of(config, stage, name), config, tmp_path, mesh_of(config))
  assert files(tmp_path, '*/*') == []


@pytest.mark.parametrize('stage, name', [('autoencoder', 'latents'), ('vae', 'prior')])
def test_a_stage_says_what_is_measured_of_it(untrained, run, stage, name):
  config = digits(untrained, 'latent,debug' if stage == 'autoencoder' else 'debug')
  experiment = experiments.build(config, stage)
  assert experiment.measures == (name,)
  measurements.ensure(experiment, config, run, stage, mesh_of(config))
  (path,) = files(run / stage)
  assert path.startswith(name)


def test_what_is_measured_of_a_stage_is_neutral_while_it_is_trained(untrained, run):
  """A VAE's own samples are drawn from N(0, I) until its prior can be fitted."""
  config = digits(untrained)
  experiment, mesh = experiments.build(config, 'vae'), mesh_of(config)
  assert frozen_networks.load(experiment, config, run, mesh, training='vae') == {'prior': {}}
  assert files(run / 'vae') == []
  assert set(frozen_networks.load(experiment, config, run, mesh)['prior']) == {'weights', 'means', 'diag'}


# Damaged ------------------------------------------------------------------------------------------


def halved(content):
  return content[: len(content) // 2]


@pytest.mark.parametrize(
  'stage, reader, name',
  some_slow([('autoencoder', 'ddgan', 'latents'), ('vae', 'refiner', 'prior')], 'vae'),
)
def test_a_damaged_file_is_named_with_what_to_do(untrained, run, stage, reader, name):
  config = digits(untrained, 'latent,debug' if stage == 'autoencoder' else 'debug')
  source, mesh = source_of(config, reader, name), mesh_of(config)
  made = measurements.load(source, config, run, mesh)
  (path,) = (run / stage).glob('*.npz')
  whole = path.read_bytes()
  for content in (halved(whole), b'', b'not a zip', b'PK\x03\x04 cut off'):
    path.write_bytes(content)
    with pytest.raises(
      UserError, match=f'{path} is damaged .*; remove it and run the same command again: it is made anew'
    ):
      measurements.load(source, config, run, mesh)
    assert path.read_bytes() == content  # removing it is the user's
  path.unlink()
  for key, value in measurements.load(source, config, run, mesh).items():
    np.testing.assert_array_equal(value, made[key])


@pytest.mark.slow
def test_a_file_that_lacks_statistics_is_damaged(untrained, run):
  config = digits(untrained, 'latent,debug')
  source, mesh = source_of(config, 'ddgan', 'latents'), mesh_of(config)
  measurements.load(source, config, run, mesh)
  (path,) = (run / 'autoencoder').glob('*.npz')
  with np.load(path) as stored:
    whole = dict(stored)
  for change in ({'std': None}, {'made_of': None}, {'mean': np.full(2, np.nan, np.float32)}):
    changed = {name: value for name, value in {**whole, **change}.items() if value is not None}
    np.savez(path, **changed)
    with pytest.raises(UserError, match=f'{path} is damaged'):
      measurements.load(source, config, run, mesh)
  np.savez(path, **{**whole, 'made_of': json.dumps({"the network 'autoencoder'": 'another'})})
  with pytest.raises(UserError, match=f"{path} was made of the network 'autoencoder' another, which is"):
    measurements.load(source, config, run, mesh)


# The same prior everywhere ------------------------------------------------------------------------


@pytest.fixture
def opened(trained, one_device):
  """The shared debug run of the digits, whose prior is a mixture: its refiner, opened."""
  workdir = trained('digits').run
  config = configs.read(workdir)
  return Trained(config, workdir, 'refiner', sharding.make_mesh(config.mesh))


def test_the_prior_is_fitted_right_after_the_vae(opened):
  (path,) = (opened.workdir / 'vae').glob('prior-*.npz')
  fitted = path.stat().st_mtime_ns
  refiner = [path.stat().st_mtime_ns for path in (opened.workdir / 'refiner').rglob('*') if path.is_file()]
  assert (opened.workdir / 'vae' / loop.SUMMARY).stat().st_mtime_ns <= fitted <= min(refiner)
  with np.load(path) as stored:
    assert set(stored.files) - {'made_of'} == set(opened.read['prior']) == {'weights', 'means', 'diag'}
    for name in opened.read['prior']:
      np.testing.assert_array_equal(opened.read['prior'][name], stored[name])


@pytest.mark.slow
def test_training_grids_draw_from_the_prior_that_is_configured(opened):
  """The picture that training wrote shows what the finished stage draws with the same seed."""
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

  settings, seed = opened.config.refiner.train, opened.config.seed
  indices = np.arange(settings.grid_images)
  wanted = draw.as_grid(opened.draw(indices, seed=seed)['x0_vae'])
  events = EventAccumulator(str(opened.workdir / 'refiner' / 'tensorboard'), {'images': 0})
  events.Reload()
  written = events.Images('samples/x0_vae')
  assert [event.step for event in written] == [settings.num_steps]
  with Image.open(io.BytesIO(written[0].encoded_image_string)) as picture:
    shown = np.asarray(picture.convert('L'))[..., None]
  assert shown.shape == wanted.shape and np.abs(shown.astype(int) - wanted).max() <= 1
  keys = draw.image_keys(seed, jnp.asarray(indices)).conditions
  codes = prior.draw(opened.read['prior'], keys, 16)
  np.testing.assert_allclose(opened.draw_inputs(indices, seed)['z'], codes, atol=1e-5)
  opened.read = {**opened.read, 'prior': {}}
  standard = draw.as_grid(opened.draw(indices, seed=seed)['x0_vae'])
  assert np.abs(standard.astype(int) - wanted).max() > 1  # N(0, I) would have been seen


@pytest.fixture
def readable(opened):
  """The same with noise on the refiner's parameters: after four steps what it draws hardly depends on z."""
  rng = np.random.default_rng(0)
  noisy = lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32)
  opened.params = jax.tree.map(noisy, opened.params)
  opened.read = {**opened.read, **opened.params}
  return opened


def loaded(opened):
  """What the loop loads before the refiner is trained."""
  return frozen_networks.load(
    opened.experiment, opened.config, opened.workdir, opened.mesh, training='refiner'
  )


@pytest.mark.slow
def test_the_best_measure_is_of_images_that_the_opened_stage_draws(readable, monkeypatch):
  seen, config = [], readable.config
  stream = types.SimpleNamespace(add=seen.append, finish=lambda: {'features': np.zeros((6, 2))})
  extractor = types.SimpleNamespace(fingerprint='0f')
  monkeypatch.setattr(during_training.networks, 'load', lambda *arguments: (extractor, None))
  features = types.SimpleNamespace(stream=lambda: stream)
  monkeypatch.setattr(during_training.networks, 'FeatureNetwork', lambda *arguments: features)
  real = types.SimpleNamespace(provenance={'images_sha256': '1e'}, features=np.zeros((6, 2)))
  monkeypatch.setattr(during_training, 'reference', lambda *arguments: real)
  monkeypatch.setattr(during_training.measures, 'missing', lambda *arguments: {})
  monkeypatch.setattr(during_training.measures, 'of_features', lambda *arguments: {'fd_classifier': 2.5})
  config.refiner.train.update({'best_measure': 'fd_classifier', 'best_images': 6})
  measure, made_of = during_training.make_measure(
    config, 'refiner', readable.experiment, loaded(readable), readable.eval_source, readable.mesh
  )
  assert set(made_of.values()) == {'0f', '1e', '6'}
  assert measure(readable.params) == 2.5
  images = readable.draw(np.arange(6))['x0']
  assert [len(part) for part in seen] == [4, 2]  # batches of the sampler
  assert np.abs(np.concatenate(seen).astype(int) - images).max() <= 1
  readable.read = {**readable.read, 'prior': {}}
  assert np.abs(np.concatenate(seen).astype(int) - readable.draw(np.arange(6))['x0']).max() > 1


@pytest.mark.slow
def test_the_grids_of_the_loop_are_of_images_that_the_opened_stage_draws(readable):
  opened = readable
  config, mesh, frozen, source = opened.config, opened.mesh, loaded(opened), opened.eval_source
  stage = loop.Stage(
    name='refiner', folder=opened.workdir / 'refiner', config=config, experiment=opened.experiment,
    frozen=frozen, frozen_ids={}, train_source=source, eval_source=source, extra={}, mesh=mesh,
  )  # fmt: skip
  evaluator = review.Evaluator(stage, jax.random.key(0))
  grids = evaluator.grids(types.SimpleNamespace(eval_params=opened.params))
  images = opened.draw(np.arange(config.refiner.train.grid_images), seed=config.seed)
  assert list(grids) == list(images) == ['x0_vae', 'x0']
  for name, picture in grids.items():
    assert np.abs(picture.astype(int) - draw.as_grid(images[name])).max() <= 1
