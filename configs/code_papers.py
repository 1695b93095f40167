"""The settings of published autoencoders with codes, and of one without, for 256 pixels.

VQGAN (arXiv:2012.09841, of its repository's configs), latent diffusion (arXiv:2112.10752), LlamaGen
(arXiv:2406.06525). Each edits the section of a stage; `VARIANTS` makes runs of it.
"""

from ml_collections import ConfigDict

from configs import gan_papers
from configs.run import Run
from configs.stages import vqgan

DEVICES = 8
"""Of the published VQGANs, with 12 images each."""


def _vqgan(stage: ConfigDict, codes: int) -> None:
  stage.model.update(
    {
      'latent_channels': 256,
      'channels': 128,
      'channel_multipliers': (1, 1, 2, 2, 4),
      'num_res_blocks': 2,
      'attention_resolutions': (16,),
      'bottleneck': 'vq',
      'codebook_size': codes,
    }
  )
  stage.loss.update(
    {
      'pixel': 'l1',
      'perceptual': 'lpips_vgg16',
      'codebook': 'gradient',
      'commitment_weight': 0.25,
      'restart_below': 0.0,
      'adversarial_weight': 0.8,
      'adversarial_start_step': 250_001,
      'discriminator_start_step': 250_001,
    }
  )
  for optim in (stage.optim, stage.optim_discriminator):
    optim.update({'learning_rate': vqgan.RATE * 12 * DEVICES, 'b1': 0.5, 'b2': 0.9})
  stage.train.batch_size = 12 * DEVICES


def vqgan_f16_1024(stage: ConfigDict) -> None:
  """VQGAN, 16x16 of 1,024 codes: 72,141,699 parameters."""
  _vqgan(stage, 1024)


def vqgan_f16_16384(stage: ConfigDict) -> None:
  """VQGAN, 16x16 of 16,384 codes: 76,073,859 parameters."""
  _vqgan(stage, 16384)


def vqgan_f4(stage: ConfigDict) -> None:
  """For 32 and 64 pixels, of which f = 16 leaves almost nothing."""
  stage.model.update({'channel_multipliers': (1, 2, 4), 'attention_resolutions': ()})


def _latent_diffusion(stage: ConfigDict, codes: int, channels: int, multipliers, attention) -> None:
  _vqgan(stage, codes)
  stage.model.update(
    {
      'latent_channels': channels,
      'channel_multipliers': multipliers,
      'attention_resolutions': attention,
    }
  )
  stage.loss.update({'adversarial_weight': 0.75, 'adversarial_start_step': 0, 'discriminator_start_step': 0})


def ldm_vq_f4(stage: ConfigDict) -> None:
  """Latent diffusion, 64x64 of 8,192 codes of 3 numbers: 55,322,782 parameters."""
  _latent_diffusion(stage, 8192, 3, (1, 2, 4), ())


def ldm_vq_f8(stage: ConfigDict) -> None:
  """Latent diffusion, 32x32 of 16,384 codes of 4 numbers: 67,717,295 parameters."""
  _latent_diffusion(stage, 16384, 4, (1, 2, 2, 4), (32,))


def ldm_vq_f16(stage: ConfigDict) -> None:
  """Latent diffusion, 16x16 of 16,384 codes of 8 numbers: 69,593,371 parameters."""
  _latent_diffusion(stage, 16384, 8, (1, 1, 2, 2, 4), (16,))


def ldm_kl_f8(stage: ConfigDict) -> None:
  """Latent diffusion's, and Stable Diffusion's, 32x32 latents of 4 numbers: 83,653,863 parameters."""
  stage.model.update({'latent_channels': 4, 'bottleneck': 'kl', 'codebook_size': 0})
  stage.model.attention_resolutions = ()
  gan_papers.kl_f8(stage)


def _llamagen(stage: ConfigDict, multipliers: tuple[int, ...], attention: tuple[int, ...]) -> None:
  _vqgan(stage, 16384)
  stage.model.update(
    {
      'latent_channels': 8,
      'inner_channels': 256,
      'normalized_codes': True,
      'channel_multipliers': multipliers,
      'attention_resolutions': attention,
    }
  )
  stage.loss.update(
    {
      'pixel': 'l2',
      'adversarial_weight': 0.5,
      'adversarial_start_step': 20_000,
      'discriminator_start_step': 20_000,
    }
  )
  for optim in (stage.optim, stage.optim_discriminator):
    optim.update({'learning_rate': 1e-4, 'b1': 0.9, 'b2': 0.95, 'weight_decay': 0.05, 'clip_norm': 1.0})
  stage.train.update({'batch_size': 128, 'num_steps': 400_000})  # 40 epochs of ImageNet


def llamagen_vq16(stage: ConfigDict) -> None:
  """LlamaGen, 16x16 of 16,384 codes of 8 numbers, at length 1: 71,883,403 parameters."""
  _llamagen(stage, (1, 1, 2, 2, 4), (16,))


def llamagen_vq8(stage: ConfigDict) -> None:
  """LlamaGen, 32x32 of 16,384 codes of 8 numbers, at length 1: 70,109,835 parameters."""
  _llamagen(stage, (1, 2, 2, 4), (32,))


PRESETS = {
  preset.__name__: preset
  for preset in (
    vqgan_f16_1024,
    vqgan_f16_16384,
    ldm_vq_f4,
    ldm_vq_f8,
    ldm_vq_f16,
    llamagen_vq16,
    llamagen_vq8,
  )
}
"""Edits of the stage `vqgan`, by name; `ldm_kl_f8` is one of the stage `autoencoder`."""


def _alone(name: str):
  def variant(run: Run) -> None:
    run.only(vqgan.STAGE)
    run.edit(vqgan.STAGE, PRESETS[name])

  variant.__doc__ = PRESETS[name].__doc__
  return variant


VARIANTS = {name: _alone(name) for name in PRESETS}
"""Of data sets of 256 pixels: the stage `vqgan` alone, with these settings."""
