"""Stages that read the vectors of a CLIP stage: the noise of images."""

import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vaediff.experiments import base, restored
from vaediff.experiments.base import NOISE
from vaediff.machine import sharding
from vaediff.run import clips
from vaediff.run.trained import Trained


class Inverted(base.Experiment):
  """Finds for noise the image plus what it was given."""

  networks, init, train_step, eval_step = {}, None, None, None  # it is not trained here
  draws_images = False
  handed = {NOISE: jax.ShapeDtypeStruct((2, 2, 1), jnp.float32)}
  inputs = {restored.ORIGINAL: handed[NOISE], 'vector': jax.ShapeDtypeStruct((), jnp.float32)}
  sizes = []

  def sample(self, read, given, keys):
    self.sizes.append(len(keys.noise))
    return {NOISE: given[restored.ORIGINAL] + given['vector'][:, None, None, None]}


def test_the_noise_of_images_is_found_in_batches_of_the_stage(one_device, monkeypatch):
  config = ConfigDict(
    {
      'data': {'image_size': 2, 'channels': 1},
      'mesh': {'data': -1, 'fsdp': 1, 'rules': ()},
      'decoder': {'sample': {'seed': 4, 'batch_size': 4}},
    }
  )
  trained = object.__new__(Trained)
  trained.config, trained.workdir, trained.stage = config, pathlib.Path('none'), 'decoder'
  trained.mesh, trained.read = sharding.make_mesh(config.mesh), {}
  trained.experiment = types.SimpleNamespace(diffusion='a diffusion')
  monkeypatch.setattr(restored, 'inverted', lambda diffusion, num_steps: Inverted())
  image = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
  vector = 10 * np.arange(10, dtype=np.float32)
  noise = clips.noise_of(trained, image, {'vector': vector}, 5)
  np.testing.assert_allclose(noise, image / 127.5 - 1 + vector[:, None, None, None], rtol=1e-6)
  assert Inverted.sizes == [4]  # one program, of the batch size, and not of all ten
