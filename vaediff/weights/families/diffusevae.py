"""DiffuseVAE's networks (arXiv:2201.00308): its VAE, and its U-Nets 'openai' and 'ddim'."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from vaediff.errors import UserError
from vaediff.weights.families.base import (
  Entry,
  Family,
  Shapes,
  affine,
  alike,
  count,
  norm,
  whole,
)

# The VAE --------------------------------------------------------------------------------------------


def vae_entries(own: Shapes, options: Mapping[str, Any]) -> list[Entry]:
  """Returns the table of a VAE whose layers are `options['layers']`, (kind, name) by half."""
  del own
  entries = [
    *affine('encoder/conv_in', 'enc.in_conv', 'conv', bias=False),
    *affine('encoder/mean', 'enc.mu', 'conv1x1', bias=False),
    *affine('encoder/logvar', 'enc.logvar', 'conv1x1', bias=False),
    *affine('decoder/conv_out', 'dec.last_conv', 'conv'),
  ]
  for half, short in (('encoder', 'enc'), ('decoder', 'dec')):
    number = 0
    for kind, layer, kernel_size in options['layers'][half]:
      path, name = f'{half}/{layer}', f'{short}.block_mod.{number}'
      if kind == 'residual':
        for part in range(1, 5):
          layout = 'conv' if part in (2, 3) and kernel_size == 3 else 'conv1x1'
          entries += affine(f'{path}/conv_{part}', f'{name}.c{part}', layout)
      elif kind == 'project':
        entries += affine(path, name, 'conv1x1', bias=False)
      elif kind not in ('pool', 'upsample'):
        raise UserError(f"the layer {path} has no name in DiffuseVAE's code: model.stem must be 'nearest'")
      number += kind != 'pool'  # it is part of the block before it
  return entries


def vae_fields(shapes: Shapes) -> dict[str, Any]:
  """Returns `latent_dim` and channels; the steps between leave no trace that tells pooling factors."""
  return {
    'latent_dim': shapes['enc.mu.weight'][0],
    'image_channels': shapes['enc.in_conv.weight'][1],
  }


# The U-Net of Improved DDPM -------------------------------------------------------------------------


def _levels(own: Shapes) -> tuple[int, int]:
  """Returns the number of levels of our U-Net, and of residual blocks on the way down."""
  return count(own, 'down_{}/'), count(own, 'down_0/res_{}/')


def _openai_residual(own: Shapes, path: str, name: str) -> Iterator[Entry]:
  yield from norm(f'{path}/norm_1', f'{name}.in_layers.0')
  yield from affine(f'{path}/conv_1', f'{name}.in_layers.2', 'conv')
  yield from affine(f'{path}/emb', f'{name}.emb_layers.1', 'linear')
  yield from norm(f'{path}/norm_2', f'{name}.out_layers.0')
  yield from affine(f'{path}/conv_2', f'{name}.out_layers.3', 'conv')
  if f'{path}/skip/kernel' in own:
    yield from affine(f'{path}/skip', f'{name}.skip_connection', 'conv1x1')


def _openai_attention(path: str, name: str) -> Iterator[Entry]:
  yield from norm(f'{path}/norm', f'{name}.norm')
  yield from affine(f'{path}/qkv', f'{name}.qkv', 'conv1d')
  yield from affine(f'{path}/out', f'{name}.proj_out', 'conv1d')


def openai_entries(own: Shapes, options: Mapping[str, Any]) -> list[Entry]:
  """Returns the table of a U-Net of the variant 'openai'."""
  del options
  levels, blocks = _levels(own)
  entries = [*affine('conv_in', 'input_blocks.0.0', 'conv')]
  for ours, theirs in (('time_mlp', 'time_embed'), ('z_mlp', 'proj')):
    if f'{ours}/dense_0/kernel' in own:
      entries += affine(f'{ours}/dense_0', f'{theirs}.0', 'linear')
      entries += affine(f'{ours}/dense_1', f'{theirs}.2', 'linear')
  number = 1
  for level in range(levels):
    for block in range(blocks):
      entries += _openai_residual(own, f'down_{level}/res_{block}', f'input_blocks.{number}.0')
      if f'down_{level}/attn_{block}/qkv/kernel' in own:
        entries += _openai_attention(f'down_{level}/attn_{block}', f'input_blocks.{number}.1')
      number += 1
    if level < levels - 1:
      entries += affine(f'down_{level}/down', f'input_blocks.{number}.0.op', 'conv')
      number += 1
  entries += _openai_residual(own, 'middle/res_0', 'middle_block.0')
  entries += _openai_attention('middle/attn', 'middle_block.1')
  entries += _openai_residual(own, 'middle/res_1', 'middle_block.2')
  number = 0
  for level in reversed(range(levels)):
    for block in range(blocks + 1):
      path, name, place = f'up_{level}', f'output_blocks.{number}', 1
      entries += _openai_residual(own, f'{path}/res_{block}', f'{name}.0')
      if f'{path}/attn_{block}/qkv/kernel' in own:
        entries += _openai_attention(f'{path}/attn_{block}', f'{name}.1')
        place = 2
      if level and block == blocks:
        entries += affine(f'{path}/up', f'{name}.{place}.conv', 'conv')
      number += 1
  return [*entries, *norm('norm_out', 'out.0'), *affine('conv_out', 'out.2', 'conv')]


def openai_fields(shapes: Shapes) -> dict[str, Any]:
  """Returns what the shapes of a U-Net 'openai' say; `attends` by level, highest resolution first."""
  channels, levels, number = shapes['time_embed.0.weight'][1], [[]], 1
  while True:
    name = f'input_blocks.{number}.0'
    if f'{name}.op.weight' in shapes:
      levels.append([])
    elif f'{name}.in_layers.2.weight' in shapes:
      attends = f'input_blocks.{number}.1.norm.weight' in shapes
      levels[-1].append((shapes[f'{name}.in_layers.2.weight'][0], attends))
    else:
      break
    number += 1
  embedded = shapes['input_blocks.1.0.emb_layers.1.weight'][0]
  return {
    'variant': 'openai',
    **_fields_of_levels(levels, channels),
    'scale_shift_norm': embedded == 2 * levels[0][0][0],
    'inputs': shapes['input_blocks.0.0.weight'][1],
    'outputs': shapes['out.2.weight'][0],
    'latent_dim': shapes['proj.0.weight'][1] if 'proj.0.weight' in shapes else 0,
    'narrowest': _narrowest(shapes, r'(in_layers|out_layers|^out)\.0\.weight$|norm\.weight$'),
  }


def _fields_of_levels(levels: list[list[tuple[int, bool]]], channels: int) -> dict[str, Any]:
  """Returns the fields that (width, attends) of the blocks of each level say."""
  for level, blocks in enumerate(levels):
    if len(set(blocks)) > 1:
      raise UserError(f'the blocks of level {level} differ: (channels, attention) are {blocks}')
  return {
    'channels': channels,
    'channel_multipliers': tuple(whole(blocks[0][0], channels) for blocks in levels),
    'num_res_blocks': alike(map(len, levels), 'the numbers of residual blocks'),
    'attends': tuple(blocks[0][1] for blocks in levels),
  }


def _narrowest(shapes: Shapes, norms: str) -> int:
  """Returns the channels of the narrowest norm, or of one that 32 groups do not divide."""
  widths = [shape[0] for name, shape in shapes.items() if len(shape) == 1 and re.search(norms, name)]
  odd = [width for width in widths if width % 32]
  return min(odd or widths)


# The U-Net of DDIM ----------------------------------------------------------------------------------


def ddim_residual(own: Shapes, path: str, name: str) -> Iterator[Entry]:
  """Yields a residual block of the DDIM code, or of the autoencoders that descend from it."""
  yield from norm(f'{path}/norm_1', f'{name}.norm1')
  yield from affine(f'{path}/conv_1', f'{name}.conv1', 'conv')
  if f'{path}/emb/kernel' in own:
    yield from affine(f'{path}/emb', f'{name}.temb_proj', 'linear')
  yield from norm(f'{path}/norm_2', f'{name}.norm2')
  yield from affine(f'{path}/conv_2', f'{name}.conv2', 'conv')
  if f'{path}/skip/kernel' in own:
    yield from affine(f'{path}/skip', f'{name}.nin_shortcut', 'conv1x1')


def ddim_attention(path: str, name: str) -> Iterator[Entry]:
  """Yields an attention block of the same."""
  yield from norm(f'{path}/norm', f'{name}.norm')
  for ours, theirs in (('query', 'q'), ('key', 'k'), ('value', 'v'), ('out', 'proj_out')):
    yield from affine(f'{path}/{ours}', f'{name}.{theirs}', 'conv1x1')


def ddim_level(own: Shapes, path: str, name: str) -> Iterator[Entry]:
  """Yields the blocks of a level of the same, and what ends it."""
  for block in range(count(own, f'{path}/res_{{}}/')):
    yield from ddim_residual(own, f'{path}/res_{block}', f'{name}.block.{block}')
    if f'{path}/attn_{block}/norm/scale' in own:
      yield from ddim_attention(f'{path}/attn_{block}', f'{name}.attn.{block}')
  for ours, theirs in (('down', 'downsample'), ('up', 'upsample')):
    if f'{path}/{ours}/kernel' in own:
      yield from affine(f'{path}/{ours}', f'{name}.{theirs}.conv', 'conv')


def ddim_entries(own: Shapes, options: Mapping[str, Any]) -> list[Entry]:
  """Returns the table of a U-Net of the variant 'ddim'."""
  del options
  levels, _ = _levels(own)
  if 'z_mlp/dense_0/kernel' in own:
    raise UserError("DiffuseVAE's U-Net 'ddim' reads no code, so that z_conditioning has no names there")
  entries = []
  for part in range(2):
    entries += affine(f'time_mlp/dense_{part}', f'temb.dense.{part}', 'linear')
  entries += affine('conv_in', 'conv_in', 'conv')
  for level in range(levels):
    entries += ddim_level(own, f'down_{level}', f'down.{level}')
  entries += ddim_residual(own, 'middle/res_0', 'mid.block_1')
  entries += ddim_attention('middle/attn', 'mid.attn_1')
  entries += ddim_residual(own, 'middle/res_1', 'mid.block_2')
  for level in range(levels):
    entries += ddim_level(own, f'up_{level}', f'up.{level}')
  return [*entries, *norm('norm_out', 'norm_out'), *affine('conv_out', 'conv_out', 'conv')]


def ddim_levels(shapes: Shapes, prefix: str) -> list[list[tuple[int, bool]]]:
  """Returns (width, attends) of the blocks of each level of the way down."""
  levels = []
  for level in range(count(shapes, f'{prefix}down.{{}}.')):
    name = f'{prefix}down.{level}'
    blocks = range(count(shapes, f'{name}.block.{{}}.'))
    levels.append(
      [
        (shapes[f'{name}.block.{block}.conv1.weight'][0], f'{name}.attn.{block}.norm.weight' in shapes)
        for block in blocks
      ]
    )
  return levels


def ddim_fields(shapes: Shapes) -> dict[str, Any]:
  """Returns what the shapes of a U-Net 'ddim' say."""
  channels = shapes['temb.dense.0.weight'][1]
  return {
    'variant': 'ddim',
    **_fields_of_levels(ddim_levels(shapes, ''), channels),
    'scale_shift_norm': False,
    'inputs': shapes['conv_in.weight'][1],
    'outputs': shapes['conv_out.weight'][0],
    'latent_dim': 0,
    'narrowest': narrowest_ddim(shapes),
  }


def narrowest_ddim(shapes: Shapes) -> int:
  """Returns the channels of the narrowest norm of the DDIM code and its descendants."""
  return _narrowest(shapes, r'norm(1|2|_out)?\.weight$')


VAE = Family(
  name='diffusevae_vae',
  title="DiffuseVAE's VAE",
  experiment='vae',
  network='vae',
  signature=('enc.in_conv.weight', 'dec.last_conv.weight'),
  entries=vae_entries,
  fields=vae_fields,
)
REFUSED = {
  r'^down_modules\.': 'the older U-Net of the branch vaedm-noise-cond',
  r'^label_emb\.': 'a class-conditional U-Net',
}
OPENAI = Family(
  name='diffusevae_unet_openai',
  title="DiffuseVAE's U-Net 'openai'",
  experiment='diffusion',
  network='denoiser',
  signature=('time_embed.0.weight', 'input_blocks.0.0.weight'),
  entries=openai_entries,
  fields=openai_fields,
  refused=REFUSED,
)
DDIM = Family(
  name='diffusevae_unet_ddim',
  title="DiffuseVAE's U-Net 'ddim'",
  experiment='diffusion',
  network='denoiser',
  signature=('temb.dense.0.weight', 'conv_in.weight'),
  entries=ddim_entries,
  fields=ddim_fields,
  refused=REFUSED,
)
