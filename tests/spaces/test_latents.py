"""The space of an autoencoder's latents: there and back, its scale, Formulation 2, and what it is not."""

import functools
import importlib
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from some_slow import some_slow

from vaediff import experiments
from vaediff.data import pixels, sources
from vaediff.errors import UserError
from vaediff.evaluation import likelihoods
from vaediff.evaluation.measures import Figure
from vaediff.experiments import base
from vaediff.machine import sharding
from vaediff.run import measurements
from vaediff.run import trained as opened_stages
from vaediff.spaces import encoders

TESTS = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / 'experiments'), str(TESTS.parent)]
from random_parameters import made  # noqa: E402

BOTTLENECKS = {'kl': '', 'none': 'free,', 'vq': 'vq,'}


def config_of(bottleneck, variant='unconditional', **changes):
  name = f'{variant},latent_diffusion,{BOTTLENECKS[bottleneck]}debug'
  config = importlib.import_module('configs.digits').get_config(name)
  assert config.autoencoder.model.bottleneck == bottleneck
  config.update_from_flattened_dict(changes)
  return config


def source_of(seed, count=600):
  """Images of a few random waves each."""
  rng = np.random.default_rng(seed)
  rows, columns = np.mgrid[:8, :8] / 8
  phase = rng.uniform(0, 6, (2, count, 1, 1))
  speed = rng.integers(1, 3, (2, count, 1, 1))
  wave = np.sin(6 * speed[0] * rows + phase[0]) * np.cos(6 * speed[1] * columns + phase[1])
  image = np.uint8(127 + 90 * wave + rng.uniform(-30, 30, (count, 8, 8)))[..., None]
  return sources.ArraySource(
    images=image, labels=np.zeros(count, np.int32), label_names=('a',), num_classes=1
  )


@functools.cache
def opened(bottleneck):
  """Returns the diffusion and the autoencoder of a bottleneck, and what they read, statistics measured."""
  config = config_of(bottleneck)
  diffusion, autoencoder = (experiments.build(config, stage) for stage in ('refiner', 'autoencoder'))
  params = made(diffusion.frozen['autoencoder'].model, 3)
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  found = measurements.moments_of_latents(
    autoencoder, {'autoencoder': params}, source_of(0), 100, mesh, seed=0
  )
  read = {'autoencoder': params, 'latents': {name: jnp.asarray(value) for name, value in found.items()}}
  return diffusion, autoencoder, read


def images(seed, count=600):
  return pixels.to_unit_range(jnp.asarray(source_of(seed, count).images))


@pytest.mark.slow
@pytest.mark.parametrize('bottleneck', BOTTLENECKS)
def test_there_and_back_is_the_autoencoders_reconstruction(bottleneck):
  diffusion, autoencoder, read = opened(bottleneck)
  x = images(1, 8)
  own = base.sampling_keys(jax.random.split(jax.random.key(0), 8))
  rebuilt = autoencoder.sample(read, autoencoder.observe(read, {}, x), own)['x0']
  y = diffusion.space.encode(read, x, None)
  assert y.shape == (8, *diffusion.space.shape)
  back = diffusion.space.decode(read, y)['x0']
  np.testing.assert_allclose(back, rebuilt, atol=2e-5)
  assert float(rebuilt.std()) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize('bottleneck', BOTTLENECKS)
def test_channels_have_mean_zero_and_deviation_one(bottleneck):
  """Of the training images as they are drawn while a diffusion is trained, and of others of the same kind."""
  diffusion, _, read = opened(bottleneck)
  assert diffusion.space.bound is None
  for seed, key in ((0, jax.random.key(5)), (1, jax.random.key(6))):
    y = np.asarray(diffusion.space.encode(read, images(seed), key), np.float64)
    np.testing.assert_allclose(y.std(axis=(0, 1, 2)), 1, atol=0.02 if seed == 0 else 0.05)
    np.testing.assert_allclose(y.mean(axis=(0, 1, 2)), 0, atol=0.05 if seed == 0 else 0.15)


@pytest.mark.parametrize('bottleneck', some_slow(BOTTLENECKS, 'kl'))
def test_only_a_posterior_is_drawn_from_and_codes_are_not_diffused(bottleneck):
  diffusion, _, read = opened(bottleneck)
  x = images(1, 4)
  mean, draw = (diffusion.space.encode(read, x, key) for key in (None, jax.random.key(5)))
  assert bool(jnp.any(mean != draw)) == (bottleneck == 'kl')
  z = np.asarray(mean) * np.asarray(read['latents']['std']) + np.asarray(read['latents']['mean'])
  if bottleneck == 'vq':  # before quantisation
    codes = encoders.quantized(diffusion.space.source.model, read['autoencoder'], jnp.asarray(z))
    assert float(jnp.abs(codes - z).max()) > 1e-3
  if bottleneck == 'none':
    assert np.abs(z).max() < 1


def test_latents_are_divided_on_the_way_in_and_multiplied_on_the_way_out_and_the_mean_counts():
  """The traps of latent diffusion: a scale the wrong way round, and a mean that one side leaves out."""
  diffusion, _, read = opened('kl')
  model, params = diffusion.space.source.model, read['autoencoder']
  mean, std = jnp.array([3.0, -1.0]), jnp.array([4.0, 0.25])
  known = {**read, 'latents': {'mean': mean, 'std': std, 'min': -std, 'max': std}}
  x = images(1, 4)
  z, _ = model.apply(params, x, method='encode')
  expected = (np.asarray(z) - np.array([3.0, -1.0])) / np.array([4.0, 0.25])
  np.testing.assert_allclose(diffusion.space.encode(known, x, None), expected, rtol=1e-4, atol=1e-5)
  y = jax.random.normal(jax.random.key(1), z.shape)
  of_latents = lambda z: model.apply(params, z, method='decode')
  decoded = diffusion.space.decode_map(known, y)
  scale, shift = std.reshape(1, 1, 1, 2), mean.reshape(1, 1, 1, 2)
  np.testing.assert_allclose(decoded, of_latents(y * scale + shift), atol=1e-5)
  for wrong in (y / scale + shift, y * scale, y):
    assert float(jnp.abs(decoded - of_latents(wrong)).max()) > 1e-3


def test_formulation_2_adds_the_vaes_image_as_scaled_latents_without_noise():
  config = config_of('kl', 'formulation2')
  diffusion = experiments.build(config, 'refiner')
  _, _, read = opened('kl')
  x0_vae = images(2, 4)
  values = diffusion.conditions.values(read, {'x0_vae': x0_vae, 'z': jnp.zeros((4, 16))})
  z, _ = diffusion.space.source.model.apply(read['autoencoder'], x0_vae, method='encode')
  expected = (np.asarray(z) - np.asarray(read['latents']['mean'])) / np.asarray(read['latents']['std'])
  np.testing.assert_allclose(values['x0_vae'], expected, rtol=1e-4, atol=1e-4)
  y = jax.random.normal(jax.random.key(0), (4, *diffusion.space.shape))
  np.testing.assert_allclose(diffusion.denoiser.state(y, values, {}), y + expected, rtol=1e-4, atol=1e-4)
  first = experiments.build(config_of('kl', 'formulation1'), 'refiner')
  np.testing.assert_array_equal(first.denoiser.state(y, values, {}), y)
  for one in (diffusion, first):
    assert one.conditions.ports['x0_vae'].shape == diffusion.space.shape
    shown = one.conditions.shown({'x0_vae': x0_vae, 'z': jnp.zeros((4, 16))})
    np.testing.assert_array_equal(shown['x0_vae'], x0_vae)  # as the image it is


# What it is not -----------------------------------------------------------------------------------


@pytest.mark.parametrize('clip', ['static', 'dynamic'])
def test_latents_of_unit_deviation_have_no_bound_to_clip_to(clip):
  assert config_of('kl').refiner.sample.clip == 'none'
  with pytest.raises(UserError, match=f"sample.clip = '{clip}' brings x0_hat into .* space = 'latent'"):
    experiments.build(config_of('kl', **{'refiner.sample.clip': clip}), 'refiner')
  bounded = {'refiner.sample.clip': clip, 'refiner.autoencoder.scaling': 'max'}
  assert experiments.build(config_of('kl', **bounded), 'refiner').denoiser.bound == 1.0


def test_what_is_clipped_in_pixels_stays_so():
  get = importlib.import_module('configs.digits').get_config
  assert get('debug').refiner.sample.clip == get('wavelet_diffusion').refiner.sample.clip == 'static'
  assert get('latent_diffusion,wavelet_diffusion').refiner.sample.clip == 'static'
  assert get('latent_diffusion,consistency').refiner.sample.clip == 'none'


def test_a_bound_is_only_of_what_is_a_density_of_images():
  get = importlib.import_module('configs.digits').get_config
  pixel = experiments.build(get('unconditional,debug'), 'refiner')
  assert pixel.likelihood == base.BYTES and pixel.no_likelihood == ''
  batch, keys = {'image': jnp.zeros((1, 8, 8, 1), jnp.uint8)}, jax.random.split(jax.random.key(0), 1)
  for space in ('latent', 'wavelet'):
    experiment = experiments.build(get(f'unconditional,{space}_diffusion,debug'), 'refiner')
    assert experiment.likelihood == ''
    with pytest.raises(UserError, match=f'a bound is of the density of images, and the maps of {space}s'):
      experiment.bound({}, batch, keys, 1)


class Trained(opened_stages.Trained):
  """A stage of latents that reads nothing."""

  def __init__(self):
    self.config, self.read = importlib.import_module('configs.digits').get_config('debug'), {}
    why = 'they are latents'
    self.experiment = types.SimpleNamespace(likelihood='', no_likelihood=why, frozen={}, inputs={})


def test_the_table_says_why_there_is_no_bound():
  trained = Trained()
  assert likelihoods.figures(trained) == {'bits_per_dimension': Figure(missing='they are latents')}
  trained.config.evaluate.num_bound = 0
  assert likelihoods.figures(trained) == {}
