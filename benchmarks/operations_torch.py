"""The PyTorch side of `benchmarks.operations`: the same single operations, NCHW (channels-last on GPUs)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.torch_layers import Fir, num_groups
from benchmarks.torch_side import Built, Place

DROPOUT = 0.3
EPSILON = 1e-5


def _map(shape: tuple[int, ...], place: Place) -> torch.Tensor:
  batch, height, width, channels = shape
  return place.put(torch.randn(batch, channels, height, width)).to(place.dtype)


def _conv3x3(shape: tuple[int, ...], phase: str, place: Place) -> Callable[[], Any]:
  *image, inputs, outputs, stride = shape
  x = _map((*image, inputs), place)
  kernel = place.put(torch.randn(outputs, inputs, 3, 3)).to(place.dtype)
  y = F.conv2d(x, kernel, stride=stride, padding=1)
  if phase == 'forward':
    return lambda: F.conv2d(x, kernel, stride=stride, padding=1)
  if phase == 'input_gradient':
    return lambda: nn.grad.conv2d_input(x.shape, kernel, y, stride=stride, padding=1)
  return lambda: nn.grad.conv2d_weight(x, kernel.shape, y, stride=stride, padding=1)


def _function(
  kind: str, shape: tuple[int, ...], place: Place
) -> tuple[Callable[..., Any], list[torch.Tensor]]:
  """Returns an operation other than the convolution, and what it reads."""
  draw = lambda *size: place.put(torch.randn(*size)).to(place.dtype)
  match kind:
    case 'group_norm_silu':
      groups, channels = num_groups(shape[-1]), shape[-1]
      function = lambda x, scale, bias: F.silu(F.group_norm(x, groups, scale, bias, EPSILON))
      return function, [_map(shape, place), draw(channels), draw(channels)]
    case 'matmul':
      rows, inputs, outputs = shape
      return F.linear, [draw(rows, inputs), draw(outputs, inputs), draw(outputs)]
    case 'attention':
      batch, positions, heads, channels = shape
      return F.scaled_dot_product_attention, [draw(batch, heads, positions, channels) for _ in range(3)]
    case 'dropout':
      return lambda x: F.dropout(x, DROPOUT), [_map(shape, place)]
    case _:
      fir = Fir(shape[-1], kind.removeprefix('fir_')).to(place.device)
      return fir, [_map(shape, place)]


def _update(shape: tuple[int, ...], place: Place) -> Callable[[], Any]:
  parameter = nn.Parameter(torch.randn(shape, device=place.device))
  parameter.grad = torch.randn(shape, device=place.device)
  adam, average = torch.optim.Adam([parameter], lr=2e-4, fused=True), [parameter.detach().clone()]

  def run():
    nn.utils.clip_grad_norm_([parameter], 1.0, foreach=True)
    adam.step()
    with torch.no_grad():
      torch._foreach_lerp_(average, [parameter], 1e-4)

  return run


def build(kind: str, shape: list[int], phase: str, *, dtype: str, compiled: bool = False) -> Built:
  """Returns one operation in one phase; see `operations_jax.build`."""
  place, shape = Place.of(dtype), tuple(shape)
  if kind == 'conv3x3':
    run = _conv3x3(shape, phase, place)
  elif kind == 'update':
    run = _update(shape, place)
  else:
    function, args = _function(kind, shape, place)
    function = torch.compile(function) if compiled else function
    if phase == 'forward':
      run = lambda: function(*args)
    else:
      args = [arg.requires_grad_() for arg in args]
      g = torch.randn_like(function(*args))

      def run():
        y = function(*args)
        return y, torch.autograd.grad(y, args, g)

  if phase in ('with_gradient', 'update'):
    return Built(run, place.wait, 0)
  return Built(torch.inference_mode()(run), place.wait, 0)
