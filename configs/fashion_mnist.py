"""DiffuseVAE on Fashion-MNIST, 28x28 padded to 32x32, grey.

    python -m vaediff.main --config=configs/fashion_mnist.py

Data: TFDS `fashion_mnist`, or the four idx files of a folder (Debian's package dataset-fashion-mnist
installs them) with `:idx` and, for another folder, `--config.data.path=...`.
Networks: a quarter of the width of the CIFAR-10 ones, so that a CPU can train them overnight.

`latent`, a GAN of 4 steps, 21 minutes on one core: docs/results.md. The rest: not yet measured.
"""

from configs import base, gan, presets


def _idx(config):
  config.data.source = 'idx'
  config.data.path = '/usr/share/datasets/fashion-mnist'


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
  config.distill.from_steps = 64
  config.distill.optim.learning_rate = 2e-4
  config.distill.train.num_steps = 10_000
  gan.small(config)
  config.autoencoder.loss.update({'perceptual': '', 'adversarial_weight': 0.0})
  config.decoder.loss.perceptual = ''  # LPIPS costs more than all of these networks
  config.evaluate.extractors = ('classifier', 'inception')
  config.evaluate.lpips = ''
  config.classifier.train.num_steps = 1500
  return base.finish(config, variant, {'idx': _idx, 'latent': gan.small_latent, 'free': gan.small_free})
