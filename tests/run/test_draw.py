"""Image i depends on the seed and i alone: not on the batch size, not on the number of devices.

What it starts from is what is given, else drawn, else observed of the evaluation split.
"""

import importlib
import pathlib
import sys

import as_trained
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from some_slow import some_slow

from vaediff import experiments
from vaediff.data import sources
from vaediff.errors import UserError
from vaediff.experiments import base
from vaediff.machine import sharding
from vaediff.run import draw

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
pytestmark = pytest.mark.xdist_group('draw')  # one worker: the tests share what is dear


def mesh_of(devices):
  config = importlib.import_module('configs.base').default()
  return sharding.make_mesh(config.mesh, jax.devices()[:devices])


def no_source():
  raise AssertionError('images are opened, though nothing needs to be observed')


@pytest.fixture(scope='module')
def parts():
  config = importlib.import_module('configs.digits').get_config('formulation2,z,debug')
  config.refiner.sample.sampler = 'ddpm'  # noise at every step
  experiment = experiments.build(config, 'refiner')
  denoiser = as_trained.params_of(experiment.denoiser.model.init)
  vae = as_trained.params_of(experiment.frozen['vae'].model.init, 1, deviation=0.0)
  return experiment, {'denoiser': denoiser, 'vae': vae, 'prior': {}}


MADE = {}
"""By number of devices: what draws, and what it reads there."""


def drawn(parts, indices, devices, given=None, **seed):
  """Images of seed 3 unless another is given."""
  if devices not in MADE:
    experiment, read = parts
    mesh = mesh_of(devices)
    run = draw.Drawer(experiment, mesh, 3, (8, 8, 1), no_source)
    MADE[devices] = run, jax.device_put(read, sharding.replicated(mesh))
  run, read = MADE[devices]
  return run(read, np.asarray(indices), given, **seed)


def close(a, b):
  """Equal but for the last bit of a byte: programs of other sizes round in another order."""
  assert a.dtype == np.uint8 and a.shape == b.shape
  assert np.abs(a.astype(int) - b).max() <= 1


@pytest.mark.slow
def test_any_batch_size_gives_the_same_images(parts):
  whole = drawn(parts, range(16), 1)
  assert list(whole) == ['x0_vae', 'x0']  # what an image was made from comes first
  assert whole['x0'].std() > 10 and len({image.tobytes() for image in whole['x0']}) == 16
  for size in (1, 3):
    for name, value in drawn(parts, range(5, 5 + size), 1).items():
      close(value, whole[name][5 : 5 + size])


def test_any_number_of_devices_gives_the_same_images(parts):
  one, eight = drawn(parts, range(5), 1), drawn(parts, range(5), 8)
  for name, value in one.items():
    close(eight[name], value)


def test_another_seed_gives_other_images(parts):
  first = drawn(parts, range(4), 1)['x0']
  assert np.array_equal(drawn(parts, range(4), 1, seed=3)['x0'], first)
  assert not np.array_equal(drawn(parts, range(4), 1, seed=4)['x0'], first)


@pytest.mark.slow
def test_what_is_given_takes_the_place_of_what_is_drawn_and_of_nothing_else(parts):
  """Handing over what would have been drawn changes nothing; another z keeps the noise, and the reverse."""
  experiment, read = parts
  indices = jnp.arange(4)
  own = jax.device_get(experiment.draw(read, draw.image_keys(3, indices), indices))
  assert set(own) == {'z', 'noise'}
  whole = drawn(parts, range(4), 1)
  for given in (own, {'z': own['z']}, {'noise': own['noise']}):
    for name, value in drawn(parts, range(4), 1, given).items():
      close(value, whole[name])
  other = drawn(parts, range(4), 1, {'noise': own['noise'][::-1].copy()})
  close(other['x0_vae'], whole['x0_vae'])
  assert not np.array_equal(other['x0'], whole['x0'])
  other = drawn(parts, range(4), 1, {'z': own['z'][::-1].copy()})
  close(other['x0_vae'], whole['x0_vae'][::-1])
  image = np.zeros((4, 8, 8, 1), np.float32)
  assert (drawn(parts, range(4), 1, {'x0_vae': image})['x0_vae'] == 128).all()  # decode(z) is not asked for


class Sources(base.Experiment):
  """Draws 'a'; sees 'a' and 'b' in an image; shows both."""

  networks, init, train_step, eval_step = {}, None, None, None  # it is not trained here
  inputs = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in 'ab'}

  def draw(self, read, keys, indices):
    return {'a': 0.01 * indices.astype(jnp.float32)}

  def observe(self, read, batch, x, key=None):
    return {'a': jnp.full(len(x), -1.0), 'b': jnp.mean(x, axis=(1, 2, 3)) + batch['label']}

  def sample(self, read, given, keys):
    return {name: value[:, None, None, None] for name, value in given.items()}


class OnlyDraws(Sources):
  """The same, but nothing has to be seen in an image."""

  def observe(self, read, batch, x, key=None):
    return {'a': jnp.full(len(x), -1.0)}


def bytes_of(*values):
  return [round((value + 1) * 127.5) for value in values]


def opened():
  """Three images, white at the start and black at the end, and how often they have been opened."""
  image = np.stack([np.full((2, 2, 1), value, np.uint8) for value in (255, 204, 0)])
  source = sources.ArraySource(
    images=image, labels=np.zeros(3, np.int32), label_names=('zero',), num_classes=1
  )
  times = []

  def open_images():
    times.append(1)
    return source

  return open_images, times


@pytest.mark.parametrize('devices', [1, 8])
def test_given_else_drawn_else_observed(devices):
  open_images, times = opened()
  run = draw.Drawer(Sources(), mesh_of(devices), 0, (2, 2, 1), open_images)
  images = {name: value.ravel().tolist() for name, value in run({}, np.array([1, 2, 3, 40])).items()}
  assert images['a'] == bytes_of(0.01, 0.02, 0.03, 0.4)  # drawn, though it could have been observed
  assert images['b'] == [204, 0, 255, 204]  # observed: image i modulo their number
  assert times == [1]
  given = {'b': np.array([0.5, 0.25, 0.0, -1.0], np.float32)}
  images = {name: value.ravel().tolist() for name, value in run({}, np.array([1, 2, 3, 40]), given).items()}
  assert images['a'] == bytes_of(0.01, 0.02, 0.03, 0.4) and images['b'] == bytes_of(*given['b'])
  assert times == [1]  # what is given is not looked for
  given = {'a': np.array([0.5, -0.5], np.float32)}
  images = {name: value.ravel().tolist() for name, value in run({}, np.array([0, 1]), given).items()}
  assert images['a'] == bytes_of(0.5, -0.5) and images['b'] == [255, 204]


class Traced(Sources):
  """Keeps how often its sampler is traced."""

  def sample(self, read, given, keys):
    self.times.append(1)
    return super().sample(read, given, keys)


def test_one_program_draws_whatever_is_given():
  experiment = Traced()
  object.__setattr__(experiment, 'times', [])
  run = draw.Drawer(experiment, mesh_of(8), 0, (2, 2, 1), opened()[0])
  half = np.full(4, 0.5, np.float32)
  for given in ({}, {'a': half}, {'b': half}, {'a': half, 'b': half}):
    found = run({}, np.arange(4), given)
    assert all(found[name].ravel().tolist() == [191] * 4 for name in given)
  run({}, np.arange(4) + 7, seed=5)
  assert len(experiment.times) == 1


def test_images_are_not_opened_where_all_can_be_drawn():
  run = draw.Drawer(OnlyDraws(), mesh_of(1), 0, (2, 2, 1), no_source)
  assert run({}, np.array([0, 100]))['a'].ravel().tolist() == bytes_of(0.0, 1.0)
  assert draw.observed_alone(OnlyDraws(), {}, (2, 2, 1)) == set()
  assert draw.observed_alone(Sources(), {}, (2, 2, 1)) == {'b'}


class Broken(OnlyDraws):
  """Image 'b' of index 3 is nan in one pixel, 'a' of index 5 infinite; 'c' is beyond bytes, but finite."""

  def sample(self, read, given, keys):
    index = jnp.round(given['a'] * 100)[:, None, None, None] * jnp.ones((1, 2, 2, 1))
    pixel = jnp.zeros((2, 2, 1)).at[0, 1, 0].set(1.0)[None]
    return {
      'a': jnp.where(index == 5, jnp.inf, 0.0),
      'b': jnp.where((index == 3) & (pixel == 1), jnp.nan, 0.0),
      'c': 1e30 * jnp.ones_like(index),
    }


@pytest.mark.parametrize('devices', some_slow([1, 8], 1))
def test_images_that_are_not_finite_are_refused(devices):
  run = draw.Drawer(
    Broken(), mesh_of(devices), 7, (2, 2, 1), no_source, "stage 'refiner' (sampler ddim, num_steps 4)"
  )
  assert run({}, np.array([0, 1, 2, 4]))['b'].tolist() == np.full((4, 2, 2, 1), 128).tolist()
  with pytest.raises(draw.NotFinite) as caught:
    run({}, np.array([2, 3, 4, 5, 6]))
  message = str(caught.value)
  assert "stage 'refiner' (sampler ddim, num_steps 4): 2 of the 5 images" in message
  assert 'the first is image 3 of seed 7' in message and 'checkpoint from before' in message
  with pytest.raises(draw.NotFinite, match='1 of the 1 images .* the first is image 5 of seed 8'):
    run({}, np.array([5]), seed=8)
  assert issubclass(draw.NotFinite, UserError)


def test_the_sampler_says_which_images_are_finite():
  images, finite = jax.jit(draw.sampler(Broken()))({}, jnp.arange(8), {}, 0)
  assert finite.tolist() == [True, True, True, False, True, False, True, True]
  assert all(image.dtype == np.uint8 for image in images.values())


def test_observe_takes_bytes_and_floats_and_any_number_of_images():
  observe = draw.make_observe(Sources(), mesh_of(8))
  image = np.stack([np.full((2, 2, 1), value, np.uint8) for value in (255, 0, 51)])
  for value in (image, (image / 127.5 - 1).astype(np.float32)):
    seen = observe({}, value, np.array([0, 0, 3]))
    assert seen['a'].tolist() == [-1] * 3
    np.testing.assert_allclose(seen['b'], [1, -1, 3 - 0.6], atol=1e-6)


def test_batches_cover_every_index_once_and_pad_the_last():
  got = list(draw.batches(7, 3))
  assert [chunk.tolist() for chunk in got] == [[0, 1, 2], [3, 4, 5], [6, 6, 6]]


def test_padded_batches_say_how_many_indices_are_no_padding():
  for count, size, wanted in ((7, 3, [3, 3, 1]), (6, 3, [3, 3]), (2, 2, [2]), (2, 5, [2])):
    found = list(draw.padded_batches(count, size))
    assert [number for _, number in found] == wanted
    for (indices, _), expected in zip(found, draw.batches(count, size), strict=True):
      np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(np.concatenate([rows[:number] for rows, number in found]), np.arange(count))


def test_the_own_image_is_the_last_of_what_is_drawn():
  assert draw.own_image({'x0_vae': 1, 'x0': 2}) == 2 and draw.own_image({'x0': 1}) == 1
