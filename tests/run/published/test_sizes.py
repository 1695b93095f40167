"""Networks of the published sizes: every parameter has a name, and the shapes say what the config says."""

import importlib
import pathlib
import sys

import pytest

from vaediff import experiments
from vaediff.run import adopting
from vaediff.run.published import exported
from vaediff.run.published.base import attended
from vaediff.weights import families

sys.path.insert(0, str(pathlib.Path(__file__).parents[3]))
UNET = ('variant', 'channels', 'channel_multipliers', 'num_res_blocks', 'scale_shift_norm')
GENERATOR = (
  'network',
  'channels',
  'channel_multipliers',
  'num_res_blocks',
  'latent_dim',
  'num_mapping_layers',
)
LATENT = (
  'latent_channels',
  'channels',
  'channel_multipliers',
  'num_res_blocks',
  'bottleneck',
  'codebook_size',
)
CASES = [
  ('cifar10', 'published', 'refiner', 'denoiser', UNET),
  ('cifar10', 'large,ddim_unet', 'refiner', 'denoiser', UNET),
  ('celeba256', 'z', 'refiner', 'denoiser', UNET),
  ('cifar10', 'ddgan', 'ddgan', 'generator', GENERATOR),
  ('celeba256', 'wavelet', 'ddgan', 'generator', GENERATOR),
  ('lsun_church256', 'latent', 'ddgan', 'generator', GENERATOR),
  ('celeba256', 'ldm_vq_f8', 'vqgan', 'autoencoder', LATENT),
  ('lsun_church256', 'latent', 'autoencoder', 'autoencoder', LATENT),
  ('celeba256', 'ddgan', 'ddgan', 'discriminator', ()),
  ('ffhq128', '', 'vae', 'vae', ()),
]


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'variant', 'stage', 'network', 'same'), CASES)
def test_shapes_say_what_the_config_says(name, variant, stage, network, same):
  config = importlib.import_module(f'configs.{name}').get_config(variant)
  own = adopting.shapes_of(experiments.build(config, stage), network)
  family = exported.family_of(config, stage, network)
  entries = family.entries(own, exported.options_of(config, stage, family, {}))
  theirs = {entry.name: entry.official_shape(own[entry.path]) for entry in entries}
  assert len(theirs) == len(own) == len(entries)
  (part,) = families.parts(theirs)
  assert part.family == family
  fields, model = part.fields(), config[stage].model
  for field in same:
    assert fields[field] == model[field], field
  if 'attends' in fields:
    side = {'ddgan': {'pixel': 1, 'wavelet': 2, 'latent': 8}}.get(stage, {}).get(
      config[stage].get('space'), 1
    )
    sides = attended(fields['attends'], config.data.image_size // side)
    assert set(sides) == set(model.attention_resolutions)
  if fields.get('narrowest'):
    assert fields['narrowest'] >= 128 and fields['narrowest'] % 32 == 0
