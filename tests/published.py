"""Fixtures of published networks: which config each is imported with, and where it lies."""

import functools
import importlib
import os
import pathlib
import sys

import jax
import numpy as np

from vaediff.run import adopting
from vaediff.weights import state_dicts

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
HERE = pathlib.Path(__file__).parent / 'fixtures'
ELSEWHERE = os.environ.get('VAEDIFF_FIXTURES', '')
STAGE1, STAGE2 = 'containers/diffusevae_stage1_lightning14', 'containers/diffusevae_stage2_lightning14'
OTHER_VAE = {'refiner.vae.workdir': 'elsewhere'}
"""A U-Net alone: its VAE is of another run."""
VAE_16 = {
  'vae.model.encoder_blocks': '16x1,16d2,16t8,8d2,8t4,4d4,4t1,1x1',
  'vae.model.decoder_blocks': '1x1,1u4,1t4,4u2,4t8,8u2,8t16,16x1',
  'vae.model.encoder_channels': '16:64,8:16,4:16,1:16',
  'vae.model.decoder_channels': '16:64,8:16,4:16,1:16',
}
VAE_8 = {
  'vae.model.encoder_blocks': '8x1,8d2,8t4,4d4,4t1,1x1',
  'vae.model.decoder_blocks': '1x1,1u4,1t4,4u2,4t8,8x1',
  'vae.model.encoder_channels': '8:8,4:8,1:16',
  'vae.model.decoder_channels': '8:8,4:8,1:16',
}
SMALL_VAE = {
  'vae.model.encoder_blocks': '16x2,16d2,16t8,8x1,8d2,8t4,4,4d4,4t1,1x2',
  'vae.model.decoder_blocks': '1x1,1u4,1t4,4x2,4u2,4t8,8x2,8u2,8t16,16x3',
  'vae.model.encoder_channels': '16:64,8:24,4:32,1:48',
  'vae.model.decoder_channels': '16:64,8:24,4:32,1:48',
  'vae.model.latent_dim': 48,
}
CODE_20 = {
  'vae.model.encoder_channels': '16:8,4:8,1:16',
  'vae.model.decoder_channels': '16:8,4:8,1:20',
  'vae.model.latent_dim': 20,
  'vae.model.decoder_blocks': '1x1,1u4,1t4,4u4,4t16,16x1',
}
CONFIGS = {
  STAGE1: ('debug', {}),
  STAGE2: ('debug', {**VAE_16, 'adopt.num_heads': 2}),
  'diffusevae_vae_small/small': ('debug', SMALL_VAE),
  'diffusevae_unet_ddim/small_cond': ('ddim_unet,debug', {**OTHER_VAE, 'adopt.num_heads': 4}),
  'diffusevae_unet_openai/small_cond_z': ('z,debug', {**OTHER_VAE, **CODE_20, 'adopt.num_heads': 4}),
  'diffusevae_sampling/sampling': (
    'debug', {**OTHER_VAE, **VAE_8, 'adopt.num_heads': 2, 'data.image_size': 8},
  ),
  'ddgan_content/content': ('ddgan,debug', {'data.image_size': 8}),
  'ddgan_generator/generator': ('ddgan,debug', {}),
  'wavediff_generator/wavelet': ('wavelet,debug', {'data.image_size': 32, 'adopt.band_order': 'wavecnet'}),
  'wavediff_generator/plain_12_channels': (
    'wavelet,debug', {'data.image_size': 32, 'adopt.band_order': 'wavecnet'},
  ),
  **dict.fromkeys(
    ('ldm_autoencoder_vq/vq', 'ldm_autoencoder_kl/kl', 'lddgan_autoencoder_free/tanh'),
    ('latent,debug', {'autoencoder.model.tanh_out': False}),
  ),
}  # fmt: skip
"""By fixture: the variant of configs/cifar10.py, and changes."""


def file_of(name):
  """Returns the file of a fixture; None where it is not here."""
  for folder in filter(None, (str(HERE), ELSEWHERE)):
    path = pathlib.Path(folder) / f'{name}.pt'
    if path.exists():
      return path
  return None


NAMES = tuple(name for name in CONFIGS if file_of(name))
"""Those that are here."""


def config_of(name, path=None, more='', **changes):
  """Returns the config that a fixture is imported with; `more` are variants of it."""
  variant, own = CONFIGS[name]
  variant = ','.join(filter(None, (variant, more)))
  config = importlib.import_module('configs.cifar10').get_config(variant)
  shared = {'adopt.sizes': 'file', 'adopt.check_groups': False, 'adopt.path': str(path or file_of(name))}
  config.update_from_flattened_dict({**shared, **own, **changes})
  return config


@functools.cache
def planned(name):
  """Returns the run that a fixture becomes."""
  config = config_of(name)
  return adopting.planned(config, tuple(config.stages))


def arrays_of(name):
  """Returns inputs and outputs of a fixture, maps as NHWC, vectors of one position as vectors."""
  with np.load(file_of(name).with_suffix('.npz')) as stored:
    found = dict(stored)
  return {key: np.moveaxis(value, 1, -1) if value.ndim == 4 else value for key, value in found.items()}


def tensors_of(path):
  """Returns all tensors of a file by name."""
  file = state_dicts.opened(path)
  return file.read(file.shapes)


def flat(tree):
  """Returns the leaves of a tree by path."""
  return {path: np.asarray(leaf) for path, leaf in adopting.leaves_of(tree)}


def applied(experiment, network, params, *args, **kwargs):
  """Returns what a network, or a method of it, makes of arrays."""
  model = experiment.networks[network]
  made = jax.jit(lambda params, args: model.apply(params, *args, **kwargs))(params, args)
  return jax.tree.map(np.asarray, made)
