"""What the hand-written PyTorch networks share; NCHW, as PyTorch's layers are.

Submodules have the names of this project's Flax modules, so that weights can be copied by name. 1x1
convolutions are `nn.Conv2d`, attention is PyTorch's own fused one, resampling by the filter [1, 3, 3, 1] is a
depthwise convolution: of the ways to write these in PyTorch, the usual and, where tried, the fastest.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

MAX_GROUPS = 32


def num_groups(channels: int) -> int:
  """Returns the number of groups of every group norm of this project (`vaediff.models.layers.num_groups`)."""
  most = max(1, min(MAX_GROUPS, channels // 4))
  return max(groups for groups in range(1, most + 1) if channels % groups == 0)


def conv3x3(inputs: int, outputs: int, *, bias: bool = True) -> nn.Conv2d:
  """Returns a 3x3 convolution that keeps the sides."""
  return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


def conv1x1(inputs: int, outputs: int, *, bias: bool = True) -> nn.Conv2d:
  """Returns a 1x1 convolution."""
  return nn.Conv2d(inputs, outputs, 1, bias=bias)


def sinusoidal_embedding(position: torch.Tensor, features: int) -> torch.Tensor:
  """Returns [batch, features]: sines, then cosines, with 1/10000 as the lowest frequency."""
  half = features // 2
  steps = torch.arange(half, dtype=torch.float32, device=position.device)
  angles = position[:, None] * torch.exp(-math.log(10_000) / (half - 1) * steps)
  return torch.cat([angles.sin(), angles.cos()], dim=1)


def fir_kernel(channels: int, gain: float) -> torch.Tensor:
  """Returns [channels, 1, 4, 4]: the outer product of [1, 3, 3, 1] / 8 with itself, times `gain`."""
  taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
  return (gain * taps[:, None] * taps[None]).expand(channels, 1, 4, 4).contiguous()


class Fir(nn.Module):
  """Resampling by two with the filter [1, 3, 3, 1]: 'down', 'up' or 'blur', which adds one pixel."""

  def __init__(self, channels: int, kind: str):
    super().__init__()
    self.kind = kind
    self.register_buffer('kernel', fir_kernel(channels, 4.0 if kind == 'up' else 1.0), persistent=False)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Returns x resampled; outside the image there are zeros."""
    kernel, channels = self.kernel.to(x.dtype), x.shape[1]
    if self.kind == 'down':
      return F.conv2d(x, kernel, stride=2, padding=1, groups=channels)
    if self.kind == 'up':
      return F.conv_transpose2d(x, kernel, stride=2, padding=1, groups=channels)
    return F.conv2d(x, kernel, padding=2, groups=channels)


class Attention(nn.Module):
  """(x + self-attention of one head between all positions of x) / sqrt(2)."""

  def __init__(self, channels: int, epsilon: float):
    super().__init__()
    self.norm = nn.GroupNorm(num_groups(channels), channels, eps=epsilon)
    self.query = conv1x1(channels, channels)
    self.key = conv1x1(channels, channels)
    self.value = conv1x1(channels, channels)
    self.out = conv1x1(channels, channels)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Returns a map of the same shape."""
    h = self.norm(x)
    heads = [layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.query, self.key, self.value)]
    h = F.scaled_dot_product_attention(*heads)[:, 0].transpose(1, 2).reshape(x.shape)
    return (x + self.out(h)) / math.sqrt(2)
