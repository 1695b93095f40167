"""`vaediff.models.ncsnpp.NcsnPlusPlus` once more, in PyTorch: the generator of denoising diffusion GANs.

Only what the benchmarked configs use: no condition, patches of one pixel, no dropout.
"""

import math

import torch
import torch.nn.functional as F
from ml_collections import ConfigDict
from torch import nn

from benchmarks import torch_layers as layers

NORM_EPSILON = 1e-6
PIXEL_NORM_EPSILON = 1e-8


class AdaptiveGroupNorm(nn.Module):
  """Group norm whose scale and shift are linear in the style."""

  def __init__(self, channels: int, style: int):
    super().__init__()
    self.groups = layers.num_groups(channels)
    self.style = nn.Linear(style, 2 * channels)

  def forward(self, x: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
    """Returns gamma(style) * normalised x + beta(style)."""
    gamma, beta = self.style(style)[:, :, None, None].chunk(2, dim=1)
    return gamma * F.group_norm(x, self.groups, eps=NORM_EPSILON) + beta


class ResidualBlock(nn.Module):
  """(x + branch(x)) / sqrt(2), both resampled before the first convolution if `kind` is 'down' or 'up'."""

  def __init__(self, inputs: int, outputs: int, embedding: int, style: int, kind: str = ''):
    super().__init__()
    self.norm_1 = AdaptiveGroupNorm(inputs, style)
    self.conv_1 = layers.conv3x3(inputs, outputs)
    self.emb = nn.Linear(embedding, outputs)
    self.norm_2 = AdaptiveGroupNorm(outputs, style)
    self.conv_2 = layers.conv3x3(outputs, outputs)
    self.resample = layers.Fir(inputs, kind) if kind else nn.Identity()
    self.skip = layers.conv1x1(inputs, outputs) if kind or inputs != outputs else nn.Identity()

  def forward(self, x: torch.Tensor, emb: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
    """Returns the map after the block."""
    h = self.conv_1(self.resample(F.silu(self.norm_1(x, style))))
    h = h + self.emb(F.silu(emb))[:, :, None, None]
    h = self.conv_2(F.silu(self.norm_2(h, style)))
    return (self.skip(self.resample(x)) + h) / math.sqrt(2)


class PyramidDown(nn.Module):
  """One step of the input pyramid: blur, then a stride-2 convolution."""

  def __init__(self, inputs: int, outputs: int):
    super().__init__()
    self.blur = layers.Fir(inputs, 'blur')
    self.conv = nn.Conv2d(inputs, outputs, 3, stride=2)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Returns the next, half as large, level of the pyramid."""
    return self.conv(self.blur(x))


class NcsnPlusPlus(nn.Module):
  """The generator: (x_t [batch, channels, height, width], t [batch], z [batch, latent]) -> x0_hat."""

  def __init__(self, config: ConfigDict, channels: int, size: int):
    """Builds the network of a `ddgan.model` section for images of `channels` channels and side `size`."""
    super().__init__()
    self.width, self.multipliers = config.channels, config.channel_multipliers
    self.num_res_blocks, self.bounded = config.num_res_blocks, config.bounded
    attends = [size >> level in config.attention_resolutions for level in range(len(self.multipliers))]
    embedding, style = 4 * self.width, 256
    widths = [multiplier * self.width for multiplier in self.multipliers]

    def block(name: str, inputs: int, outputs: int, kind: str = '') -> None:
      self.add_module(name, ResidualBlock(inputs, outputs, embedding, style, kind))

    self.time_embedding = nn.ModuleDict(
      {'dense_0': nn.Linear(self.width, embedding), 'dense_1': nn.Linear(embedding, embedding)}
    )
    self.mapping = nn.ModuleDict(
      {
        f'dense_{i}': nn.Linear(style if i else config.latent_dim, style)
        for i in range(1 + config.num_mapping_layers)
      }
    )
    self.conv_in = layers.conv3x3(channels, self.width)
    now, skips, pyramid = self.width, [self.width], channels
    for level, width in enumerate(widths):
      for i in range(self.num_res_blocks):
        block(f'down_{level}_res_{i}', now, width)
        if attends[level]:
          self.add_module(f'down_{level}_attn_{i}', layers.Attention(width, NORM_EPSILON))
        now = width
        skips.append(now)
      if level < len(widths) - 1:
        block(f'down_{level}_halve', now, now, 'down')
        self.add_module(f'down_{level}_pyramid', PyramidDown(pyramid, now))
        pyramid = now
        skips.append(now)
    block('middle_res_0', now, now)
    self.middle_attn = layers.Attention(now, NORM_EPSILON)
    block('middle_res_1', now, now)
    for level, width in reversed(list(enumerate(widths))):
      for i in range(self.num_res_blocks + 1):
        block(f'up_{level}_res_{i}', now + skips.pop(), width)
        now = width
      if attends[level]:
        self.add_module(f'up_{level}_attn', layers.Attention(now, NORM_EPSILON))
      if level > 0:
        block(f'up_{level}_double', now, now, 'up')
    self.norm_out = nn.GroupNorm(layers.num_groups(now), now, eps=NORM_EPSILON)
    self.conv_out = layers.conv3x3(now, channels)

  def forward(self, x: torch.Tensor, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Returns x0_hat, within [-1, 1] if `bounded`."""
    emb = self.time_embedding['dense_0'](layers.sinusoidal_embedding(t, self.width))
    emb = self.time_embedding['dense_1'](F.silu(emb))
    style = z * torch.rsqrt(z.square().mean(dim=1, keepdim=True) + PIXEL_NORM_EPSILON)
    for layer in self.mapping.values():
      style = F.silu(layer(style))
    block = lambda name, h: getattr(self, name)(h, emb, style)
    attend = lambda name, h: getattr(self, name)(h) if hasattr(self, name) else h
    h, pyramid = self.conv_in(x), x
    skips = [h]
    for level in range(len(self.multipliers)):
      for i in range(self.num_res_blocks):
        h = attend(f'down_{level}_attn_{i}', block(f'down_{level}_res_{i}', h))
        skips.append(h)
      if level < len(self.multipliers) - 1:
        h = block(f'down_{level}_halve', h)
        h = pyramid = (getattr(self, f'down_{level}_pyramid')(pyramid) + h) / math.sqrt(2)
        skips.append(h)
    h = block('middle_res_1', self.middle_attn(block('middle_res_0', h)))
    for level in reversed(range(len(self.multipliers))):
      for i in range(self.num_res_blocks + 1):
        h = block(f'up_{level}_res_{i}', torch.cat([h, skips.pop()], dim=1))
      h = attend(f'up_{level}_attn', h)
      if level > 0:
        h = block(f'up_{level}_double', h)
    h = self.conv_out(F.silu(self.norm_out(h)))
    return torch.tanh(h) if self.bounded else h
