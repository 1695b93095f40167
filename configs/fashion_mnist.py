"""DiffuseVAE on Fashion-MNIST, 28x28 padded to 32x32, grey.

    python -m vaediff.main --config=configs/fashion_mnist.py

Data: TFDS `fashion_mnist`, or the four idx files of a folder (Debian's package dataset-fashion-mnist
installs them) with `:idx` and, for another folder, `--config.data.path=...`.
Networks: a quarter of the width of the CIFAR-10 ones.

On one core: GANs of 4 steps (`latent`, `wavelet`, `ddgan`) in 5 minutes each; VAE, U-Net and six halvings
(`small,distill`) in an hour: docs/results.md. The full sizes: not yet measured.
"""

from configs import base, gan, presets


def _idx(config):
  config.data.source = 'idx'
  config.data.path = '/usr/share/datasets/fashion-mnist'


def _small(config):
  """VAE and U-Net for an hour of one core, students from 64 steps to 1 included (with `distill`)."""
  config.vae.model.update(
    presets.vae(
      '32x1,32d2,32t16,16x1,16d2,16t8,8x1,8d2,8t4,4x1,4d4,4t1,1x1',
      '1x1,1u4,1t4,4x1,4u2,4t8,8x1,8u2,8t16,16x1,16u2,16t32,32x1',
      '32:16,16:32,8:64,4:128,1:32',
      32,
    )
  )
  config.vae.model.stem = 'dense'
  config.vae.loss.reduction = 'mean'
  config.vae.optim.update({'learning_rate': 2e-3, 'schedule': 'cosine', 'ema_decay': 0.99})
  config.vae.prior.update({'kind': 'gmm', 'covariance': 'diag', 'num_components': (20, 40)})
  config.vae.prior.num_encoded = 10_000
  config.vae.train.update({'num_steps': 1200, 'batch_size': 64})
  config.refiner.model.update(
    {
      'channels': 16,
      'channel_multipliers': (1, 2, 4),
      'num_res_blocks': 1,
      'dropout': 0.0,
    }
  )
  config.refiner.diffusion.update({'prediction': 'v', 'loss_weight': 'v'})
  config.refiner.optim.update(
    {
      'learning_rate': 1e-3,
      'schedule': 'cosine',
      'warmup_steps': 100,
      'ema_decay': 0.995,
      'ema_warmup': True,
    }
  )
  config.refiner.train.update({'num_steps': 2500, 'batch_size': 32})
  config.distill.from_steps = 64  # of DDIM; in 512 this teacher's samples are no nearer to the data
  config.distill.last_train_steps = 300
  config.distill.optim.learning_rate = 1e-4
  config.distill.train.update({'num_steps': 150, 'batch_size': 32})
  # the other ways to few steps: 12 to 18 minutes of one core each
  averaged = {'ema_decay': 0.99, 'ema_warmup': True}
  config.consistency.loss.update({'q': 2.0, 'double_every_steps': 200, 'level_mean': 0.0})
  config.consistency.optim.update({'learning_rate': 3e-4, **averaged})
  config.consistency.train.update({'num_steps': 1000, 'batch_size': 32})
  config.adversarial.discriminator.channels = 64
  config.adversarial.optim.update({'learning_rate': 3e-4, **averaged})
  config.adversarial.optim_discriminator.learning_rate = 6e-4
  config.adversarial.train.update({'num_steps': 400, 'batch_size': 32})
  config.matching.discriminator.channels = 64
  config.matching.optim.update({'learning_rate': 1e-4, **averaged})
  config.matching.optim_fake.learning_rate = 3e-4
  config.matching.train.update({'num_steps': 750, 'batch_size': 32})
  students = (config.distill, config.consistency, config.adversarial, config.matching)
  for stage in (config.vae, config.refiner, *students):
    stage.train.update(
      {'save_every_steps': 400, 'eval_every_steps': 400, 'grid_every_steps': 0, 'eval_images': 512}
    )
  config.evaluate.update({'extractors': ('classifier',), 'num_images': 1000})


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
  own = {
    'idx': _idx,
    'small': _small,
    'wavelet': gan.small_wavelet,
    'latent': gan.small_latent,
    'free': gan.small_free,
  }
  return base.finish(config, variant, own)
