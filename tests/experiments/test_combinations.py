"""Spaces x conditions x ways of training: all of it is composition, so all of it trains and draws."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base as base_config
from vaediff import experiments
from vaediff.data import words
from vaediff.machine import sharding
from vaediff.run import draw, guard, loop, steps, students
from vaediff.run import frozen as frozen_networks

CASES = {
  'unconditional': ('unconditional', 'refiner', {}),
  'formulation1': ('formulation1', 'refiner', {}),
  'formulation2_and_code': ('formulation2,z', 'refiner', {}),
  'label': ('unconditional,label', 'refiner', {}),
  'label_and_code_with_two_terms': (
    'formulation2,z,guided,label', 'refiner', {'refiner.sample.guidance': (('label', 1.0),)}
  ),
  'label_guided': ('unconditional,guided,label', 'refiner', {}),
  'label_beside_an_image': ('formulation1,label', 'refiner', {'refiner.sample.labels': (3, 7)}),
  'label_in_wavelets': ('unconditional,label,wavelet_diffusion', 'refiner', {}),
  'label_and_image_in_latents': ('formulation2,label,latent_diffusion', 'refiner', {}),
  'halving_of_guided_labels': ('unconditional,label,guided,distill', 'distill_guided', {}),
  'consistency_of_labels': ('unconditional,label,guided,consistency', 'consistency', {
    'refiner.diffusion.prediction': 'v'
  }),
  'adversarial_of_labels': ('unconditional,label,guided,adversarial', 'adversarial', {
    'refiner.diffusion.prediction': 'v'
  }),
  'matching_of_labels': ('unconditional,label,guided,matching', 'matching', {
    'refiner.diffusion.prediction': 'v'
  }),
  'free_latents': ('unconditional,latent_diffusion,free', 'refiner', {}),
  'codes_latents_formulation2': ('formulation2,latent_diffusion,vq', 'refiner', {}),
  'latents': ('unconditional,latent_diffusion', 'refiner', {}),
  'latents_formulation2': ('formulation2,latent_diffusion', 'refiner', {}),
  'wavelets': ('formulation1,wavelet_diffusion', 'refiner', {}),
  'halving_in_latents': ('unconditional,label,latent_diffusion,distill', 'distill_2', {}),
  'consistency_in_latents': ('unconditional,latent_diffusion,consistency', 'consistency', {
    'refiner.diffusion.prediction': 'v'
  }),
  'adversarial_in_latents': ('unconditional,latent_diffusion,adversarial', 'adversarial', {
    'refiner.diffusion.prediction': 'v'
  }),
  'matching_in_latents': ('unconditional,latent_diffusion,matching', 'matching', {
    'refiner.diffusion.prediction': 'v'
  }),
  'noised_x0_vae_in_latents': ('formulation2,guided,label,latent_diffusion', 'refiner', {
    'refiner.conditions.vae.aug_level': 0.5, 'refiner.sample.aug_level': 0.2
  }),
  'halving_of_a_noised_refiner': ('formulation2,distill', 'distill_2', {
    'refiner.conditions.vae.aug_level': 0.5, 'distill.data_free_fraction': 0.5
  }),
  'text_label_and_image_in_latents': ('formulation2,z,guided,label,text,latent_diffusion', 'refiner', {}),
  'text_in_wavelets_by_latent_diffusions_block': ('unconditional,text,wavelet_diffusion', 'refiner', {
    'refiner.conditions.text.how': 'transformer'
  }),
  'halving_of_guided_text': ('unconditional,text,guided,distill', 'distill_guided', {}),
  'pca_and_image_guided': ('formulation2,pca,guided', 'refiner', {}),
  'pca_alone_of_means': ('pca', 'refiner', {
    'refiner.diffusion.condition': 'none', 'refiner.diffusion.x0_vae_source': 'mean'
  }),
  'halving_with_pca': ('formulation1,pca,distill', 'distill_2', {'distill.data_free_fraction': 0.5}),
  'control_of_a_code_and_an_image': ('formulation2,z,guided,control', 'control', {}),
  'unlocked_control_of_guided_text_in_latents': (
    'unconditional,text,guided,latent_diffusion,control', 'control', {'control.base_locked': False}
  ),
  'weight_as_input': ('formulation2,z,guided,distill', 'distill_guided', {}),
}  # fmt: skip


def build(variant, stage, changes):
  digits = importlib.import_module('configs.digits')
  data = {**digits.DATA, 'caption_feature': 'caption' if 'text' in variant else ''}
  config = base_config.make('digits', data, digits.SIZES, f'{variant},debug', own=digits.OWN)
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  config = students.resolve(config)
  return experiments.build(config, stage), config[stage]


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_it_trains_and_draws(case, one_device):
  experiment, section = build(*CASES[case])
  mesh = sharding.make_mesh(importlib.import_module('configs.digits').get_config('debug').mesh)
  frozen = frozen_networks.fresh(experiment, mesh)
  if 'base' in frozen:  # whose last layer is zero when it is fresh, so that no control would have a gradient
    frozen['base'] = jax.tree.map(lambda leaf: leaf + 0.02 * jnp.ones_like(leaf), frozen['base'])
  state = jax.jit(guard.with_counts(experiment.init))(jax.random.key(0))
  state = jax.jit(experiment.start)(state, frozen)
  rng = np.random.default_rng(0)
  batch = {
    'image': jnp.asarray(rng.integers(0, 256, (8, 8, 8, 1), np.uint8)),
    'label': jnp.arange(8, dtype=jnp.int32),
  }
  if words.TOKENS in experiment.inputs:
    shape = experiment.inputs[words.TOKENS].shape
    batch[words.TOKENS] = jnp.asarray(rng.integers(0, 12, (8, *shape), np.int32))
  where = jax.tree.map(lambda leaf: leaf.sharding, loop.abstract_state(experiment, mesh))
  before = jax.tree.map(np.asarray, state.networks)
  for step in range(2):
    kind = experiment.kind_of(step)
    update = steps.make_step(experiment, section.train, where, sharding.replicated(mesh), kind)
    state, metrics, healthy = update(state, frozen, batch, jax.random.key(1))
    assert bool(healthy) and all(np.isfinite(value) for value in metrics.values())
  for name, network in state.networks.items():
    moved = jax.tree.map(lambda a, b: bool(np.any(a != np.asarray(b))), before[name].params, network.params)
    assert any(jax.tree.leaves(moved)), name
  read = {**frozen, **state.eval_params}
  run = jax.jit(draw.sampler(experiment))
  hints = {name: rng.random((10, *experiment.inputs[name].shape), np.float32) for name in experiment.borrowed}
  given = lambda rows: {name: jnp.asarray(value[rows]) for name, value in hints.items()}
  images, finite = run(read, jnp.arange(4), given([0, 1, 2, 3]), 0)
  assert finite.tolist() == [True] * 4
  assert images['x0'].shape == (4, 8, 8, 1)
  assert all(image.dtype == np.uint8 and int(image.max()) > int(image.min()) for image in images.values())
  # image 2 is the same among others, whatever it is made of
  others, _ = run(read, jnp.asarray([7, 2, 9, 5]), given([7, 2, 9, 5]), 0)
  assert int(np.max(np.abs(others['x0'][1].astype(int) - images['x0'][2].astype(int)))) <= 1


@functools.cache
def guided():
  return build(*CASES['label_and_code_with_two_terms'])[0]


def test_two_terms_drop_what_they_name():
  """The label alone keeps shift, image and code; all conditions lose them."""
  denoiser = guided().denoiser
  assert [(term.weight, term.without) for term in denoiser.terms] == [
    (0.5, ('vae', 'label')), (1.0, ('label',))
  ]  # fmt: skip
  assert denoiser.calls_per_step == 3
  assert set(denoiser.conditions.without(('label',), 2)) == {'label'}
  assert set(denoiser.conditions.without(('vae', 'label'), 2)) == {'x0_vae', 'z', 'label'}


def test_every_condition_is_dropped_by_its_own_chance():
  drop = guided().denoiser.conditions.drop(jax.random.key(0), 4000)
  np.testing.assert_array_equal(drop['x0_vae'], drop['z'])
  both = float(jnp.mean(drop['x0_vae'] & drop['label']))
  assert float(jnp.mean(drop['label'])) == pytest.approx(0.1, abs=0.02)
  assert both == pytest.approx(0.01, abs=0.006)


def test_a_row_of_samples_per_class():
  experiment = build(*CASES['label'])[0]
  assert experiment.num_groups == 10
  keys = draw.image_keys(0, jnp.arange(12))
  drawn = experiment.draw({}, keys, jnp.arange(12))
  np.testing.assert_array_equal(drawn['label'], np.arange(12) % 10)
