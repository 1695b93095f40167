"""The settings of the papers for their denoising GANs, by data set.

DDGAN (arXiv:2112.07804), WaveDiff (arXiv:2211.16152), LDDGAN (thesis, with the settings of its training
scripts where the text gives none), latent diffusion's autoencoders (arXiv:2112.10752).
"""

from ml_collections import ConfigDict

from configs import gan


def cifar10_latent(config: ConfigDict) -> None:
  """LDDGAN on CIFAR-10: f2 KL autoencoder of 16x16x4 latents, 4 steps, z of 50."""
  gan.latent(config)
  config.autoencoder.model.update(
    {
      'channel_multipliers': (1, 2),
      'attention_resolutions': (16,),
      'dropout': 0.2,
      'tanh_out': True,
    }
  )
  config.autoencoder.train.num_steps = 469_000  # 300 epochs of batch 32
  config.ddgan.model.update({'channel_multipliers': (1, 2, 2), 'attention_resolutions': (), 'latent_dim': 50})
  config.ddgan.train.num_steps = 391_000  # 2,000 epochs of batch 256


def cifar10_wavelet(config: ConfigDict) -> None:
  """WaveDiff on CIFAR-10: the plain generator on 16x16x12 wavelets."""
  gan.wavelet(config)
  config.ddgan.model.update(
    {'network': 'ncsnpp', 'channel_multipliers': (1, 2, 2), 'attention_resolutions': ()}
  )


def high_resolution(config: ConfigDict, *, num_steps: int, r1_gamma: float, learning_rate: float) -> None:
  """What DDGAN, WaveDiff and LDDGAN share at 256 pixels."""
  config.ddgan.diffusion.num_steps = num_steps
  config.ddgan.loss.update({'r1_gamma': r1_gamma, 'r1_every_steps': 10})
  config.ddgan.optim.learning_rate = learning_rate
  config.ddgan.optim_discriminator.learning_rate = 1e-4
  config.ddgan.sample.batch_size = 16
  config.autoencoder.sample.batch_size = config.decoder.sample.batch_size = 16


def high_resolution_ddgan(config: ConfigDict, num_updates: int, batch_size: int) -> None:
  """DDGAN at 256 pixels."""
  gan.ddgan(config)
  config.ddgan.train.update({'num_steps': num_updates, 'batch_size': batch_size})


def high_resolution_wavelet(config: ConfigDict, num_updates: int, batch_size: int) -> None:
  """WaveDiff at 256 pixels."""
  gan.wavelet(config)
  config.ddgan.train.update({'num_steps': num_updates, 'batch_size': batch_size})


def high_resolution_latent(config: ConfigDict, num_updates: int, batch_size: int) -> None:
  """LDDGAN at 256 pixels; the autoencoder is the data set's."""
  gan.latent(config)
  config.ddgan.optim.ema_decay = 0.999
  config.ddgan.train.update({'num_steps': num_updates, 'batch_size': batch_size})


def celeba256_ddgan(config: ConfigDict) -> None:
  """800 epochs of batch 32, 2 steps."""
  high_resolution(config, num_steps=2, r1_gamma=2.0, learning_rate=2e-4)
  high_resolution_ddgan(config, 725_000, 32)


def celeba256_wavelet(config: ConfigDict) -> None:
  """500 epochs of batch 64, 2 steps."""
  high_resolution(config, num_steps=2, r1_gamma=2.0, learning_rate=2e-4)
  high_resolution_wavelet(config, 227_000, 64)


def celeba256_latent(config: ConfigDict) -> None:
  """400 epochs of batch 128, 2 steps, on 64x64x3 latents with 8,192 codes, quantised in the decoder."""
  high_resolution(config, num_steps=2, r1_gamma=2.0, learning_rate=2e-4)
  high_resolution_latent(config, 91_000, 128)
  config.autoencoder.model.update({'latent_channels': 3, 'bottleneck': 'vq', 'codebook_size': 8192})
  config.autoencoder.loss.update({'adversarial_weight': 0.75, 'adversarial_start_step': 0})


def lsun_church256_ddgan(config: ConfigDict) -> None:
  """500 epochs (of 120,000 images) of batch 64, 4 steps."""
  high_resolution(config, num_steps=4, r1_gamma=1.0, learning_rate=1.6e-4)
  high_resolution_ddgan(config, 937_000, 64)
  config.ddgan.optim.ema_decay = 0.999


def lsun_church256_wavelet(config: ConfigDict) -> None:
  """500 epochs (of 120,000 images) of batch 64, 4 steps."""
  high_resolution(config, num_steps=4, r1_gamma=1.0, learning_rate=1.6e-4)
  high_resolution_wavelet(config, 937_000, 64)
  config.ddgan.optim.ema_decay = 0.999


def lsun_church256_latent(config: ConfigDict) -> None:
  """400 epochs (of 120,000 images) of batch 128, 4 steps, on 32x32x4 latents of a KL autoencoder."""
  high_resolution(config, num_steps=4, r1_gamma=1.0, learning_rate=2e-4)
  high_resolution_latent(config, 375_000, 128)
  config.autoencoder.model.channel_multipliers = (1, 2, 4, 4)
  config.ddgan.model.update({'num_res_blocks': 3, 'latent_dim': 50})
