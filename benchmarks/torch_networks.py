"""The PyTorch networks of all cases, built from this project's configs.

U-Net and decoder are those of diffusers, the implementation that most PyTorch users run; the others are
written here from this project's Flax modules, because there is no public equal. That they are the same
networks is shown by `benchmarks.equality`: the counts agree, and the outputs with copied weights.
"""

import torch
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.unets.unet_2d import UNet2DModel
from ml_collections import ConfigDict
from torch import nn

from benchmarks.cases import Case
from benchmarks.torch_layers import num_groups
from benchmarks.torch_ncsnpp import NcsnPlusPlus
from benchmarks.torch_vae import Vae


class LatentDecoder(nn.Module):
  """Latents [batch, latent, height, width] to images: diffusers' decoder and what surrounds it in ours."""

  def __init__(self, config: ConfigDict, channels: int, size: int):
    """Builds the decoder of an `autoencoder.model` section for images of `channels` channels."""
    super().__init__()
    widths = [multiplier * config.channels for multiplier in config.channel_multipliers]
    attends = [size >> level in config.attention_resolutions for level in range(len(widths))]
    self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
    self.decoder = Decoder(
      in_channels=config.latent_channels,
      out_channels=channels,
      up_block_types=['AttnUpDecoderBlock2D' if here else 'UpDecoderBlock2D' for here in reversed(attends)],
      block_out_channels=widths,
      layers_per_block=config.num_res_blocks,
      norm_num_groups=1,
    )
    set_groups(self)
    self.tanh_out = config.tanh_out

  def forward(self, z: torch.Tensor) -> torch.Tensor:
    """Returns images."""
    image = self.decoder(self.post_quant_conv(z))
    return torch.tanh(image) if self.tanh_out else image


class UNet(nn.Module):
  """diffusers' U-Net with the arguments of this project's variant 'openai'."""

  def __init__(self, config: ConfigDict, channels: int, size: int, conditional: bool):
    """Builds the network of a `refiner.model` section for images of `channels` channels and side `size`.

    Raises:
      ValueError: diffusers' network cannot be made equal.
    """
    super().__init__()
    widths = [multiplier * config.channels for multiplier in config.channel_multipliers]
    attends = [size >> level in config.attention_resolutions for level in range(len(widths))]
    attended = {width for width, here in zip(widths, attends, strict=True) if here} | {widths[-1]}
    if config.variant != 'openai' or config.scale_shift_norm or len(attended) > 1:
      raise ValueError("diffusers' U-Net equals ours for variant 'openai' and one width with attention")
    self.inner = UNet2DModel(
      sample_size=size,
      in_channels=2 * channels if conditional else channels,
      out_channels=channels,
      down_block_types=['AttnDownBlock2D' if here else 'DownBlock2D' for here in attends],
      up_block_types=['AttnUpBlock2D' if here else 'UpBlock2D' for here in reversed(attends)],
      block_out_channels=widths,
      layers_per_block=config.num_res_blocks,
      downsample_padding=1,
      dropout=config.dropout,
      attention_head_dim=widths[-1] // config.num_heads,
      norm_num_groups=1,
      norm_eps=1e-5,
    )
    set_groups(self)

  def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Returns the prediction at x_t, concatenated with the condition, and the step index 0 ... 999."""
    return self.inner(x, index, return_dict=False)[0]


def set_groups(network: nn.Module) -> None:
  """Gives every group norm this project's number of groups, which is 32 for all widths from 128 on."""
  for module in network.modules():
    if isinstance(module, nn.GroupNorm):
      module.num_groups = num_groups(module.num_channels)


def build(case: Case, config: ConfigDict) -> nn.Module:
  """Returns the network of a case with PyTorch's own random weights."""
  section, size, channels = config[case.stage].model, config.data.image_size, config.data.channels
  match case.network:
    case 'unet':
      conditional = config.refiner.diffusion.condition != 'none'
      return UNet(section, channels, size, conditional)
    case 'vae':
      return Vae(section, channels)
    case 'ncsnpp':
      return NcsnPlusPlus(section, channels, size)
    case _:
      return LatentDecoder(section, channels, size)


def num_parameters(network: nn.Module) -> int:
  """Returns the number of scalars that are trained."""
  return sum(parameter.numel() for parameter in network.parameters())
