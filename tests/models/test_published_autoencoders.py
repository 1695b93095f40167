"""Parameters of published autoencoders with codes, through the presets of the configs; no program is made."""

import importlib
import pathlib
import sys

import jax
import pytest
from some_slow import some_slow

from vaediff import experiments
from vaediff.machine import cost
from vaediff.models.patch_discriminator import PatchDiscriminator

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent.parent))
code_papers = importlib.import_module('configs.code_papers')


def made(variant):
  config = importlib.import_module('configs.celeba256').get_config(variant)
  return config, experiments.build(config, config.stages[-1])


def counts(model):
  params = jax.eval_shape(model.init, jax.random.key(0))
  quant, post = params['encoder'].pop('quant_conv'), params['decoder']['body'].pop('post_quant_conv')
  codes = params.pop('codes', None)
  parts = (params['encoder'], params['decoder'], quant, post, *([codes] if codes is not None else []))
  return tuple(map(cost.num_parameters, parts))


# encoder, decoder, quant_conv, post_quant_conv, codes; and their sum
PUBLISHED = {
  'vqgan_f16_1024': ((29_298_176, 42_449_795, 65_792, 65_792, 262_144), 72_141_699),
  'vqgan_f16_16384': ((29_298_176, 42_449_795, 65_792, 65_792, 4_194_304), 76_073_859),
  'ldm_vq_f4': ((22_337_411, 32_960_771, 12, 12, 24_576), 55_322_782),
  'ldm_vq_f8': ((27_397_764, 40_253_955, 20, 20, 65_536), 67_717_295),
  'ldm_vq_f16': ((28_155_144, 41_307_011, 72, 72, 131_072), 69_593_371),
  'llamagen_vq16': ((29_298_176, 42_449_795, 2_056, 2_304, 131_072), 71_883_403),
  'llamagen_vq8': ((28_559_232, 41_415_171, 2_056, 2_304, 131_072), 70_109_835),
}


@pytest.mark.parametrize('name', some_slow(PUBLISHED, 'vqgan_f16_1024', 'llamagen_vq8'))
def test_presets_have_the_published_counts(name):
  parts, total = PUBLISHED[name]
  config, experiment = made(name)
  assert config.stages == ('vqgan',)
  found = counts(experiment.autoencoder)
  assert found == parts and sum(found) == total
  assert f'{total:,} parameters' in code_papers.PRESETS[name].__doc__
  judge = jax.eval_shape(experiment.discriminator.init, jax.random.key(0))
  assert cost.num_parameters(judge) == 2_765_633


def test_every_preset_is_counted():
  relaxed = {'vqgan_f8_gumbel'}  # which has logits too: tests/models/test_dvae.py
  assert {*PUBLISHED, *relaxed} == set(code_papers.PRESETS)


def test_the_kl_autoencoder_of_latent_diffusion():
  config = importlib.import_module('configs.celeba256').get_config('latent')
  code_papers.ldm_kl_f8(config.autoencoder)
  found = counts(experiments.build(config, 'autoencoder').autoencoder)
  assert found == (34_163_592, 49_490_179, 72, 20) and sum(found) == 83_653_863


OTHERS = ('cifar10', 'emoji64', 'celeba64', 'celebahq128', 'afhq256', 'celeba256', 'lsun_church256')


@pytest.mark.parametrize('stage', ['vqvae', 'vqgan'])
@pytest.mark.parametrize('name', some_slow(['digits', 'fashion_mnist', *OTHERS], 'digits'))
def test_the_networks_of_every_data_set_fit_its_images(name, stage):
  config = importlib.import_module(f'configs.{name}').get_config(stage)
  experiment = experiments.build(config, stage)
  for model in experiment.networks.values():
    jax.eval_shape(model.init, jax.random.key(0))
  assert experiment.bottleneck.kind == 'vq' and ('discriminator' in experiment.networks) == (stage == 'vqgan')


def test_the_discriminator_of_grey_patches():
  shape = jax.ShapeDtypeStruct((1, 256, 256, 1), 'float32')
  params = jax.eval_shape(PatchDiscriminator().init, jax.random.key(0), shape)
  assert cost.num_parameters(params) == 2_763_585


def test_the_stage_is_the_first_of_them():
  _, experiment = made('vqgan')
  assert sum(counts(experiment.autoencoder)) == 72_141_699
