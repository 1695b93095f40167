"""Generators and discriminators of denoising GANs: DDGAN, WaveDiff, LDDGAN (arXiv:2112.07804, 2211.16152).

`all_modules` are numbered in order of construction, so that a generator is walked. Of wavelets and patches
the channels come in another order there (`channel_order`, `output_order`).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vaediff.errors import UserError
from vaediff.weights.families.base import Entry, Family, Reorder, Shapes, affine, alike, count, norm, whole

BAND_ORDERS = ('pytorch_wavelets', 'wavecnet')
"""Of the groups of channels that a generator in wavelets reads and emits: with the first the second group is
high along the height; with the other it is high along the width, as it is here."""
REFUSED = {
  r'^all_modules\.0\.W$': 'a generator with a Fourier embedding of the time',
  r'^all_modules\.\d+\.GroupNorm_1\.weight$': "a generator of blocks 'biggan_oneadagn'",
  r'^all_modules\.\d+\.Conv2d_0\.op': 'a generator whose convolutions are not of the published kind',
}


# The order of channels ------------------------------------------------------------------------------


def band_order(channels: int, swapped: bool) -> tuple[int, ...]:
  """Returns which of their channels ours are: of four bands the second and the third change places."""
  if not swapped:
    return tuple(range(channels))
  each = channels // 4
  return tuple(band * each + place for band in (0, 2, 1, 3) for place in range(each))


def channel_order(channels: int, patch: int, swapped: bool) -> tuple[int, ...]:
  """Returns the same of folded maps: each of the patch's pixels has all channels, row by row, as here."""
  inner = np.asarray(band_order(channels, swapped))
  return tuple(int(i) for pixel in range(patch**2) for i in pixel * channels + inner)


def output_order(channels: int, patch: int, swapped: bool) -> tuple[int, ...]:
  """Returns the same of the output, which they unfold by (channel, row, column), as they do not fold it."""
  inner = band_order(channels, swapped)
  return tuple(theirs * patch**2 + pixel for pixel in range(patch**2) for theirs in inner)


def reordered(entries: list[Entry], order: Mapping[str, Any]) -> list[Entry]:
  """Returns the table of a generator with the order of its channels.

  Args:
    entries: as if it were the same.
    order: `channels` of the space, `patch` and `swapped`.
  """
  channels, patch, swapped = order['channels'], order['patch'], order['swapped']
  inputs, outputs = (make(channels, patch, swapped) for make in (channel_order, output_order))
  of_bands = tuple(group * len(inputs) + place for group in range(4) for place in inputs)
  changes = {
    'conv_in/kernel': Reorder(2, inputs),
    'down_0_pyramid/conv/kernel': Reorder(2, inputs),  # of the input, halved
    'down_0_pyramid/kernel': Reorder(2, of_bands),  # of the four bands of the input
    'conv_out/kernel': Reorder(3, outputs),
    'conv_out/bias': Reorder(0, outputs),
  }
  return [
    Entry(entry.path, entry.name, entry.layout, (changes[entry.path],)) if entry.path in changes else entry
    for entry in entries
  ]


# The generator --------------------------------------------------------------------------------------


def _residual(own: Shapes, path: str, name: str) -> Iterator[Entry]:
  yield from affine(f'{path}/norm_1/style', f'{name}.GroupNorm_0.style', 'linear')
  yield from affine(f'{path}/conv_1', f'{name}.Conv_0', 'conv')
  yield from affine(f'{path}/emb', f'{name}.Dense_0', 'linear')
  yield from affine(f'{path}/norm_2/style', f'{name}.GroupNorm_1.style', 'linear')
  yield from affine(f'{path}/conv_2', f'{name}.Conv_1', 'conv')
  if f'{path}/skip/kernel' in own:
    yield from affine(f'{path}/skip', f'{name}.Conv_2', 'conv1x1')
  if f'{path}/conv_highs/kernel' in own:
    yield from affine(f'{path}/conv_highs', f'{name}.convH_0', 'conv')


def _attention(path: str, name: str) -> Iterator[Entry]:
  yield from norm(f'{path}/norm', f'{name}.GroupNorm_0')
  for number, ours in enumerate(('query', 'key', 'value', 'out')):  # their matrices are [in, out] already
    yield Entry(f'{path}/{ours}/kernel', f'{name}.NIN_{number}.W')
    yield Entry(f'{path}/{ours}/bias', f'{name}.NIN_{number}.b')


def _modules(own: Shapes) -> Iterator[tuple[str, str]]:
  """Yields (kind, path) of our modules in the order in which theirs are numbered, from conv_in on."""
  levels, blocks = count(own, 'down_{}_res_0/'), count(own, 'down_0_res_{}/')
  yield 'conv', 'conv_in'
  for level in range(levels):
    for block in range(blocks):
      yield 'residual', f'down_{level}_res_{block}'
      if f'down_{level}_attn_{block}/norm/scale' in own:
        yield 'attention', f'down_{level}_attn_{block}'
    if level < levels - 1:
      yield 'residual', f'down_{level}_halve'
      if f'down_{level}_pyramid/conv/kernel' in own:
        yield 'blurred', f'down_{level}_pyramid'
      elif f'down_{level}_pyramid/kernel' in own:
        yield 'conv', f'down_{level}_pyramid'
  yield from (('residual', 'middle_res_0'), ('attention', 'middle_attn'), ('residual', 'middle_res_1'))
  for level in reversed(range(levels)):
    for block in range(blocks + 1):
      yield 'residual', f'up_{level}_res_{block}'
    if f'up_{level}_attn/norm/scale' in own:
      yield 'attention', f'up_{level}_attn'
    if level:
      yield 'residual', f'up_{level}_double'
  yield from (('norm', 'norm_out'), ('conv', 'conv_out'))


def generator_entries(own: Shapes, options: Mapping[str, Any]) -> list[Entry]:
  """Returns the table of a generator; `options['order']` is that of its channels."""
  entries = []
  for number in range(count(own, 'mapping/dense_{}/')):
    entries += affine(f'mapping/dense_{number}', f'z_transform.{1 + 2 * number}', 'linear')
  for number in range(2):
    entries += affine(f'time_embedding/dense_{number}', f'all_modules.{number}', 'linear')
  for number, (kind, path) in enumerate(_modules(own), 2):
    name = f'all_modules.{number}'
    match kind:
      case 'residual':
        entries += _residual(own, path, name)
      case 'attention':
        entries += _attention(path, name)
      case 'norm':
        entries += norm(path, name)
      case 'blurred':
        entries += affine(f'{path}/conv', f'{name}.Conv2d_0', 'conv')
      case 'conv':
        entries += affine(path, name, 'conv')
  return reordered(entries, options['order'])


def _kind(shapes: Shapes, number: int) -> str:
  """Returns what kind a module of theirs is."""
  name = f'all_modules.{number}'
  if f'{name}.GroupNorm_0.style.weight' in shapes:
    return 'residual'
  if f'{name}.NIN_3.W' in shapes:
    return 'attention'
  if f'{name}.Conv2d_0.weight' in shapes:
    return 'blurred'
  if f'{name}.weight' in shapes:
    return 'conv' if len(shapes[f'{name}.weight']) == 4 else 'norm'
  return ''


def _walked(shapes: Shapes) -> list[dict[str, Any]]:
  """Returns `width`, `blocks`, `attends` and `pyramid` of each level, highest resolution first."""
  levels, number, widths, attends = [], 3, [], []
  while (kind := _kind(shapes, number)) == 'residual':
    width, after = shapes[f'all_modules.{number}.Conv_0.weight'][0], _kind(shapes, number + 1)
    if after in ('blurred', 'conv'):  # it halves, and the pyramid follows
      levels.append({'width': widths[0], 'blocks': len(widths), 'attends': attends[0], 'pyramid': after})
      number, widths, attends = number + 2, [], []
      continue
    widths.append(width)
    attends.append(after == 'attention')
    number += 1 + (after == 'attention')
  if kind not in ('norm', ''):
    raise UserError(f'all_modules.{number} is of a kind that no generator has there')
  # what is left: the last level's blocks, the middle, and the way up
  blocks = levels[0]['blocks'] if levels else (len(widths) - 3) // 2
  levels.append({'width': widths[0], 'blocks': blocks, 'attends': attends[0], 'pyramid': ''})
  return levels


def generator_fields(shapes: Shapes) -> dict[str, Any]:
  """Returns what the shapes of a generator say; `inputs` and `outputs` are channels of folded maps."""
  if any('.NIN_0.W' in name and f'{name[:-8]}.Conv_0.weight' in shapes for name in shapes):
    raise UserError("the skips of its blocks are of the kind 'NIN', which no published generator has")
  channels, levels = shapes['all_modules.2.weight'][0], _walked(shapes)
  wavelet = any('.convH_0.' in name for name in shapes)
  kinds = {level['pyramid'] for level in levels[:-1]}
  if wavelet and 'blurred' in kinds:
    raise UserError('it was trained with --no_use_residual, whose pyramid has no place here')
  last = max(int(name.split('.')[1]) for name in shapes if name.startswith('all_modules.'))
  return {
    'network': 'wavelet_ncsnpp' if wavelet or 'conv' in kinds else 'ncsnpp',
    'use_frequency_skips': wavelet,
    'channels': channels,
    'channel_multipliers': tuple(whole(level['width'], channels) for level in levels),
    'num_res_blocks': alike((level['blocks'] for level in levels), 'the numbers of residual blocks'),
    'attends': tuple(level['attends'] for level in levels),
    'latent_dim': shapes['z_transform.1.weight'][1],
    'mapping_dim': shapes['z_transform.1.weight'][0],
    'num_mapping_layers': sum(name.startswith('z_transform.') and name.endswith('.weight') for name in shapes)
    - 1,
    'inputs': shapes['all_modules.2.weight'][1],
    'outputs': shapes[f'all_modules.{last}.weight'][0],
  }


# The discriminator ----------------------------------------------------------------------------------


def discriminator_entries(own: Shapes, options: Mapping[str, Any]) -> list[Entry]:
  """Returns the table of a discriminator."""
  del options
  entries = [*affine('conv_in', 'start_conv', 'conv1x1')]
  for ours, theirs in ((0, 0), (1, 2)):
    entries += affine(f'time_embedding/dense_{ours}', f't_embed.main.{theirs}', 'linear')
  for number in range(count(own, 'block_{}/')):
    path, name = f'block_{number}', f'conv{number + 1}'
    entries += affine(f'{path}/conv_1', f'{name}.conv1.0', 'conv')
    entries += affine(f'{path}/conv_2', f'{name}.conv2.0', 'conv')
    entries += affine(f'{path}/emb', f'{name}.dense_t1', 'linear')
    entries += affine(f'{path}/skip', f'{name}.skip.0', 'conv1x1', bias=False)
  return [*entries, *affine('conv_out', 'final_conv', 'conv'), *affine('logit', 'end_linear', 'linear')]


def discriminator_fields(shapes: Shapes) -> dict[str, Any]:
  """Returns what the shapes of a discriminator say; `inputs` are the channels of two states."""
  first = shapes['start_conv.weight'][0]
  return {
    'variant': 'small' if shapes['conv1.conv1.0.weight'][0] == first else 'large',
    'channels': first // 2,
    'time_dim': shapes['t_embed.main.0.weight'][1],
    'num_layers': sum(name.endswith('.dense_t1.weight') for name in shapes),
    'inputs': shapes['start_conv.weight'][1],
  }


GENERATOR = Family(
  name='ncsnpp_generator',
  title='an NCSN++ generator of DDGAN, WaveDiff or LDDGAN',
  experiment='ddgan',
  network='generator',
  signature=('z_transform.1.weight', 'all_modules.2.weight'),
  entries=generator_entries,
  fields=generator_fields,
  refused=REFUSED,
)
DISCRIMINATOR = Family(
  name='ddgan_discriminator',
  title='a discriminator of DDGAN',
  experiment='ddgan',
  network='discriminator',
  signature=('t_embed.main.0.weight', 'start_conv.weight'),
  entries=discriminator_entries,
  fields=discriminator_fields,
  refused={r'^local_end_linear': 'a discriminator with a local loss'},
)
