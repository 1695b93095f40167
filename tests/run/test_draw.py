"""Image i depends on the seed and i alone: not on the batch size, not on the number of devices."""

import importlib
import pathlib
import sys

import jax
import numpy as np
import pytest

from vaediff import experiments
from vaediff.machine import sharding
from vaediff.run import draw

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))


@pytest.fixture(scope='module')
def parts():
  config = importlib.import_module('configs.digits').get_config('formulation2,z,debug')
  config.refiner.sample.sampler = 'ddpm'  # noise at every step
  experiment = experiments.build(config, 'refiner')
  key_denoiser, key_vae, key_noise = jax.random.split(jax.random.key(0), 3)
  denoiser = experiment.denoiser.init(key_denoiser)
  leaves, treedef = jax.tree.flatten(denoiser)
  keys = jax.random.split(key_noise, len(leaves))  # at initialisation the U-Net's output is zero
  noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
  return experiment, {'denoiser': treedef.unflatten(noisy)}, {'vae': experiment.vae.init(key_vae)}


def drawn(parts, indices, devices, seed=3):
  experiment, params, frozen = parts
  config = importlib.import_module('configs.base').default()
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
  params, frozen = jax.device_put((params, frozen), sharding.replicated(mesh))
  return draw.make_draw(experiment, mesh, seed)(params, frozen, {}, np.asarray(indices))


def close(a, b):
  """Equal but for the last bit of a byte: programs of other sizes round in another order."""
  assert a.dtype == np.uint8 and a.shape == b.shape
  assert np.abs(a.astype(int) - b).max() <= 1


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
  assert not np.array_equal(drawn(parts, range(4), 1)['x0'], drawn(parts, range(4), 1, seed=4)['x0'])


def test_batches_cover_every_index_once_and_pad_the_last():
  got = list(draw.batches(7, 3))
  assert [chunk.tolist() for chunk in got] == [[0, 1, 2], [3, 4, 5], [6, 6, 6]]
