"""`vaediff.models.vae.Vae` once more, in PyTorch: the residual VAE of DiffuseVAE."""

import torch
import torch.nn.functional as F
from ml_collections import ConfigDict
from torch import nn

from benchmarks import torch_layers as layers
from vaediff.models.vae_blocks import Layer, plan_vae


class Bottleneck(nn.Module):
  """x plus four convolutions of half the width, with the exact GELU before each."""

  def __init__(self, channels: int, kernel_size: int):
    super().__init__()
    middle = layers.conv3x3 if kernel_size == 3 else layers.conv1x1
    self.conv_1 = layers.conv1x1(channels, channels // 2)
    self.conv_2 = middle(channels // 2, channels // 2)
    self.conv_3 = middle(channels // 2, channels // 2)
    self.conv_4 = layers.conv1x1(channels // 2, channels)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Returns a map of the same shape."""
    h = x
    for layer in (self.conv_1, self.conv_2, self.conv_3, self.conv_4):
      h = layer(F.gelu(h))
    return x + h


def _layers(plan: tuple[Layer, ...], channels: int) -> tuple[list[tuple[str, nn.Module]], int]:
  """Returns the named layers of a plan, and the channels that they end with."""
  modules = []
  for layer in plan:
    match layer.kind:
      case 'residual':
        modules.append((layer.name, Bottleneck(channels, layer.value)))
      case 'project':
        modules.append((layer.name, layers.conv1x1(channels, layer.value, bias=False)))
        channels = layer.value
      case 'pool':
        modules.append((layer.name, nn.AvgPool2d(layer.value)))
      case 'upsample':
        modules.append((layer.name, nn.Upsample(scale_factor=layer.value, mode='nearest')))
      case _:
        raise ValueError(f'the layer {layer.kind!r} (model.stem = dense) is not written in PyTorch')
  return modules, channels


class Chain(nn.Module):
  """Named layers one after the other."""

  def __init__(self, modules: list[tuple[str, nn.Module]]):
    super().__init__()
    self.order = [name for name, _ in modules]
    for name, module in modules:
      self.add_module(name, module)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Returns x after all layers."""
    for name in self.order:
      x = getattr(self, name)(x)
    return x


class Vae(nn.Module):
  """The VAE: images in [0, 1] and noise to the reconstruction in [0, 1], mean and log variance."""

  def __init__(self, config: ConfigDict, channels: int):
    """Builds the network of a `vae.model` section for images of `channels` channels."""
    super().__init__()
    plan = plan_vae(
      encoder_blocks=config.encoder_blocks,
      decoder_blocks=config.decoder_blocks,
      encoder_channels=config.encoder_channels,
      decoder_channels=config.decoder_channels,
      latent_dim=config.latent_dim,
      dense_stem=config.stem == 'dense',
    )
    encoder, width = _layers(plan.encoder, plan.first_channels)
    self.encoder = Chain([('conv_in', layers.conv3x3(channels, plan.first_channels, bias=False)), *encoder])
    self.encoder_heads = nn.ModuleDict(
      {name: nn.Linear(width, config.latent_dim, bias=False) for name in ('mean', 'logvar')}
    )
    decoder, width = _layers(plan.decoder, config.latent_dim)
    self.decoder = Chain([*decoder, ('conv_out', layers.conv3x3(width, channels))])

  def forward(self, x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the reconstruction from z = mean + exp(logvar / 2) * noise, the mean and the log variance."""
    h = self.encoder(x).flatten(1)
    mean, logvar = self.encoder_heads['mean'](h).float(), self.encoder_heads['logvar'](h).float()
    z = mean + torch.exp(0.5 * logvar) * noise
    return torch.sigmoid(self.decoder(z[:, :, None, None]).float()), mean, logvar
