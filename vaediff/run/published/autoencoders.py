"""Autoencoders of latent diffusion, taming-transformers and LDDGAN as the network of a stage."""

import dataclasses
from typing import Any

import jax

from vaediff.errors import UserError
from vaediff.experiments.base import Experiment, TrainState
from vaediff.run.published.base import Import, attended
from vaediff.run.published.diffusevae import check_images
from vaediff.weights.families import Part
from vaediff.weights.state_dicts import StateDict

LATENT_CIFAR = {'latent_channels': 4, 'channel_multipliers': (1, 2)}
"""Of LDDGAN's autoencoder of CIFAR-10, of which its links of other data sets lead to the file."""


def adopt(task: Import, file: StateDict, part: Part, stage: str) -> tuple[dict[str, Any], str]:
  """Returns what an autoencoder's table needs beside shapes, and its origin, once the config says the same.

  Raises:
    UserError: when it is of another size than the config says.
  """
  fields, config = part.fields(), task.config
  is_cifar = all(fields[name] == value for name, value in LATENT_CIFAR.items())
  if is_cifar and config.data.image_size > 64 and task.settings.sizes == 'config':
    raise UserError(
      f"{file.path} is an autoencoder of 2 levels and 4 channels, as LDDGAN's of CIFAR-10, and the config"
      f' has images of {config.data.image_size} pixels. The links of its CelebA-HQ and LSUN files lead to the'
      f' CIFAR-10 '
      "ones (issue 7 of its repository); latent diffusion's vq-f4 and kl-f8 are of the settings that it names"
    )
  task.check_groups(part, fields['narrowest'], file.path)
  sizes = ('latent_channels', 'channels', 'channel_multipliers', 'num_res_blocks', 'bottleneck',
           'codebook_size', 'inner_channels')  # fmt: skip
  task.lay(stage, {f'model.{name}': fields[name] for name in sizes}, file.path)
  check_images(task, file, stage, config.data.image_size, fields['inputs'])
  sides = attended(fields['attends'], config.data.image_size)
  task.take(
    stage, 'model.attention_resolutions', sides, f'keys in the file, at {config.data.image_size} pixels'
  )
  task.say(stage, 'model.tanh_out', task.value(stage, 'model.tanh_out'), 'the config')
  task.take(stage, 'model.normalized_codes', False, 'as published')
  if not fields['middle']:
    task.say(stage, 'attention in the middle', 'adds zeros', 'the file has none')
  # what the loss needs beside the network is in no file: a fresh discriminator, weights of LPIPS
  task.take(stage, 'loss.adversarial_weight', 0.0, 'its discriminator has no place here')
  task.take(stage, 'loss.perceptual', '', 'its weights are others')
  if fields['bottleneck'] == 'vq':
    task.take(stage, 'loss.codebook', 'gradient', 'as published')
    task.take(stage, 'loss.restart_below', 0.0, 'as published')
  origin = 'lddgan' if fields['bottleneck'] == 'none' or is_cifar else 'ldm'
  return {'middle': fields['middle']}, origin


def with_codebook(experiment: Experiment, state: TrainState) -> TrainState:
  """Returns the state with what the bottleneck keeps of trained parameters."""
  params = state.networks['autoencoder'].params
  kept = jax.jit(experiment.bottleneck.trained)(params)
  return dataclasses.replace(state, extra={**state.extra, **kept})
