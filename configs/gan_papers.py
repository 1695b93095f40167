"""The settings of the papers for their denoising GANs, by data set.

DDGAN (arXiv:2112.07804), WaveDiff (arXiv:2211.16152), LDDGAN (thesis, with the settings of its training
scripts where the text gives none), latent diffusion's autoencoders (arXiv:2112.10752).
"""

from ml_collections import ConfigDict

from configs.run import Run
from configs.stages import ddgan as gan


def cifar10_latent(run: Run) -> None:
  """LDDGAN on CIFAR-10: f2 KL autoencoder of 16x16x4 latents, 4 steps, z of 50."""
  gan.latent(run)
  autoencoder, ddgan = run.section('autoencoder'), run.section('ddgan')
  autoencoder.model.update(
    {
      'channel_multipliers': (1, 2),
      'attention_resolutions': (16,),
      'dropout': 0.2,
      'tanh_out': True,
    }
  )
  autoencoder.train.num_steps = 469_000  # 300 epochs of batch 32
  ddgan.model.update({'channel_multipliers': (1, 2, 2), 'attention_resolutions': (), 'latent_dim': 50})
  ddgan.train.num_steps = 391_000  # 2,000 epochs of batch 256


def cifar10_wavelet(run: Run) -> None:
  """WaveDiff on CIFAR-10: the plain generator on 16x16x12 wavelets."""
  gan.wavelet(run)
  run.section('ddgan').model.update(
    {'network': 'ncsnpp', 'channel_multipliers': (1, 2, 2), 'attention_resolutions': ()}
  )


def _few_images(stage: ConfigDict) -> None:
  stage.sample.batch_size = 16


def high_resolution(run: Run, *, num_steps: int, r1_gamma: float, learning_rate: float) -> ConfigDict:
  """What DDGAN, WaveDiff and LDDGAN share at 256 pixels; returns the section of the GAN."""
  ddgan = run.section('ddgan')
  ddgan.diffusion.num_steps = num_steps
  ddgan.loss.update({'r1_gamma': r1_gamma, 'r1_every_steps': 10})
  ddgan.optim.learning_rate = learning_rate
  ddgan.optim_discriminator.learning_rate = 1e-4
  run.edit_all({'ddgan': _few_images, 'autoencoder': _few_images, 'decoder': _few_images})
  return ddgan


def celeba256_ddgan(run: Run) -> None:
  """800 epochs of batch 32, 2 steps."""
  ddgan = high_resolution(run, num_steps=2, r1_gamma=2.0, learning_rate=2e-4)
  gan.ddgan(run)
  ddgan.train.update({'num_steps': 725_000, 'batch_size': 32})


def celeba256_wavelet(run: Run) -> None:
  """500 epochs of batch 64, 2 steps."""
  ddgan = high_resolution(run, num_steps=2, r1_gamma=2.0, learning_rate=2e-4)
  gan.wavelet(run)
  ddgan.train.update({'num_steps': 227_000, 'batch_size': 64})


def vq_f4(autoencoder: ConfigDict) -> None:
  """Latent diffusion's autoencoder of 64x64x3 latents for 256 pixels, with 8,192 codes."""
  autoencoder.model.update({'latent_channels': 3, 'bottleneck': 'vq', 'codebook_size': 8192})
  autoencoder.loss.update({'adversarial_weight': 0.75, 'adversarial_start_step': 0})


def kl_f8(autoencoder: ConfigDict) -> None:
  """Latent diffusion's autoencoder of 32x32x4 latents for 256 pixels."""
  autoencoder.model.channel_multipliers = (1, 2, 4, 4)


def celeba256_latent(run: Run) -> None:
  """400 epochs of batch 128, 2 steps, on 64x64x3 latents with 8,192 codes, quantised in the decoder."""
  ddgan = high_resolution(run, num_steps=2, r1_gamma=2.0, learning_rate=2e-4)
  gan.latent(run)
  ddgan.optim.ema_decay = 0.999
  ddgan.train.update({'num_steps': 91_000, 'batch_size': 128})
  vq_f4(run.section('autoencoder'))


def lsun_church256_ddgan(run: Run) -> None:
  """500 epochs (of 120,000 images) of batch 64, 4 steps."""
  ddgan = high_resolution(run, num_steps=4, r1_gamma=1.0, learning_rate=1.6e-4)
  gan.ddgan(run)
  ddgan.optim.ema_decay = 0.999
  ddgan.train.update({'num_steps': 937_000, 'batch_size': 64})


def lsun_church256_wavelet(run: Run) -> None:
  """500 epochs (of 120,000 images) of batch 64, 4 steps."""
  ddgan = high_resolution(run, num_steps=4, r1_gamma=1.0, learning_rate=1.6e-4)
  gan.wavelet(run)
  ddgan.optim.ema_decay = 0.999
  ddgan.train.update({'num_steps': 937_000, 'batch_size': 64})


def lsun_church256_latent(run: Run) -> None:
  """400 epochs (of 120,000 images) of batch 128, 4 steps, on 32x32x4 latents of a KL autoencoder."""
  ddgan = high_resolution(run, num_steps=4, r1_gamma=1.0, learning_rate=2e-4)
  gan.latent(run)
  ddgan.optim.ema_decay = 0.999
  ddgan.train.update({'num_steps': 375_000, 'batch_size': 128})
  ddgan.model.update({'num_res_blocks': 3, 'latent_dim': 50})
  kl_f8(run.section('autoencoder'))
