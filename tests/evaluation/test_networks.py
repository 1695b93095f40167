"""Feature networks on the devices: the same features for any pieces, batches and device count."""

import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.errors import UserError
from vaediff.evaluation import frechet, measures, networks
from vaediff.evaluation.frechet import Moments
from vaediff.features import vgg
from vaediff.features.extractor import Extractor
from vaediff.machine import sharding

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent.parent))
SIDE, DIMENSIONS = 6, 5


def get_config(variant='debug'):
  return importlib.import_module('configs.digits').get_config(variant)


def projection():
  """A feature network that is easy to check: a fixed linear map of the pixels."""
  matrix = np.random.default_rng(0).standard_normal((SIDE * SIDE, DIMENSIONS)).astype(np.float32)

  def apply(params, image):
    return {'features': image.reshape(image.shape[0], -1).astype(jnp.float32) @ params['matrix']}

  return Extractor(
    name='classifier', resize='none', fingerprint='0', num_features=DIMENSIONS,
    params={'matrix': matrix}, apply=apply,
  )  # fmt: skip


def pictures(count):
  return np.random.default_rng(1).integers(0, 256, (count, SIDE, SIDE, 1)).astype(np.uint8)


def expected(image):
  return image.reshape(len(image), -1).astype(np.float32) @ projection().params['matrix']


@pytest.mark.parametrize('devices', [1, 8])
@pytest.mark.parametrize('batch_size', [1, 7, 16, 100])
def test_any_batch_size_and_device_count(devices, batch_size):
  mesh = sharding.make_mesh(get_config().mesh, jax.devices()[:devices])
  got = networks.FeatureNetwork(projection(), mesh, batch_size)(pictures(37))
  np.testing.assert_allclose(got['features'], expected(pictures(37)), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize('cuts', [(1,), (5, 20), (16, 32), (1, 2, 3, 36)])
def test_images_may_come_in_any_pieces(cuts):
  mesh = sharding.make_mesh(get_config().mesh, jax.devices()[:1])
  stream = networks.FeatureNetwork(projection(), mesh, 16).stream()
  for piece in np.split(pictures(37), cuts):
    stream.add(piece)
  np.testing.assert_allclose(stream.finish()['features'], expected(pictures(37)), rtol=1e-4, atol=1e-2)


PIECES = ((1,) * 37, (5, 15, 17), (16, 16, 5), (37,), (32, 0, 5), (3, 34), (16, 16))


@pytest.mark.parametrize('pieces', PIECES)
def test_a_stream_runs_whole_batches_and_copies_what_is_left_of_a_piece_alone(pieces):
  """Every image once and in order, in batches of 16 but for the last; no piece is changed or held."""
  ran = []

  def run(image):
    ran.append(len(image))
    return {'features': image.astype(np.float32)}

  stream, image, start = networks.Stream(run, 16), np.arange(sum(pieces), dtype=np.uint8), 0
  for size in pieces:
    piece = image[start : start + size].copy()
    stream.add(piece)
    piece[:] = 255  # it is the caller's again
    start += size
  np.testing.assert_array_equal(stream.finish()['features'], image)
  assert ran == [16] * (len(image) // 16) + [len(image) % 16] * (len(image) % 16 > 0)


def test_a_stream_of_no_image_has_no_features():
  stream = networks.Stream(lambda image: {'features': image}, 4)
  stream.add(np.zeros((0, 2), np.uint8))
  with pytest.raises(ValueError, match='no image was added'):
    stream.finish()


def test_distances_of_pairs_may_come_in_any_pieces():
  """A perceptual distance that is the mean difference: a stream of pairs gives what a call gives."""
  apply = lambda params, a, b: jnp.abs(a.astype(jnp.float32) - b).mean(axis=(1, 2, 3))
  mesh = sharding.make_mesh(get_config().mesh, jax.devices()[:1])
  lpips = vgg.Lpips(name='lpips_vgg16', resize='none', fingerprint='0', params={}, apply=apply)
  distance = networks.PairDistance(lpips, mesh, 16)
  a, b = pictures(37), pictures(37)[::-1]
  stream = distance.stream()
  for piece in np.split(np.stack([a, b], axis=1), (5, 20)):
    stream.add(piece)
  np.testing.assert_array_equal(stream.finish()['distance'], distance(a, b))
  np.testing.assert_allclose(distance(a, b), np.abs(a.astype(float) - b).mean(axis=(1, 2, 3)), rtol=1e-5)


def test_the_distance_does_not_depend_on_how_the_images_were_split():
  mesh = sharding.make_mesh(get_config().mesh)
  network, image = networks.FeatureNetwork(projection(), mesh, 8), pictures(60)
  other = Moments.of(expected(pictures(90)[60:]))
  whole = frechet.frechet_distance(Moments.of(network(image)['features']), other)
  parts = [Moments.of(network(part)['features']) for part in np.split(image[::-1], (7, 8, 41))]
  assert frechet.frechet_distance(frechet.merge_all(parts), other) == pytest.approx(whole, rel=1e-6)


def test_what_is_not_there_says_why(tmp_path):
  config = get_config()
  config.evaluate.update(
    {
      'extractors': ('inception', 'mobilenetv2', 'vgg16'),
      'lpips': 'lpips_alexnet',
      'weights_dir': str(tmp_path),
    }
  )
  opened = networks.open_networks(config, sharding.make_mesh(config.mesh))
  assert opened.features == {} and opened.lpips is None
  assert 'Inception weights not given' in opened.missing['inception']
  assert '--mode=prepare' in opened.missing['mobilenetv2'] and str(tmp_path) in opened.missing['vgg16']
  assert '--mode=prepare' in opened.missing['lpips_alexnet']


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'extractors': ('resnet',)}, "config.evaluate.extractors = .* is 'resnet'; valid: inception"),
    ({'lpips': 'squeeze'}, "config.evaluate.lpips is 'squeeze'; valid: ''"),
    ({'inception_resize': 'clean'}, "config.evaluate.inception_resize is 'clean'; valid: pytorch, tf1"),
    ({'num_images': 1}, 'config.evaluate.num_images must be >= 2, got 1'),
    ({'num_seeds': 0}, 'config.evaluate.num_seeds must be >= 1, got 0'),
  ],
)
def test_settings_that_are_not_allowed(changes, message):
  config = get_config()
  config.evaluate.update(changes)
  with pytest.raises(UserError, match=message):
    networks.check(config.evaluate)


def test_prepare_fetches_what_the_config_names(tmp_path, monkeypatch):
  fetched = []

  def fetch(name, folder, say):
    fetched.append((name, folder))
    return folder / f'{name}.safetensors'

  monkeypatch.setattr(networks.published, 'prepare', fetch)
  config = get_config()
  config.evaluate.update(
    {
      'extractors': ('classifier', 'mobilenetv2', 'vgg16'),
      'lpips': 'lpips_vgg16',
      'weights_dir': str(tmp_path),
    }
  )
  networks.prepare(config, lambda text: None)
  assert fetched == [('mobilenetv2', tmp_path), ('lpips_vgg16', tmp_path)]
  fetched.clear()
  config.evaluate.update({'extractors': ('classifier',), 'lpips': ''})
  networks.prepare(config, lambda text: None)
  assert fetched == []
  config.refiner.train.best_measure, config.vae.train.best_measure = 'kd_mobilenetv2', 'val/loss'
  also = measures.weights_of_best(config, config.stages)
  networks.prepare(config, lambda text: None, also)
  assert also == ('mobilenetv2',) and fetched == [('mobilenetv2', tmp_path)]
