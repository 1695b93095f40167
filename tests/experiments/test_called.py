"""What networks are called with for images: what they are called with when images are drawn, or scored."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff import experiments
from vaediff.experiments import called
from vaediff.modes import checked


def built(variant, stage):
  config = importlib.import_module('configs.digits').get_config(variant)
  checked.complete(config)
  return experiments.build(config, stage)


def images(count=3):
  image = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1)).astype(np.uint8)
  batch = {'image': jnp.asarray(image), 'label': jnp.arange(count) % 10}
  return batch, jnp.asarray(image / 127.5 - 1, jnp.float32)


@pytest.mark.slow
def test_a_decoder_reads_the_code_of_an_image_the_same_in_every_batch():
  stage = built('debug', 'vae')
  reader, (batch, x) = called.reader_of(stage), images()
  read = {'vae': jax.jit(stage.vae.init)(jax.random.key(0))}
  of = jax.jit(lambda batch, x, rows: reader.of(stage, read, batch, x, called.keys_of(1, rows)))
  ((((z,), keywords),),) = of(batch, x, jnp.arange(3)).values()
  mean, logvar = stage.posterior(read, x)
  assert keywords == {} and reader.method == 'decode' and z.shape == mean.shape
  assert (abs(z - mean) < 6 * jnp.exp(0.5 * logvar)).all() and (z != mean).all()
  one = jax.tree.map(lambda value: value[1:2], (batch, x))
  np.testing.assert_allclose(of(*one, jnp.arange(1, 2))['vae'][0][0][0], z[1:2], atol=1e-5)


@pytest.mark.parametrize(
  ('variant', 'stage', 'network'),
  [
    ('light,debug', 'autoencoder', 'autoencoder'),
    ('light,debug', 'decoder', 'decoder'),
    ('vqvae,prior,label,debug', 'prior', 'prior'),
  ],
)
def test_every_kind_is_called_as_its_network_can_be(variant, stage, network):
  own = built(variant, stage)
  reader, (batch, x) = called.reader_of(own), images()
  models = {
    **own.networks,
    **{name: source.model for name, source in own.frozen.items() if hasattr(source, 'model')},
  }
  read = {name: jax.eval_shape(model.init, jax.random.key(0)) for name, model in models.items()}
  calls = jax.eval_shape(
    lambda read, batch, x: reader.of(own, read, batch, x, called.keys_of(1, jnp.arange(3))), read, batch, x
  )
  method = {} if reader.method is None else {'method': reader.method}
  (args, keywords), *_ = calls[network]
  output = jax.eval_shape(
    lambda params, args, keywords: models[network].apply(params, *args, **keywords, **method),
    read[network], args, keywords,
  )  # fmt: skip
  assert jax.tree.leaves(output)[0].shape[0] == 3


def test_of_a_diffusion_nothing_is_known():
  assert called.reader_of(built('debug', 'refiner')) is None
