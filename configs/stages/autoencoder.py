"""The autoencoder of latent spaces: latent diffusion's (arXiv:2112.10752) and LDDGAN's (thesis)."""

from ml_collections import ConfigDict

from configs import parts

FLOAT32 = ('discriminator',)
"""What `bfloat16` leaves as it is: the weight of its loss is a ratio of gradients."""


def section() -> ConfigDict:
  """With KL bottleneck and f = 4."""
  config = ConfigDict()
  config.experiment = 'autoencoder'
  config.model = ConfigDict(
    {
      'latent_channels': 4,
      'channels': 128,
      'channel_multipliers': (1, 2, 4),  # one level each; f = 2 to the number of levels less one
      'num_res_blocks': 2,
      'attention_resolutions': (),  # in pixels; the middle always has attention
      'dropout': 0.0,
      'bottleneck': 'kl',  # 'kl' | 'none' (deterministic, bounded by tanh) | 'vq'
      'codebook_size': 0,  # codes; positive for 'vq' alone
      'normalized_codes': False,  # vq: vectors and codes have length 1
      'inner_channels': 0,  # of the maps beside the 1x1 convolutions at the latents; 0 = latent_channels
      'tanh_out': False,  # the decoder ends in a tanh
      'remat': False,
      'dtype': 'float32',
    }
  )
  config.discriminator = ConfigDict({'channels': 64, 'num_layers': 3, 'norm': 'group', 'dtype': 'float32'})
  config.loss = ConfigDict(
    {
      'pixel': 'l1',  # 'l1' | 'l2', mean over pixels in [-1, 1]
      'perceptual': 'lpips_vgg16',  # 'lpips_vgg16' | 'lpips_alexnet' | '' = none
      'perceptual_weight': 1.0,
      'kl_weight': 1e-6,  # of the KL in nats per dimension of the image
      'commitment_weight': 0.25,  # vq: of |z - sg(e)|^2
      'codebook': 'ema',  # vq: codes follow averages, 'ema', or the loss |sg(z) - e|^2, 'gradient'
      'codebook_decay': 0.99,  # vq: of the averages; with 'gradient' they are of counts alone
      'restart_below': 1.0,  # vq: a code with a smaller average count starts anew at a vector of the batch
      'entropy_weight': 0.0,  # vq: of the mean entropy over codes less the entropy of the mean; 0 = off
      'adversarial_weight': 0.5,  # 0 = no discriminator
      'adversarial_start_step': 50_000,
      'discriminator_start_step': 50_000,  # it learns from here on, at the latest from adversarial_start_step
      'adaptive_weight': True,  # times the ratio of the gradients at the decoder's last kernel
    }
  )
  config.optim = parts.optim(1e-4, b1=0.5, b2=0.9)
  config.optim_discriminator = parts.optim(1e-4, b1=0.5, b2=0.9)
  config.train = parts.train(500_000, 32, flip=True)
  config.sample = parts.sample(with_vae=False)
  return config


def debug(stage: ConfigDict, image_size: int) -> None:
  """For images of 8 or 16 pixels; without LPIPS, whose weights are fetched."""
  stage.model.update(
    {
      'channels': 8,
      'channel_multipliers': (1, 1),
      'num_res_blocks': 1,
      'attention_resolutions': (),
      'latent_channels': 2,
      'codebook_size': 16 if stage.model.bottleneck == 'vq' else 0,
    }
  )
  stage.discriminator.update({'channels': 4, 'num_layers': 1})
  stage.loss.update({'adversarial_start_step': 1, 'perceptual': ''})


VARIANTS = {}
