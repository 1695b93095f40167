"""DiffuseVAE on Fashion-MNIST, 28x28 padded to 32x32, grey.

    python -m vaediff.main --config=configs/fashion_mnist.py

Data: TFDS `fashion_mnist`, or the four idx files of a folder (Debian's package dataset-fashion-mnist
installs them) with `:idx` and, for another folder, `--config.data.path=...`.
Networks: a quarter of the width of the CIFAR-10 ones, so that a CPU can train them overnight.

Hardware, hours and figures: not yet measured.
"""

from configs import base, gan, presets


def _idx(config):
  config.data.source = 'idx'
  config.data.path = '/usr/share/datasets/fashion-mnist'


def small_gan(config):
  """Networks of a denoising GAN for two cores: minutes, not days. LPIPS would cost more than all of them."""
  config.autoencoder.model.update({'channels': 8, 'num_res_blocks': 1})
  config.autoencoder.loss.update({'perceptual': '', 'adversarial_weight': 0.0, 'kl_weight': 1e-4})
  config.autoencoder.optim.update({'learning_rate': 2e-3, 'b1': 0.9, 'b2': 0.99, 'schedule': 'cosine'})
  config.autoencoder.train = base.train(1000, 64, eval_every_steps=1000, save_every_steps=1000)
  config.decoder.model.update({'channels': 24, 'num_blocks': 1})
  config.decoder.loss.perceptual = ''
  config.decoder.train = base.train(1000, 64, eval_every_steps=1000, save_every_steps=1000)
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
  config.ddgan.discriminator.update({'num_layers': 3, 'channels': 8, 'time_dim': 64})
  for optim in (config.ddgan.optim, config.ddgan.optim_discriminator):
    optim.update({'learning_rate': 5e-4, 'end_learning_rate': 5e-5})
  config.ddgan.optim.update({'ema_decay': 0.995, 'ema_warmup': True})
  config.ddgan.train = base.train(
    2000, 32, eval_every_steps=1000, save_every_steps=1000, grid_every_steps=1000
  )


def _latent(config):
  """8x8x4 latents, whose generator has two levels."""
  gan.latent(config)
  config.ddgan.model.update({'channels': 32, 'channel_multipliers': (1, 2)})
  config.ddgan.discriminator.channels = 16


def get_config(variant: str = ''):
  config = base.default()
  config.name = 'fashion_mnist'
  config.data.update(
    {
      'name': 'fashion_mnist',
      'image_size': 32,
      'channels': 1,
      'resize': 'pad',
    }
  )
  config.vae.model.update(
    presets.vae(
      '32x2,32d2,32t16,16x2,16d2,16t8,8x2,8d2,8t4,4x2,4d4,4t1,1x1',
      '1x1,1u4,1t4,4x2,4u2,4t8,8x2,8u2,8t16,16x2,16u2,16t32,32x3',
      '32:32,16:64,8:64,4:128,1:64',
      64,
    )
  )
  config.vae.train = base.train(30_000, 128)
  config.refiner.model.update(
    {
      'channels': 32,
      'channel_multipliers': (1, 2, 2, 2),
      'attention_resolutions': (8,),
      'num_heads': 4,
    }
  )
  config.refiner.train = base.train(100_000, 128)
  small_gan(config)
  config.evaluate.extractors = ('classifier', 'inception')
  config.evaluate.lpips = ''
  config.classifier.train.num_steps = 4000
  return base.finish(config, variant, {'idx': _idx, 'latent': _latent})
