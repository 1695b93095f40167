"""The light decoder's loss: the student against the teacher's picture of the same latents."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vaediff import reads
from vaediff.experiments import base
from vaediff.experiments.light_decoder import LightDecoder
from vaediff.experiments.perceptual import Perceptual
from vaediff.models.functional import Model
from vaediff.optim import make_optimizer


class Halved(nn.Module):
  """An autoencoder whose latents are half of the image, of a small deviation: the decoder doubles them."""

  def encode(self, x, *, deterministic=True):
    return x / 2, jnp.full(x.shape, -4.0)

  def decode(self, z, *, deterministic=True):
    return 2 * z


class Factor(nn.Module):
  """A student that has learned one number."""

  @nn.compact
  def __call__(self, z, *, deterministic=True):
    return self.param('factor', nn.initializers.constant(1.5), ()) * z


@pytest.fixture(scope='module')
def experiment():
  image = jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32)
  teacher = Model(module=Halved(), inputs=(image,))
  return LightDecoder(
    decoder=Model(module=Factor(), inputs=(image,)),
    autoencoder=reads.FromStage(stage='autoencoder', network='autoencoder', workdir='', model=teacher),
    optimizer=make_optimizer(importlib.import_module('configs.parts').optim(1e-2), 10),
    perceptual=Perceptual(weight=0.0, network='', source=None),
    flip=False,
    microbatches=1,
    latent_shape=(4, 4, 1),
  )


def test_an_update_compares_each_picture_with_the_teachers_of_the_same_latents(experiment):
  params, frozen = {'factor': jnp.float32(1.5)}, {'autoencoder': {}}
  moments = experiment.optimizer.transform.init(params)
  network = base.Network(params=params, ema_params=None, opt_state=moments)
  state = base.TrainState(step=jnp.int32(0), networks={'decoder': network}, extra={})
  batch = {'image': np.random.default_rng(0).integers(0, 256, (6, 4, 4, 1), np.uint8)}
  after, metrics = jax.jit(experiment.train_step)(state, frozen, batch, jax.random.key(3))
  x = np.float32(batch['image'] / 127.5 - 1)
  _, key_z = jax.random.split(jax.random.key(3))
  taught, learned = (np.asarray(y) for y in experiment.pair(params, frozen, jnp.asarray(x), key_z))
  assert 0.05 < np.abs(taught - x).mean() < 0.5  # of drawn latents
  np.testing.assert_allclose(learned, 0.75 * taught, rtol=1e-5)
  assert float(metrics['loss/pixel']) == pytest.approx(np.abs(taught - learned).mean(), rel=1e-5)
  assert float(metrics['loss']) == float(metrics['loss/pixel']) and metrics['loss/perceptual'] == 0
  assert after.networks['decoder'].params['factor'] > 1.5  # towards the 2 of the teacher
