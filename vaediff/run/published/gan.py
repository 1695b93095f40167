"""Generators and discriminators of denoising GANs as networks of a stage."""

import math
from typing import Any

from ml_collections import ConfigDict

from vaediff.errors import UserError
from vaediff.run.published.base import SECTION, Import, attended
from vaediff.run.published.diffusevae import check_images
from vaediff.weights.families import Part
from vaediff.weights.state_dicts import StateDict

ORIGINS = {'pixel': 'ddgan', 'wavelet': 'wavediff', 'latent': 'lddgan'}
WAVECNET_SIDES = (256, 1024)
"""Sizes of faces of which WaveDiff trained with the order of bands that is ours."""
LATENT_SCALES = {'cifar10': 105.0, 'celeb_a_hq/256': 6.0, 'lsun/church_outdoor': 60.0}
"""What LDDGAN divides latents by, by data set."""
STRIDED = 'strided'
"""The order of the examples of a group in the published discriminators."""
GROUP_SIZE = 4
"""How many examples a group has there."""


def adopt_generator(task: Import, file: StateDict, part: Part, stage: str) -> tuple[dict[str, Any], str]:
  """Returns what a generator's table needs beside shapes, and its origin, once the config says the same.

  Raises:
    UserError: when it is of another size or space than the config says.
  """
  fields, config = part.fields(), task.config
  if 'image_size' in file.settings and config[stage].space == 'pixel':
    check_images(task, file, stage, int(file.settings['image_size']), config.data.channels)
  side, channels = space_of(config, stage)
  check_mislink(file, config, fields)
  patch = patch_of(file, stage, fields, channels, config[stage].space)
  names = ('network', 'channels', 'channel_multipliers', 'num_res_blocks', 'latent_dim', 'num_mapping_layers',
           'mapping_dim')  # fmt: skip
  sizes = {f'model.{name}': fields[name] for name in names} | {'model.patch_size': patch}
  if fields['network'] == 'wavelet_ncsnpp':
    sizes['model.wavelet.use_frequency_skips'] = fields['use_frequency_skips']
  task.lay(stage, sizes, file.path)
  if fields['network'] == 'wavelet_ncsnpp':
    task.take(stage, 'model.wavelet.use_residual', True, 'keys in the file')
    task.take(stage, 'model.wavelet.use_frequency_bottleneck', True, 'as published')
  sides = attended(fields['attends'], side // patch)
  task.take(stage, 'model.attention_resolutions', sides, f'keys in the file, at {side // patch} pixels')
  take_arguments(task, file, stage)
  for name in ('diffusion.beta_min', 'diffusion.beta_max'):
    task.say(stage, name, task.value(stage, name), 'the config')
  keep_learning(task, stage)
  scale_latents(task, stage)
  order = {'channels': channels, 'patch': patch, 'swapped': swapped(task, file, stage)}
  return {'order': order}, ORIGINS[config[stage].space]


def space_of(config: ConfigDict, stage: str) -> tuple[int, int]:
  """Returns side and channels of the maps of a stage's space."""
  section, data = config[stage], config.data
  if section.space == 'wavelet':
    return data.image_size // 2, 4 * data.channels
  if section.space == 'latent':
    model = config[section.autoencoder.stage].model
    return data.image_size >> (len(model.channel_multipliers) - 1), model.latent_channels
  return data.image_size, data.channels


def patch_of(file: StateDict, stage: str, fields: dict[str, Any], channels: int, space: str) -> int:
  """Returns the side of the patches; raises UserError where the maps are not those of the space."""
  patch = math.isqrt(fields['inputs'] // channels)
  if fields['inputs'] != fields['outputs'] or patch**2 * channels != fields['inputs']:
    raise UserError(
      f'{file.path} holds a generator that reads {fields["inputs"]} channels and gives {fields["outputs"]}; '
      f'config.{stage}.space is {space!r}, whose maps have {channels}. Take the config of its data set with'
      ' the variant ddgan, wavelet or latent'
    )
  return patch


def check_mislink(file: StateDict, config: ConfigDict, fields: dict[str, Any]) -> None:
  """Raises UserError for LDDGAN's CIFAR-10 generator where another is wanted: its links lead to it."""
  is_cifar = (fields['latent_dim'], fields['inputs'], fields['channels']) == (50, 4, 128)
  if is_cifar and len(fields['channel_multipliers']) == 3 and config.data.image_size > 32:
    raise UserError(
      f"{file.path} is LDDGAN's generator of CIFAR-10 (z of 50, 4 channels of latents, 3 levels), and the"
      f' config '
      f'has images of {config.data.image_size} pixels. The links of its CelebA-HQ and LSUN files lead to the '
      'CIFAR-10 ones (issue 7 of its repository). Use configs/cifar10.py:latent, or find the true file'
    )


def take_arguments(task: Import, file: StateDict, stage: str) -> None:
  """Sets what arguments of the training program in the file say; notes what is assumed."""
  arguments = file.settings
  if 'num_timesteps' in arguments:
    task.take(stage, 'diffusion.num_steps', int(arguments['num_timesteps']), 'arguments in the file')
  else:
    task.say(stage, 'diffusion.num_steps', task.value(stage, 'diffusion.num_steps'), 'the config')
  if 'not_use_tanh' in arguments:
    task.take(stage, 'model.bounded', not arguments['not_use_tanh'], 'arguments in the file')
  else:
    task.say(stage, 'model.bounded', task.value(stage, 'model.bounded'), 'the config')


def keep_learning(task: Import, stage: str) -> None:
  """Lets both optimizers go on at the rate at which the schedule of the training ended."""
  for name in ('optim', 'optim_discriminator'):
    if task.value(stage, f'{name}.schedule') != 'constant':
      rate = task.value(stage, f'{name}.end_learning_rate')
      task.take(stage, f'{name}.schedule', 'constant', 'the schedule has ended')
      task.take(stage, f'{name}.learning_rate', rate, 'where the schedule ended')


def scale_latents(task: Import, stage: str) -> None:
  """Notes what the latents are divided by: a constant there, what was measured here."""
  section = task.config[stage]
  if section.space != 'latent' or section.autoencoder.scaling != 'max':
    return
  name, scale = section.autoencoder.stage, task.settings.latent_scale
  where = f'config.{SECTION}.latent_scale'
  if not scale:
    scale, where = LATENT_SCALES.get(task.config.data.name, 0.0), "as LDDGAN's scripts"
  if not scale:
    raise UserError(
      f'LDDGAN divides latents by a constant, which no file holds; set --config.{SECTION}.latent_scale '
      f'({", ".join(f"{value:g} for {data}" for data, value in LATENT_SCALES.items())})'
    )
  task.scales[name] = float(scale)
  task.say(stage, 'latents are divided by', float(scale), where)


def swapped(task: Import, file: StateDict, stage: str) -> bool:
  """Returns whether the second and the third band change places, and notes the order."""
  if task.config[stage].space != 'wavelet':
    return False
  order, where = task.settings.band_order, f'config.{SECTION}.band_order'
  if not order and 'use_pytorch_wavelet' in file.settings:
    flag = bool(file.settings['use_pytorch_wavelet'])
    order, where = band_order(flag), 'arguments in the file'
  elif not order:
    order, where = published_order(task.config), 'as published for this data set'
  task.config[SECTION].band_order = order  # whoever exports under the published names undoes it
  task.say(stage, 'order of the bands', order, where)
  return order == band_order(True)


def band_order(pytorch_wavelets: bool) -> str:
  """Returns the name of an order of bands, by the flag of WaveDiff's program."""
  return 'pytorch_wavelets' if pytorch_wavelets else 'wavecnet'


def published_order(config: ConfigDict) -> str:
  """Returns the order of bands of WaveDiff's published runs on a data set."""
  faces = 'celeb' in f'{config.data.name}{config.data.path}{config.name}'.lower()
  return band_order(not (faces and config.data.image_size in WAVECNET_SIDES))


def adopt_discriminator(task: Import, file: StateDict, part: Part, stage: str) -> tuple[dict[str, Any], str]:
  """Returns nothing, and its origin, once the config says the same as a discriminator's shapes."""
  fields = part.fields()
  _, channels = space_of(task.config, stage)
  if fields['inputs'] != 2 * channels:
    raise UserError(
      f'{file.path} holds a discriminator that reads {fields["inputs"]} channels; of two states in the space '
      f'{task.config[stage].space!r} they are {2 * channels}'
    )
  sizes = ('variant', 'channels', 'time_dim', 'num_layers')
  task.lay(stage, {f'discriminator.{name}': fields[name] for name in sizes}, file.path)
  task.take(stage, 'discriminator.group_order', STRIDED, 'as published')
  task.take(stage, 'discriminator.group_size', GROUP_SIZE, 'as published')
  return {}, ORIGINS[task.config[stage].space]
