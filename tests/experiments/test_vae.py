"""The VAE stage: its loss and the scale of its gradient, and the constant of its bound."""

import dataclasses
import importlib
import math

import as_trained
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vaediff import experiments
from vaediff.experiments import base
from vaediff.models.functional import Model

SIZE, LATENT, COUNT = 8, 16, 8


class Linear(nn.Module):
  """One layer to mean and log variance of z, and one back."""

  def setup(self):
    self.to_code = nn.Dense(2 * LATENT)
    self.to_image = nn.Dense(SIZE**2)

  def __call__(self, x, *, deterministic=True):
    return self.decode(self.encode(x)[0])

  def encode(self, x):
    return tuple(jnp.split(self.to_code(x.reshape(len(x), -1)), 2, axis=-1))

  def decode(self, z):
    return self.to_image(z).reshape(-1, SIZE, SIZE, 1)


def build(**changes):
  """Returns the stage of the digits with a network of two layers."""
  config = importlib.import_module('configs.digits').get_config('debug')
  config.update_from_flattened_dict({f'vae.{field}': value for field, value in changes.items()})
  experiment = experiments.build(config, 'vae')
  return dataclasses.replace(experiment, vae=Model(module=Linear(), inputs=experiment.vae.inputs))


@pytest.fixture(scope='module')
def updated():
  """By `loss.reduction`, the metrics of one update on a batch in four parts, with beta = 3."""
  images = np.random.default_rng(0).integers(0, 256, (COUNT, SIZE, SIZE, 1), np.uint8)

  def metrics(reduction):
    experiment = build(**{'loss.beta': 3.0, 'loss.reduction': reduction, 'train.microbatches': 4})
    params = as_trained.params_of(experiment.vae.init)

    @jax.jit
    def update(params, batch):
      optimizer = experiment.optimizer.transform.init(params)
      networks = {'vae': base.Network(params=params, opt_state=optimizer, ema_params=params)}
      state = base.TrainState(step=jnp.int32(0), networks=networks, extra={})
      return experiment.train_step(state, {}, batch, jax.random.key(1))[1]

    return {name: float(value) for name, value in update(params, {'image': images}).items()}

  return {reduction: metrics(reduction) for reduction in ('sum', 'mean')}


def test_the_loss_is_the_reconstruction_and_beta_times_the_divergence(updated):
  for metrics in updated.values():
    assert metrics['loss/kl'] > 0.1
    total = metrics['loss/reconstruction'] + 3 * metrics['loss/kl']
    assert metrics['loss'] == pytest.approx(total, rel=1e-5)


def test_a_sum_is_over_the_whole_batch_not_over_one_of_its_parts(updated):
  norms = {reduction: metrics['grad_norm/vae'] for reduction, metrics in updated.items()}
  assert norms['sum'] == pytest.approx(COUNT * norms['mean'], rel=1e-4)


def test_the_bound_of_white_images_that_are_decoded_to_grey():
  """-log N(1; 1/2, 1/2) of each of 64 pixels, and 16 means of 1 with unit variance."""
  experiment = build()
  params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), as_trained.params_of(experiment.vae.init))
  params['to_code']['bias'][:LATENT] = 1
  batch = {'image': np.full((2, SIZE, SIZE, 1), 255, np.uint8)}

  @jax.jit
  def bound(params, batch):
    return experiment.bound({'vae': params}, batch, jax.random.split(jax.random.key(0)), 0)

  terms = bound(params, batch)
  pixel = 0.5**2 / (2 * 0.5) + 0.5 * math.log(2 * math.pi * 0.5)
  np.testing.assert_allclose(terms['reconstruction'], np.full(2, 64 * pixel), rtol=1e-5)
  np.testing.assert_allclose(terms['kl'], np.full(2, 16 / 2), rtol=1e-5)
