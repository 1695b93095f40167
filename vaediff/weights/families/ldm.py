"""Autoencoders of latent diffusion, taming-transformers and LDDGAN (arXiv:2112.10752, 2012.09841)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vaediff.errors import UserError
from vaediff.weights.families.base import Entry, Family, Shapes, affine, alike, count, norm, whole
from vaediff.weights.families.diffusevae import (
  ddim_attention,
  ddim_level,
  ddim_levels,
  ddim_residual,
  narrowest_ddim,
)

HALVES = (('encoder', 'encoder', 'down'), ('decoder/body', 'decoder', 'up'))
"""Ours, theirs, and which way the levels go."""
ATTENTION = '{}.mid.attn_1.'


def entries_of(own: Shapes, options: Mapping[str, Any]) -> list[Entry]:
  """Returns the table of an autoencoder.

  Where `options['middle']` is False the file has no attention in the middle; ours then adds zeros.
  """
  entries = [
    *affine('encoder/quant_conv', 'quant_conv', 'conv1x1'),
    *affine('decoder/body/post_quant_conv', 'post_quant_conv', 'conv1x1'),
    *affine('encoder/conv_out', 'encoder.conv_out', 'conv'),
    *affine('decoder/conv_out', 'decoder.conv_out', 'conv'),
  ]
  for ours, theirs, way in HALVES:
    entries += affine(f'{ours}/conv_in', f'{theirs}.conv_in', 'conv')
    for level in range(count(own, f'{ours}/{way}_{{}}/')):
      entries += ddim_level(own, f'{ours}/{way}_{level}', f'{theirs}.{way}.{level}')
    entries += ddim_residual(own, f'{ours}/middle/res_0', f'{theirs}.mid.block_1')
    attention = list(ddim_attention(f'{ours}/middle/attn', f'{theirs}.mid.attn_1'))
    entries += attention if options['middle'] else map(identity, attention)
    entries += ddim_residual(own, f'{ours}/middle/res_1', f'{theirs}.mid.block_2')
    entries += norm(f'{ours}/norm_out', f'{theirs}.norm_out')
  return [*entries, Entry('codes', 'quantize.embedding.weight')] if 'codes' in own else entries


def identity(entry: Entry) -> Entry:
  """Returns the same of an attention that adds nothing: zeros, but for the norm's scale."""
  return Entry(entry.path, '', entry.layout, fill=float(entry.path.endswith('/norm/scale')))


def attends_in_the_middle(arrays: Mapping[str, np.ndarray]) -> bool:
  """Returns whether the middle of our autoencoder does more than add zeros; arrays by path."""
  paths = [f'{ours}/middle/attn/out/{part}' for ours, _, _ in HALVES for part in ('kernel', 'bias')]
  return any(path not in arrays or np.any(arrays[path]) for path in paths)


def fields_of(shapes: Shapes) -> dict[str, Any]:
  """Returns what the shapes of an autoencoder say; `attends` by level, and `middle`."""
  channels, levels = shapes['encoder.conv_in.weight'][0], ddim_levels(shapes, 'encoder.')
  for number, blocks in enumerate(levels):
    if len(set(blocks)) > 1:
      raise UserError(f'the blocks of level {number} differ: (channels, attention) are {blocks}')
  for name in ('quant_conv.weight', 'post_quant_conv.weight'):
    if name not in shapes:
      raise UserError(f'it has no {name}, without which there is no place for it')
  inner, latent = shapes['post_quant_conv.weight'][:2]
  codes = shapes.get('quantize.embedding.weight', (0, latent))
  outputs = shapes['quant_conv.weight'][0]
  bottleneck = 'vq' if codes[0] else 'kl' if outputs == 2 * latent else 'none'
  return {
    'latent_channels': latent,
    'channels': channels,
    'channel_multipliers': tuple(whole(blocks[0][0], channels) for blocks in levels),
    'num_res_blocks': alike(map(len, levels), 'the numbers of residual blocks'),
    'attends': tuple(blocks[0][1] for blocks in levels),
    'middle': any(name.startswith(ATTENTION.format('encoder')) for name in shapes),
    'bottleneck': bottleneck,
    'codebook_size': codes[0],
    'inner_channels': 0 if inner == latent else inner,
    'inputs': shapes['encoder.conv_in.weight'][1],
    'narrowest': narrowest_ddim({n: s for n, s in shapes.items() if n.startswith(('encoder.', 'decoder.'))}),
  }


def names_of_averages(names: list[str]) -> dict[str, str]:
  """Returns by the name of each tensor that of its average in `model_ema.`, which has no dots."""
  return {name: name.replace('.', '') for name in names}


AUTOENCODER = Family(
  name='ldm_autoencoder',
  title='an autoencoder of latent diffusion, taming-transformers or LDDGAN',
  experiment='autoencoder',
  network='autoencoder',
  signature=('encoder.conv_in.weight', 'decoder.conv_out.weight'),
  entries=entries_of,
  fields=fields_of,
  refused={
    r'^quantize\.(proj|embed)\.': "taming-transformers' Gumbel quantiser",
    r'^(encoder|decoder)\.mid_block\.': 'an autoencoder of another library, whose names are others',
  },
)
