"""This project's weights in the PyTorch networks: names and layouts.

A kernel [height, width, in, out] becomes [out, in, height, width], a matrix [in, out] becomes [out, in] or a
1x1 convolution. The hand-written networks have our names; diffusers' are translated by the rules below.
"""

import re
from typing import Any

import numpy as np
import torch
from torch import nn

_BLOCK = (
  (r'\.norm_(\d)$', r'.norm\1'),
  (r'\.conv_(\d)$', r'.conv\1'),
  (r'\.emb$', '.time_emb_proj'),
  (r'\.skip$', '.conv_shortcut'),
  (r'\.norm$', '.group_norm'),
  (r'\.query$', '.to_q'),
  (r'\.key$', '.to_k'),
  (r'\.value$', '.to_v'),
  (r'\.out$', '.to_out.0'),
  (r'^middle\.attn', 'mid_block.attentions.0'),
  (r'^middle', 'mid_block'),
  (r'\.res_(\d+)', r'.resnets.\1'),
  (r'\.attn_(\d+)', r'.attentions.\1'),
  (r'^down_(\d+)', r'down_blocks.\1'),
  (r'\.down$', '.downsamplers.0.conv'),
  (r'\.up$', '.upsamplers.0.conv'),
  (r'^norm_out', 'conv_norm_out'),
  (r'^time_mlp\.dense_0', 'time_embedding.linear_1'),
  (r'^time_mlp\.dense_1', 'time_embedding.linear_2'),
)


def flatten(params: Any, prefix: str = '') -> dict[str, np.ndarray]:
  """Returns the leaves of nested dicts by their dotted path."""
  if not isinstance(params, dict):
    return {prefix: np.asarray(params)}
  leaves = {}
  for name, value in params.items():
    leaves |= flatten(value, f'{prefix}.{name}' if prefix else name)
  return leaves


def convert(network: str, params: Any, num_heads: int) -> dict[str, np.ndarray]:
  """Returns the entries of the PyTorch state dict that our parameters, or gradients, of a network are.

  Args:
    network: as in `cases.Case`.
    params: nested dicts of arrays.
    num_heads: of the U-Net's attention; others have one.
  """
  leaves = _split_qkv(flatten(params), num_heads)
  levels = 1 + max((int(level) for name in leaves for level in re.findall(r'up_(\d+)', name)), default=0)
  entries = {}
  for path, value in leaves.items():
    layer, _, leaf = path.rpartition('.')
    name = _name(network, layer, levels)
    entries[f'{name}.{"bias" if leaf == "bias" else "weight"}'] = _layout(value)
  return entries


def copy(network: str, params: Any, num_heads: int, module: nn.Module) -> None:
  """Copies our parameters into a PyTorch network, whose 1x1 convolutions may be matrices of ours.

  Raises:
    ValueError: the two networks do not have the same parameters.
  """
  entries, own = convert(network, params, num_heads), dict(module.named_parameters())
  if entries.keys() != own.keys():
    extra, missing = sorted(entries.keys() - own.keys()), sorted(own.keys() - entries.keys())
    raise ValueError(f'weights without a place in PyTorch: {extra}; parameters without a weight: {missing}')
  with torch.no_grad():
    for name, value in entries.items():
      own[name].copy_(fit(value, own[name]))


def fit(value: np.ndarray, like: torch.Tensor) -> torch.Tensor:
  """Returns a converted array in the shape of a parameter, which may have trailing ones.

  Raises:
    ValueError: the shapes differ in more than that.
  """
  if (*value.shape, *(1,) * (like.ndim - value.ndim)) != tuple(like.shape):
    raise ValueError(f'a weight of shape {value.shape} does not fit a parameter of shape {tuple(like.shape)}')
  return torch.from_numpy(np.array(value)).reshape(like.shape)


def _layout(value: np.ndarray) -> np.ndarray:
  """Returns an array of ours in PyTorch's order of axes."""
  return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T


def _name(network: str, layer: str, levels: int) -> str:
  """Returns the PyTorch name of a layer."""
  match network:
    case 'unet':
      return f'inner.{_diffusers(layer, levels)}'
    case 'decoder':
      inner = layer.removeprefix('decoder.').removeprefix('body.')
      return inner if inner == 'post_quant_conv' else f'decoder.{_diffusers(inner, levels)}'
    case 'vae':
      return re.sub(r'^encoder\.(mean|logvar)$', r'encoder_heads.\1', layer)
    case _:
      return layer


def _diffusers(layer: str, levels: int) -> str:
  """Returns the name that diffusers gives a layer of a U-Net or decoder; its levels up count from below."""
  layer = re.sub(r'^up_(\d+)', lambda match: f'up_blocks.{levels - 1 - int(match[1])}', layer)
  for pattern, replacement in _BLOCK:
    layer = re.sub(pattern, replacement, layer)
  return layer


def _split_qkv(leaves: dict[str, np.ndarray], num_heads: int) -> dict[str, np.ndarray]:
  """Returns the leaves with maps to [query, key, value], head after head, split into three maps."""
  split = {}
  for path, value in leaves.items():
    if '.qkv.' not in path:
      split[path] = value
      continue
    heads = value.reshape(*value.shape[:-1], num_heads, 3, -1)
    for i, name in enumerate(('query', 'key', 'value')):
      split[path.replace('.qkv.', f'.{name}.')] = heads[..., i, :].reshape(*value.shape[:-1], -1)
  return split
