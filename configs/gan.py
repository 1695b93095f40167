"""The stages of the denoising GANs, their defaults, and the variants of every size.

DDGAN (arXiv:2112.07804), WaveDiff (arXiv:2211.16152), LDDGAN (thesis, with the settings of its training
scripts where the text gives none), latent diffusion's autoencoders (arXiv:2112.10752).
"""

from ml_collections import ConfigDict


def autoencoder_stage(optim, train) -> ConfigDict:
  """The autoencoder of the latent variants: f = 4, KL. `optim` and `train` make those sections."""
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
      'codebook_decay': 0.99,  # ema
      'restart_below': 1.0,  # ema: a code with a smaller average count starts anew at a vector of the batch
      'adversarial_weight': 0.5,  # 0 = no discriminator
      'adversarial_start_step': 50_000,
      'adaptive_weight': True,  # times the ratio of the gradients at the decoder's last kernel
    }
  )
  config.optim = optim(1e-4, b1=0.5, b2=0.9)
  config.optim_discriminator = optim(1e-4, b1=0.5, b2=0.9)
  config.train = train(500_000, 32, flip=True)
  config.sample = sample()
  return config


def light_decoder_stage(optim, train) -> ConfigDict:
  """A decoder of 1 to 2 million parameters, taught by the autoencoder's."""
  config = ConfigDict()
  config.experiment = 'light_decoder'
  config.autoencoder = ConfigDict({'stage': 'autoencoder', 'workdir': ''})
  config.model = ConfigDict({'channels': 64, 'num_blocks': 4, 'dtype': 'float32'})
  config.loss = ConfigDict({'perceptual': 'lpips_vgg16', 'perceptual_weight': 1.0})
  config.optim = optim(3e-4, schedule='cosine', ema_decay=0.999, ema_warmup=True)
  config.train = train(100_000, 32, flip=True)
  config.sample = sample()
  return config


def ddgan_stage(optim, train) -> ConfigDict:
  """The denoising GAN on pixels, with DDGAN's settings for CIFAR-10."""
  config = ConfigDict()
  config.experiment = 'ddgan'
  config.space = 'pixel'  # 'pixel' | 'wavelet' | 'latent'
  config.condition = 'none'  # 'none' | 'x0_vae': refine a VAE's image
  config.autoencoder = ConfigDict(
    {
      'stage': 'autoencoder',  # space = latent: the frozen autoencoder, this stage ...
      'workdir': '',  # ... of this other run; '' = this run
      'scaling': 'max',  # 'std' | 'max' | 'tanh': see vaediff/experiments/spaces.py
      'posterior': 'sample',  # of a KL bottleneck: 'sample' | 'mean'
      'decoder_stage': '',  # the stage of a light decoder to sample with; '' = the autoencoder's own
    }
  )
  config.vae = ConfigDict({'stage': 'vae', 'workdir': '', 'x0_vae_source': 'sample'})  # condition = x0_vae
  config.model = ConfigDict(
    {
      'network': 'ncsnpp',  # 'ncsnpp' | 'wavelet_ncsnpp' | 'uvit'
      'channels': 128,
      'channel_multipliers': (1, 2, 2, 2),
      'num_res_blocks': 2,
      'attention_resolutions': (16,),  # in pixels of the space's maps
      'latent_dim': 100,  # of the generator's z
      'num_mapping_layers': 4,
      'dropout': 0.0,
      'patch_size': 1,
      'bounded': True,  # a tanh at the end
      'remat': False,
      'dtype': 'float32',
      'wavelet': {  # wavelet_ncsnpp alone
        'use_frequency_bottleneck': True,
        'use_frequency_skips': True,
        'use_residual': True,
      },
      'uvit': {'patch_size': 2, 'dim': 384, 'depth': 8, 'num_heads': 6, 'mlp_ratio': 4.0},  # uvit alone
    }
  )
  config.discriminator = ConfigDict(
    {
      'variant': 'small',
      'num_layers': 4,
      'channels': 64,
      'time_dim': 256,
      'group_size': 4,
      'init_scale': 0.0,  # of the kernels that end a branch; 1 where the channels are few
      'dtype': 'float32',
    }
  )
  config.diffusion = ConfigDict({'num_steps': 4, 'beta_min': 0.1, 'beta_max': 20.0})
  config.loss = ConfigDict(
    {
      'r1_gamma': 0.02,
      'r1_every_steps': 15,
      'reconstruction': 'none',  # weight of |x0 - x0'|: 'none' | 'constant' | 'linear' | 'weighted_learning'
    }
  )
  config.optim = optim(1.6e-4, b1=0.5, b2=0.9, schedule='cosine', end_learning_rate=1e-5, ema_decay=0.9999)
  config.optim_discriminator = optim(1.25e-4, b1=0.5, b2=0.9, schedule='cosine', end_learning_rate=1e-5)
  config.train = train(351_000, 256, flip=True)
  config.sample = sample()
  config.sample.with_vae = True  # show the VAE sample beside each refined one
  return config


def sample() -> ConfigDict:
  return ConfigDict(
    {
      'checkpoint': 'latest',  # 'latest' | 'best'
      'num_images': 64,
      'batch_size': 64,
      'seed': 0,
      'with_vae': False,
      'save_npz': False,
      'save_images': False,  # one PNG per image, <workdir>/samples/<index>.png
    }
  )


LARGE = 128
"""Pixels from which the sizes of the 256 pixel networks are taken."""

# Variants ------------------------------------------------------------------------------------------


def ddgan(config: ConfigDict) -> None:
  """The denoising GAN on pixels alone."""
  config.stages = ('ddgan',)
  config.ddgan.space = 'pixel'
  if config.data.image_size >= LARGE:
    config.ddgan.model.update(
      {'channels': 64, 'channel_multipliers': (1, 1, 2, 2, 4, 4), 'num_mapping_layers': 3}
    )
    config.ddgan.discriminator.update({'variant': 'large', 'num_layers': 6})


def wavelet(config: ConfigDict) -> None:
  """On Haar wavelets, with the wavelet generator and the reconstruction loss (WaveDiff)."""
  config.stages = ('ddgan',)
  config.ddgan.space = 'wavelet'
  config.ddgan.model.network = 'wavelet_ncsnpp'
  config.ddgan.discriminator.num_layers = 3
  config.ddgan.loss.reconstruction = 'constant'
  if config.data.image_size >= LARGE:
    config.ddgan.model.update(
      {'channels': 64, 'channel_multipliers': (1, 2, 2, 2, 4), 'num_mapping_layers': 3}
    )
    config.ddgan.discriminator.update({'variant': 'large', 'num_layers': 5})


def latent(config: ConfigDict) -> None:
  """On the latents of an autoencoder, with Weighted Learning and constant learning rates (LDDGAN)."""
  config.stages = ('autoencoder', 'ddgan')
  config.ddgan.space = 'latent'
  config.ddgan.discriminator.num_layers = 3
  config.ddgan.loss.reconstruction = 'weighted_learning'
  for optim in (config.ddgan.optim, config.ddgan.optim_discriminator):
    optim.schedule = 'constant'
  if config.data.image_size >= LARGE:
    config.ddgan.model.num_mapping_layers = 3
    config.ddgan.discriminator.update({'variant': 'large', 'num_layers': 4})


def vq(config: ConfigDict) -> None:
  """As `latent`, with a codebook, that the decoder alone quantises with."""
  if config.ddgan.space != 'latent':
    latent(config)
  config.autoencoder.model.update({'bottleneck': 'vq', 'codebook_size': 512})


def light(config: ConfigDict) -> None:
  """As `latent`, sampling with a light decoder that is distilled from the autoencoder's."""
  if config.ddgan.space != 'latent':
    latent(config)
  config.stages = ('autoencoder', 'decoder', 'ddgan')
  config.ddgan.autoencoder.decoder_stage = 'decoder'


def free(config: ConfigDict) -> None:
  """As `latent`, on the free latents of LDDGAN's text: deterministic and bounded, without KL."""
  if config.ddgan.space != 'latent':
    latent(config)
  config.autoencoder.model.bottleneck = 'none'
  config.ddgan.autoencoder.scaling = 'tanh'


def adversarial_refiner(config: ConfigDict) -> None:
  """DiffuseVAE with a denoising GAN of 4 steps as its second stage."""
  ddgan(config)
  config.stages = ('vae', 'ddgan')
  config.ddgan.condition = 'x0_vae'
  config.ddgan.loss.reconstruction = 'weighted_learning'


VARIANTS = {
  'ddgan': ddgan,
  'wavelet': wavelet,
  'latent': latent,
  'light': light,
  'free': free,
  'vq': vq,
  'adversarial_refiner': adversarial_refiner,
}


def small(config: ConfigDict) -> None:
  """Networks for images of 8 to 64 pixels and a few cores: minutes to hours, not days."""
  config.autoencoder.model.update({'channels': 8, 'num_res_blocks': 1})
  config.autoencoder.loss.update({'kl_weight': 1e-4, 'adversarial_start_step': 500})
  config.autoencoder.optim.update({'learning_rate': 2e-3, 'b1': 0.9, 'b2': 0.99, 'schedule': 'cosine'})
  config.decoder.model.update({'channels': 24, 'num_blocks': 1})
  for stage in (config.autoencoder, config.decoder):
    stage.train.update(
      {'num_steps': 1000, 'batch_size': 64, 'eval_every_steps': 500, 'save_every_steps': 500, 'flip': False}
    )
  config.ddgan.model.update(
    {
      'channels': 16,
      'channel_multipliers': (1, 2, 2),
      'num_res_blocks': 1,
      'attention_resolutions': (),
      'latent_dim': 32,
      'num_mapping_layers': 2,
    }
  )
  config.ddgan.discriminator.update({'num_layers': 3, 'channels': 8, 'time_dim': 64, 'init_scale': 1.0})
  # The discriminator is narrow and must stay ahead: at equal rates, started at zero, it stayed at chance.
  config.ddgan.optim.update(
    {'learning_rate': 2e-4, 'end_learning_rate': 2e-5, 'ema_decay': 0.999, 'ema_warmup': True}
  )
  config.ddgan.optim_discriminator.update({'learning_rate': 2e-3, 'end_learning_rate': 2e-4})
  config.ddgan.train.update(
    {
      'num_steps': 6000,
      'batch_size': 32,
      'eval_every_steps': 1000,
      'save_every_steps': 1000,
      'grid_every_steps': 2000,
      'flip': False,
    }
  )


def small_latent(config: ConfigDict) -> None:
  """As `latent`, for the sizes of `small`: few positions, so a wider generator of two levels.

  Latents are scaled to unit deviation. Over their largest magnitude, the paper's scaling, those of
  Fashion-MNIST have deviations of 0.1 to 0.3, little beside the noise of the first step, and the
  discriminator stayed at chance.
  """
  latent(config)
  config.ddgan.model.update({'channels': 32, 'channel_multipliers': (1, 2), 'bounded': False})
  config.ddgan.autoencoder.scaling = 'std'
  config.ddgan.discriminator.channels = 16
  # twice the width, half the rate: with 2e-3 its logits ran away and came back to chance
  config.ddgan.optim_discriminator.learning_rate = 1e-3


def small_wavelet(config: ConfigDict) -> None:
  """As `wavelet`, with the plain generator: WaveDiff's own choice for 32 pixels, whose wavelets are 16x16."""
  wavelet(config)
  config.ddgan.model.network = 'ncsnpp'


def small_free(config: ConfigDict) -> None:
  """As `small_latent`, on free latents."""
  small_latent(config)
  config.autoencoder.model.bottleneck = 'none'


def debug(config: ConfigDict) -> None:
  """Makes the three stages tiny, for images of 8 or 16 pixels; without LPIPS, whose weights are fetched."""
  autoencoder, decoder, player = config.autoencoder, config.decoder, config.ddgan
  autoencoder.model.update(
    {
      'channels': 8,
      'channel_multipliers': (1, 1),
      'num_res_blocks': 1,
      'attention_resolutions': (),
      'latent_channels': 2,
      'codebook_size': 16 if autoencoder.model.bottleneck == 'vq' else 0,
    }
  )
  autoencoder.discriminator.update({'channels': 4, 'num_layers': 1})
  autoencoder.loss.update({'adversarial_start_step': 2, 'perceptual': ''})
  decoder.model.update({'channels': 8, 'num_blocks': 1})
  decoder.loss.perceptual = ''
  player.model.update(
    {
      'channels': 8,
      'channel_multipliers': (1, 1),
      'num_res_blocks': 1,
      'attention_resolutions': (),
      'latent_dim': 8,
      'num_mapping_layers': 1,
    }
  )
  player.model.uvit.update({'dim': 16, 'depth': 2, 'num_heads': 2})
  player.discriminator.update({'variant': 'small', 'num_layers': 3, 'channels': 4, 'time_dim': 8})
  player.loss.r1_every_steps = 2
