"""Configs that earlier versions stored, read as this one: other names, new keys with the value of before."""

import copy
from collections.abc import Iterator
from typing import Any

from vaediff.errors import UserError

AUTOENCODER = {
  'stage': 'autoencoder',
  'workdir': '',
  'scaling': 'std',
  'posterior': 'sample',
  'decoder_stage': '',
}
"""What a diffusion in pixels says of latents: nothing reads it."""
RELAXED = {
  'model': {'network': 'taming', 'logits_scale': 0.1, 'pixel_map': 0.0},
  'loss': {
    'pixel_weight': 1.0,
    'least_scale': 0.006737947,
    'tau_start': 1.0,
    'tau_end': 1 / 16,
    'tau_steps': 150_000,
    'kl_token_weight': 0.01,
    'kl_warmup_steps': 0,
    'straight_through': False,
  },
}
"""What an autoencoder without relaxed codes says of them: nothing reads it, but for a weight of 1."""
QUANTIZE = {
  'stage': '',
  'weights': 'int8',
  'activations': 'int8',
  'method': 'minmax',
  'reads': '',
  'keep_float': (),
  'time_buckets': 8,
  'num_images': 64,
  'ranges': 'minmax',
  'percentile': 99.99,
  'correction': 'none',
  'correction_images': 64,
  'calibration': {
    'kind': 'steps',
    'num_samples': 256,
    'steps': 8,
    'mean': 0.4,
    'std': 0.4,
    'seed': 1,
    'batch_size': 64,
  },
  'adaround': {
    'num_steps': 500,
    'batch_size': 32,
    'learning_rate': 1e-2,
    'weight': 0.01,
    'warmup': 0.2,
    'beta_start': 20.0,
    'beta_end': 2.0,
  },
  'learned_ranges': {'num_steps': 0, 'batch_size': 32, 'learning_rate': 2e-3},
}
"""How a stage is quantized, which earlier versions could not."""
EXPORT = {
  'format': 'onnx',
  'weights': 'float32',
  'batch_size': 1,
  'output': 'float32',
  'num_images': 64,
  'reduce_range': 'auto',
  'names': 'vaediff',
  'platforms': ('cpu', 'cuda', 'tpu'),
  'any_batch': True,
}
"""What is written for other programs, which earlier versions could not."""
EDIT = {
  'image': '',
  'caption': '',
  'name': '',
  'etas': (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
  'num_images': 20,
  'num_seeds': 1,
  'clip': {'stage': '', 'workdir': ''},
  'embedding': {'num_steps': 100, 'batch_size': 16, 'learning_rate': 3e-2},
  'finetune': {'num_steps': 50, 'batch_size': 16, 'learning_rate': 1e-4},
}
"""How a picture is edited, which earlier versions could not."""
ADOPT = {
  'path': '',
  'sizes': 'config',
  'weights': 'ema',
  'formulation': '',
  'num_heads': 0,
  'band_order': '',
  'latent_scale': 0.0,
  'step': 0,
  'check_groups': True,
}
"""What is imported of published files, which earlier versions could not."""
VARY = {'image': '', 'num_images': 4, 'num_variations': 7, 'num_steps': 50, 'eta': 1.0}
TEXT_DIFF = {
  'image': '',
  'num_images': 4,
  'source': '',
  'target': '',
  'num_points': 6,
  'max_theta': 0.5,
  'num_steps': 50,
}
"""How images are made again of their vectors, which no stage read."""
LOG = {'wandb': {'mode': 'disabled', 'project': 'vaediff', 'entity': ''}}
"""Where else was logged: nowhere."""
EXPLORE = {
  'port': 8080,
  'open': False,
  'num_directions': 8,
  'deviations': 3.0,
  'num_encoded': 1024,
  'num_points': 9,
  'max_upload_bytes': 10_000_000,
  'max_upload_pixels': 40_000_000,
}
"""The page of the explorer, which earlier versions did not have."""
MODES = {
  'vary': VARY,
  'text_diff': TEXT_DIFF,
  'quantize': QUANTIZE,
  'export': EXPORT,
  'adopt': ADOPT,
  'edit': EDIT,
  'explore': EXPLORE,
  'reconstruct': {'through': '', 'num_steps': (10, 25, 50, 100)},
  'interpolate': {'num_pairs': 64, 'cutoff': 0.25, 'num_directions': 0, 'deviations': 3.0},
  'restore': {'method': 'condition', 'num_samples': 1, 'fill_rounds': 5},
}
"""What modes did before they could be told."""
PCA = {'num_directions': 0, 'min_signal': 0.1, 'floor': 0.01}
"""What a diffusion that reads no PCA of a code says of one: nothing reads it."""
DECODERS = {
  'samplers': (('ddpm', 1000), ('ddim', 25), ('dpmpp_2m', 10)),
  'num_images': 256,
  'num_samples': 4,
}
"""How decoders of codes are compared, which earlier versions had none of."""
GUIDES = {
  'guidance_interval': (),
  'guide': {'stage': '', 'workdir': '', 'step': 0},
  'classifier': {'stage': '', 'workdir': '', 'scale': 1.0},
}
"""How a diffusion is sampled without an interval and without other networks."""

RERANK = {'stage': '', 'workdir': '', 'candidates': 16}
"""How samples are ranked by a CLIP stage, which none was."""


def upgrade(config: dict[str, Any]) -> dict[str, Any]:
  """Returns the config of a run of any version with this version's keys, changed in place."""
  if 'num_classes' not in config['data']:
    _upgrade_stages(config)
  if 'explore' not in config:
    _check_queries(config)
  for section in filter(_is_stage, config.values()):
    _upgrade_labels(section)
    if 'space' in section and _is_denoised(section):
      section.setdefault('space_factor', 1)
      section['conditions'].setdefault('vae', {'aug_level': 0.0})
      section['sample'].setdefault('aug_level', 0.0)
  if 'evaluate' in config and 'sweep' in config['evaluate']:
    config['evaluate']['sweep'].setdefault('aug_levels', ())
    config['evaluate'].setdefault('decoders', DECODERS)
    config['evaluate'].setdefault('num_captions', 500)
    config['evaluate'].setdefault('num_controls', 500)
    config['evaluate'].setdefault('clip', {'stage': '', 'workdir': ''})
  config['data'].setdefault('check_fingerprint', True)
  config['data'].setdefault('caption_feature', '')
  for name, section in config.items():
    if _is_stage(section) and section['experiment'] == 'diffusion':
      section.setdefault('start', {'stage': name, 'workdir': ''})
  for section in filter(_is_stage, config.values()):
    if section['experiment'] == 'ddgan':
      section['model'].setdefault('mapping_dim', 256)
      section['discriminator'].setdefault('group_order', 'consecutive')
    if section['experiment'] == 'adversarial_distillation':
      section['loss'].setdefault('renoise_side', 0)
    _upgrade_diffusion(section)
    _upgrade_autoencoder(section)
    if 'quantized' in section:
      section['quantized'].setdefault('checkpoint', 'latest')
    if 'sample' in section and 'guidance' in section['sample']:
      section['sample'] = {**GUIDES, **section['sample']}
    if 'sample' in section and 'labels' in section['sample']:
      section['sample'].setdefault('captions', ())
      section['sample'].setdefault('rerank', dict(RERANK))
  config.setdefault('checkpoints', {'check_arrays': True})
  config.setdefault('log', copy.deepcopy(LOG))
  for mode in ('quantize', 'export', 'vary', 'text_diff', 'edit', 'adopt', 'explore'):
    config.setdefault(mode, {})
  for mode, settings in MODES.items():
    if mode in config and isinstance(config[mode], dict):
      config[mode] = {**settings, **config[mode]}
  return config


def _check_queries(config: dict[str, Any]) -> None:
  """Raises UserError for networks whose maps asked tokens without saying where they are.

  Their parameters have the same names and shapes, and would draw other images.
  """
  for stage, section in config.items():
    if not (_is_stage(section) and 'conditions' in section):
      continue
    for name in ('text', 'codes'):
      own = section['conditions'][name] if name in section['conditions'] else {}
      if 'how' in own and own['how'] == 'attention':
        raise UserError(
          f"config.{stage}.conditions.{name}.how is 'attention', and the run was trained by an earlier "
          'version, whose attention to tokens knew no positions: this one would draw other images with its '
          'parameters. Train it again in another --workdir, or use the earlier version'
        )


def _upgrade_stages(config: dict[str, Any]) -> None:
  """Once every config had the sections of all stages, and other names for an experiment and a condition."""
  config['data']['num_classes'] = 0  # unknown: such a run reads no label
  used = set(_used(config))
  for name in list(config):
    if _is_stage(config[name]) and name not in used:
      del config[name]
  for section in filter(_is_stage, config.values()):
    if section['experiment'] == 'refiner':
      section['experiment'] = 'diffusion'
    if section['experiment'] == 'ddgan':
      _upgrade_gan(section)
    elif 'diffusion' in section and 'schedule' in section['diffusion']:  # a refiner or a student of one
      section |= {'space': 'pixel', 'conditions': {}, 'autoencoder': dict(AUTOENCODER)}
      section['sample']['guidance'] = ()


def _upgrade_labels(section: dict[str, Any]) -> None:
  """All classes were drawn in turn; and of latents without a bound a clip to it said nothing."""
  sample = section['sample'] if 'sample' in section else {}
  if 'guidance' not in sample or 'labels' in sample:
    return
  sample['labels'] = ()
  if section['space'] == 'latent' and section['autoencoder']['scaling'] == 'std':
    sample['clip'] = 'none' if sample['clip'] == 'static' else sample['clip']


def _upgrade_gan(section: dict[str, Any]) -> None:
  """The condition is named as a refiner's is, in the same place."""
  if 'condition' in section:
    before = section.pop('condition')
    section['diffusion'] |= {
      'condition': 'formulation1' if before == 'x0_vae' else before,
      'x0_vae_source': section['vae'].pop('x0_vae_source'),
    }
  section['conditions'] = {}


def _upgrade_diffusion(section: dict[str, Any]) -> None:
  """A diffusion, or a student of one, had one variance, one kind of U-Net and one eps after clipping."""
  if not _is_denoised(section):
    return
  section['diffusion'].setdefault('variance', 'fixed')
  section['diffusion'].setdefault('pca', dict(PCA))
  section['model'].setdefault('resblock_updown', False)
  section['model'].setdefault('head_channels', 0)
  section['model'].setdefault('coordinates', False)
  section['sample'].setdefault('recompute_eps', True)
  section['sample'].setdefault('bound_steps', 0)
  if 'clip_image' in section['conditions']:
    section['conditions']['clip_image'].setdefault('of', 'image')
  if section['experiment'] == 'diffusion':
    section.setdefault('loss', {'objective': 'hybrid', 'vlb_weight': 0.001, 'time_sampler': 'uniform'})
    section['loss'].setdefault('perceptual', '')
    section['loss'].setdefault('perceptual_weight', 0.0)


def _upgrade_autoencoder(section: dict[str, Any]) -> None:
  """The discriminator learned while it weighed, if it ever did; dead codes stayed with 'gradient'."""
  if section['experiment'] != 'autoencoder':
    return
  for part, settings in RELAXED.items():
    section[part] = {**settings, **section[part]}
  if 'entropy_weight' in section['loss']:
    return
  section['model'] = {'normalized_codes': False, 'inner_channels': 0, **section['model']}
  start = section['loss']['adversarial_start_step']
  section['loss'] |= {'entropy_weight': 0.0, 'discriminator_start_step': start}
  if section['loss']['codebook'] == 'gradient':
    section['loss']['restart_below'] = 0.0
  if start >= section['train']['num_steps']:
    section['loss']['adversarial_weight'] = 0.0


def _is_denoised(section: dict[str, Any]) -> bool:
  """Returns whether it is of a diffusion, or of a student of one: what is denoised is predicted."""
  return 'diffusion' in section and {'schedule', 'prediction'} <= section['diffusion'].keys()


def _is_stage(section: Any) -> bool:
  return isinstance(section, dict) and 'experiment' in section


def _used(config: dict[str, Any]) -> Iterator[str]:
  """Yields the stages of the run, those that they read, and so on; and the classifier of the evaluation."""
  waiting, seen = ['classifier', *config['stages']], set()
  while waiting:
    name = waiting.pop()
    if name in seen or name not in config:
      continue
    seen.add(name)
    yield name
    waiting += _reads(config[name])


def _reads(section: dict[str, Any]) -> Iterator[str]:
  """Yields the stages whose sections one needs; with the keys of before."""
  conditioned = {**section, **section['diffusion']} if 'diffusion' in section else {}
  unread = set()
  if 'condition' in conditioned and conditioned['condition'] == 'none':
    unread = set() if 'z_conditioning' in conditioned and conditioned['z_conditioning'] else {'vae'}
  if 'space' in section and section['space'] != 'latent':
    unread.add('autoencoder')
  for name, part in section.items():
    if name not in unread and isinstance(part, dict) and {'stage', 'workdir'} <= part.keys():
      yield from (part[field] for field in ('stage', 'decoder_stage') if field in part)
