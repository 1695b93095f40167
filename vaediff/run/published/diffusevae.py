"""DiffuseVAE's VAE and U-Nets as the stages of a run."""

import re
from typing import Any

import numpy as np

from vaediff.errors import UserError
from vaediff.models.vae_blocks import plan_vae
from vaediff.run.published.base import SECTION, Import, attended
from vaediff.weights.families import Part
from vaediff.weights.state_dicts import StateDict

OF_VAE = {
  'enc_block_str': 'encoder_blocks',
  'dec_block_str': 'decoder_blocks',
  'enc_channel_str': 'encoder_channels',
  'dec_channel_str': 'decoder_channels',
}
"""Hyper-parameters in a file, and the fields that they are."""
NAMED = {'form1': 'formulation1', 'form2': 'formulation2', 'uncond': 'none'}
"""Parts of the names of published files, and the condition that they say."""
HEADS = {True: 8, False: 1}
"""Of the published networks 'openai', by whether they are conditional."""
TABLE = 'online_network.betas'
LEAST_BETA, MOST_BETA, TABLE_STEPS = 1e-4, 0.02, 1000


def layers_of(model: dict[str, Any]) -> dict[str, list[tuple[str, str, int]]]:
  """Returns (kind, name, value) of the layers of each half of a VAE, by its `model` section."""
  strings = {field: model[field] for field in OF_VAE.values()}
  plan = plan_vae(**strings, latent_dim=model['latent_dim'], dense_stem=model['stem'] == 'dense')
  return {
    half: [(layer.kind, layer.name, layer.value) for layer in getattr(plan, half)]
    for half in ('encoder', 'decoder')
  }


def adopt_vae(task: Import, file: StateDict, part: Part, stage: str) -> tuple[dict[str, Any], str]:
  """Returns what a VAE's table needs beside shapes, and its origin, once the config says the same as it.

  Raises:
    UserError: when it is of another size than the config says.
  """
  fields, settings = part.fields(), file.settings
  found = {f'model.{ours}': str(settings[theirs]) for theirs, ours in OF_VAE.items() if theirs in settings}
  found['model.latent_dim'] = fields['latent_dim']
  task.lay(stage, found, file.path)
  if 'model.encoder_blocks' not in found:
    task.say(stage, 'model.encoder_blocks', task.value(stage, 'model.encoder_blocks'), 'the config')
  task.take(stage, 'model.stem', 'nearest', 'as published')
  if 'alpha' in settings:
    task.take(stage, 'loss.beta', float(settings['alpha']), 'hyper-parameters in the file')
  side = int(re.match(r'\d+', task.value(stage, 'model.encoder_blocks')).group())
  check_images(task, file, stage, side, fields['image_channels'])
  task.say(stage, 'training images, flips', 'unknown', 'the file does not say')
  return {'layers': layers_of(task.config[stage].model.to_dict())}, 'diffusevae'


def check_images(task: Import, file: StateDict, stage: str, side: int, channels: int) -> None:
  """Makes the config's images those of a network; raises UserError where they are others."""
  data = task.config.data
  if (data.image_size, data.channels) == (side, channels):
    return
  if task.settings.sizes == 'config':
    raise UserError(
      f'{file.path} holds a network for images of {side} pixels and {channels} channels, and the config has '
      f'data.image_size = {data.image_size}, data.channels = {data.channels}: name the config that it is'
      f' of, or '
      f'take its sizes with --config.{SECTION}.sizes=file'
    )
  data.image_size, data.channels = side, channels
  task.say(stage, 'data.image_size', side, 'strings and shapes in the file')


def adopt_unet(task: Import, file: StateDict, part: Part, stage: str) -> tuple[dict[str, Any], str]:
  """Returns what a U-Net's table needs beside shapes, and its origin, once the config says the same as it.

  Raises:
    UserError: when it is of another size, or of another formulation, than the config says.
  """
  fields, config = part.fields(), task.config
  channels = config.data.channels
  if fields['outputs'] != channels:
    raise UserError(
      f'{file.path} holds a U-Net with {fields["outputs"]} outputs for images of {channels} channels: such'
      f' as '
      "guided diffusion's, with learned variances, which has no place here"
    )
  task.check_groups(part, fields['narrowest'], file.path)
  sizes = ('variant', 'channels', 'channel_multipliers', 'num_res_blocks')
  task.lay(stage, {f'model.{field}': fields[field] for field in sizes}, file.path)
  sides = attended(fields['attends'], config.data.image_size)
  task.take(
    stage, 'model.attention_resolutions', sides, f'keys in the file, at {config.data.image_size} pixels'
  )
  task.take(stage, 'model.scale_shift_norm', fields['scale_shift_norm'], 'shapes in the file')
  conditional = take_condition(task, file, stage, fields)
  take_heads(task, file, stage, conditional=conditional)
  for field, value in (('space', 'pixel'), ('diffusion.prediction', 'eps'), ('diffusion.schedule', 'linear'),
                       ('diffusion.variance', 'fixed')):  # fmt: skip
    if task.value(stage, field) != value:
      raise UserError(
        f'config.{stage}.{field} is {task.value(stage, field)!r}; the published networks have {value!r}'
      )
    task.say(stage, field, value, 'as published')
  check_table(file)
  task.take(stage, 'sample.recompute_eps', False, 'as the published DDIM')
  for field in ('model.dropout', 'sample.variance', 'sample.temperature'):
    task.say(stage, field, task.value(stage, field), 'the config')
  return {}, 'diffusevae'


def take_condition(task: Import, file: StateDict, stage: str, fields: dict[str, Any]) -> bool:
  """Sets what the U-Net is conditioned on; returns whether it is at all.

  Raises:
    UserError: when shapes, name and config contradict each other.
  """
  channels = task.config.data.channels
  known = {channels: False, 2 * channels: True}
  if fields['inputs'] not in known:
    raise UserError(
      f'{file.path} holds a U-Net that reads {fields["inputs"]} channels: {channels}, or {2 * channels}'
      f' with the '
      "VAE's image beside the state, have a place here"
    )
  conditional = known[fields['inputs']]
  asked, says = task.value(stage, 'diffusion.condition'), named_condition(file)
  if conditional != (asked != 'none'):
    mend = 'unconditional' if not conditional else 'formulation1 or formulation2'
    raise UserError(
      f'{file.path} holds a U-Net that reads'
      f' {"x_t and the image of a VAE" if conditional else "x_t alone"}, and '
      f'config.{stage}.diffusion.condition is {asked!r}: take the config with the variant {mend}'
    )
  if not conditional:
    task.say(stage, 'diffusion.condition', 'none', 'shapes in the file')
  elif task.settings.formulation:
    task.take(stage, 'diffusion.condition', task.settings.formulation, f'config.{SECTION}.formulation')
  elif says and says != asked:
    raise UserError(
      f'{file.path.name} says {says!r} by its name, and config.{stage}.diffusion.condition is {asked!r};'
      f' the file '
      f'itself does not tell them apart. Take the config with the variant {says}, or say which it is with '
      f'--config.{SECTION}.formulation={asked}'
    )
  else:
    task.say(stage, 'diffusion.condition', asked, "the file's name" if says else 'the config')
  take_code(task, file, stage, fields['latent_dim'])
  if conditional and task.value(stage, 'diffusion.condition_dropout'):
    raise UserError(
      f'config.{stage}.diffusion.condition_dropout is '
      f'{task.value(stage, "diffusion.condition_dropout")}: no published network has a learned null condition'
    )
  return conditional


def take_code(task: Import, file: StateDict, stage: str, latent_dim: int) -> None:
  """Sets whether the U-Net reads the code."""
  task.take(stage, 'diffusion.z_conditioning', bool(latent_dim), 'shapes in the file')
  if not latent_dim:
    return
  named = task.value(stage, 'vae.stage')
  known = task.config[named].model.latent_dim if named in task.config else 0
  if known != latent_dim:
    raise UserError(
      f'{file.path} holds a U-Net that reads a code of {latent_dim} numbers, and'
      f' config.{named}.model.latent_dim '
      f'is {known}'
    )


def named_condition(file: StateDict) -> str:
  """Returns the condition that a file's name says; '' where it says none, or several."""
  said = {
    value for part, value in NAMED.items() if re.search(rf'(^|[^a-z]){part}([^a-z0-9]|$)', file.path.name)
  }
  return said.pop() if len(said) == 1 else ''


def take_heads(task: Import, file: StateDict, stage: str, *, conditional: bool) -> None:
  """Sets the number of attention heads, which no file says: wrong ones would load and draw worse images."""
  named = re.search(r'nheads=(\d+)', file.path.name)
  if task.settings.num_heads:
    task.take(stage, 'model.num_heads', task.settings.num_heads, f'config.{SECTION}.num_heads')
  elif named:
    task.take(stage, 'model.num_heads', int(named[1]), "the file's name")
  else:
    task.take(stage, 'model.num_heads', HEADS[conditional], 'as published')
  task.take(stage, 'model.head_channels', 0, 'as published')
  task.take(stage, 'model.coordinates', False, 'as published')


def check_table(file: StateDict) -> None:
  """Raises UserError where the file's betas are not those of the schedule 'linear'."""
  if TABLE not in file.shapes:
    return
  betas, wanted = file.read([TABLE])[TABLE], np.linspace(LEAST_BETA, MOST_BETA, TABLE_STEPS)
  if betas.shape != wanted.shape or not np.allclose(betas, wanted, rtol=1e-5, atol=0):
    raise UserError(
      f'{file.path} was trained with other betas than {TABLE_STEPS} from {LEAST_BETA} to {MOST_BETA}: '
      f'{betas.shape[0]} from {betas[0]:.3g} to {betas[-1]:.3g}'
    )
