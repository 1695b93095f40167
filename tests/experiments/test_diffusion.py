"""The refiner's contracts: one path for both formulations, drops, flips, batch independence."""

import functools
import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff import experiments
from vaediff.errors import UserError
from vaediff.models.unet import convert_formulation

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent.parent))


def build(variant='debug', **changes):
  config = importlib.import_module('configs.digits').get_config(variant)
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return experiments.build(config, 'refiner')


def randomised(params, key):
  """Weights that are nowhere zero: at initialisation the U-Net's output is."""
  leaves, treedef = jax.tree.flatten(params)
  keys = jax.random.split(key, len(leaves))
  return treedef.unflatten(
    [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
  )


def networks(experiment, seed=0):
  """Returns params and frozen networks; the same arrays for the same architectures."""
  vae, made = drawn(experiment.denoiser, experiment.vae, seed)
  return {'denoiser': made}, {'vae': vae} if experiment.vae else {}


@functools.cache
def drawn(denoiser, vae, seed):
  key_denoiser, key_vae, key_noise = jax.random.split(jax.random.key(seed), 3)
  made = randomised(jax.jit(denoiser.init)(key_denoiser), key_noise)
  return jax.jit(vae.init)(key_vae) if vae else None, made


def keys(count, seed=5):
  return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(count))


def images(count=6):
  return jnp.asarray(np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), np.uint8))


@pytest.mark.parametrize('sampler', ['ddpm', 'ddim', 'heun', 'dpmpp_2m'])
def test_formulations_are_one_model_in_two_coordinates(sampler):
  """T6: with the first convolution converted, the same noise gives the same images, clipping included."""
  second = build('formulation2,debug', **{'refiner.sample.sampler': sampler})
  first = build('formulation1,debug', **{'refiner.sample.sampler': sampler})
  params, frozen = networks(second)
  converted = {'denoiser': convert_formulation(params['denoiser'], to=1, image_channels=1)}
  z = jax.random.normal(jax.random.key(1), (4, 16))
  a = second.sample(params, frozen, {'z': z}, keys(4))['x0']
  b = first.sample(converted, frozen, {'z': z}, keys(4))['x0']
  np.testing.assert_allclose(a, b, atol=1e-4)
  assert float(jnp.max(jnp.abs(a - first.sample(params, frozen, {'z': z}, keys(4))['x0']))) > 1e-2


def test_formulation2_with_a_black_hole_for_condition_is_formulation1():
  """x0_vae = 0 shifts nothing, so both give the same loss bit for bit."""
  losses = []
  for variant in ('formulation1,debug', 'formulation2,debug'):
    experiment = build(variant)
    params, _ = networks(experiment)
    condition = experiment.condition({}, {'x0_vae': jnp.zeros((4, 8, 8, 1)), 'z': jnp.zeros((4, 16))})
    x0 = jax.random.normal(jax.random.key(8), (4, 8, 8, 1))
    losses.append(
      experiment.example_losses(params['denoiser'], x0, condition, jax.random.key(9), training=False)
    )
  np.testing.assert_array_equal(*losses)


@pytest.mark.parametrize('sampler', ['ddpm', 'ddim'])
def test_image_i_depends_on_its_key_and_condition_alone(sampler):
  experiment = build(**{'refiner.sample.sampler': sampler, 'refiner.sample.eta': 0.5})
  params, frozen = networks(experiment)
  z = jax.random.normal(jax.random.key(1), (16, 16))
  run = jax.jit(experiment.sample)
  whole = run(params, frozen, {'z': z}, keys(16))['x0']
  for size in (1, 3):
    part = run(params, frozen, {'z': z[:size]}, keys(16)[:size])['x0']
    np.testing.assert_allclose(part, whole[:size], atol=2e-5)


def test_guidance_reads_y_without_shift_and_the_nulls():
  """A dropped example of Formulation 2 does not see x0_vae at all: neither as input nor as shift."""
  experiment = build('formulation2,guided,z,debug')
  params, _ = networks(experiment)
  y, t, drop = (
    jax.random.normal(jax.random.key(2), (3, 8, 8, 1)),
    jnp.full(3, 0.5),
    jnp.ones(3, bool),
  )

  def dropped(value):
    condition = experiment.condition(
      {}, {'x0_vae': jnp.full((3, 8, 8, 1), value), 'z': jnp.full((3, 16), value)}
    )
    return experiment.predict(params['denoiser'], y, t, condition, drop)

  np.testing.assert_array_equal(dropped(0.3), dropped(-0.8))
  condition = experiment.condition({}, {'x0_vae': jnp.full((3, 8, 8, 1), 0.3), 'z': jnp.full((3, 16), 0.3)})
  kept = experiment.predict(params['denoiser'], y, t, condition, ~drop)
  assert float(jnp.max(jnp.abs(kept - dropped(0.3)))) > 1e-3


def test_condition_and_image_flip_together():
  experiment = build(**{'refiner.train.flip': True, 'refiner.diffusion.x0_vae_source': 'precomputed'})
  batch = {'image': images(32), 'x0_vae': images(32), 'z': jnp.zeros((32, 16))}
  x0, condition = experiment.examples({}, batch, jax.random.key(3), flip=True)
  np.testing.assert_array_equal(x0, condition.x0_vae)
  plain, _ = experiment.examples({}, batch, jax.random.key(3), flip=False)
  flipped = np.any(np.asarray(x0 != plain), axis=(1, 2, 3))
  assert 4 < flipped.sum() < 28


@pytest.mark.parametrize('source', ['sample', 'mean'])
def test_x0_vae_is_fresh_or_fixed_at_each_step(source):
  experiment = build(**{'refiner.diffusion.x0_vae_source': source})
  _, frozen = networks(experiment)
  frozen = {'vae': randomised(frozen['vae'], jax.random.key(4))}
  draws = [
    experiment.examples(frozen, {'image': images()}, jax.random.key(k), flip=False)[1].x0_vae for k in (0, 1)
  ]
  assert bool(jnp.all(draws[0] == draws[1])) == (source == 'mean')


def test_refine_start_begins_at_the_noised_vae_image():
  """With t_start near 0 and a network that predicts eps = 0, the result is x0_vae itself."""
  experiment = build(**{'refiner.sample.t_start': 0.001, 'refiner.sample.num_steps': 1})
  params, frozen = networks(experiment)
  params = {'denoiser': experiment.denoiser.init(jax.random.key(0))}  # the zero-initialised output
  result = experiment.sample(params, frozen, {'z': jnp.ones((4, 16))}, keys(4))
  np.testing.assert_allclose(result['x0'], result['x0_vae'], atol=0.06)


@pytest.mark.parametrize('prediction', ['eps', 'x0', 'v'])
@pytest.mark.parametrize('weight', ['constant', 'snr', 'truncated_snr', 'min_snr', 'v'])
@pytest.mark.parametrize('schedule', ['linear', 'cosine'])
def test_every_prediction_weight_and_schedule_gives_a_finite_loss(prediction, weight, schedule):
  experiment = build(
    **{
      'refiner.diffusion.prediction': prediction,
      'refiner.diffusion.loss_weight': weight,
      'refiner.diffusion.schedule': schedule,
    }
  )
  params, frozen = networks(experiment)
  x0, condition = experiment.examples(frozen, {'image': images()}, jax.random.key(1), flip=False)
  losses = experiment.example_losses(params['denoiser'], x0, condition, jax.random.key(2), training=True)
  assert losses.shape == (6,) and bool(jnp.all(jnp.isfinite(losses)))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'refiner.diffusion.prediction': 'noise'},
      "diffusion.prediction is 'noise'; valid: x0, eps, v",
    ),
    (
      {'refiner.diffusion.condition_dropout': 1.0},
      r'condition_dropout must be in \[0, 1\), got 1.0',
    ),
    ({'refiner.sample.guidance_weight': 1.0}, 'guidance_weight > 0 needs a network trained with'),
    ({'refiner.sample.t_start': 0.0}, r'sample.t_start must be in \(0, 1\], got 0.0'),
    ({'refiner.diffusion.condition': 'none', 'refiner.sample.t_start': 0.5}, 'does not have'),
    (
      {'refiner.optim.schedule': 'step'},
      "optim.schedule must be 'constant', 'cosine' or 'linear', got 'step'",
    ),
    ({'refiner.optim.ema_decay': 1.0}, r'optim.ema_decay must be in \[0, 1\), got 1.0'),
    (
      {
        'refiner.diffusion.x0_vae_source': 'precomputed',
        'refiner.diffusion.z_conditioning': True,
        'refiner.train.flip': True,
      },
      'stored z belongs to the image as it is',
    ),
  ],
)
def test_values_that_cannot_work_are_refused(changes, message):
  with pytest.raises(UserError, match=f'config.refiner: .*{message}'):
    build(**changes)
