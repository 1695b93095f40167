"""DiffuseVAE on Fashion-MNIST, 28x28 padded to 32x32, grey.

    python -m vaediff.main --config=configs/fashion_mnist.py

Data: TFDS `fashion_mnist`, or the four idx files of a folder (Debian's package dataset-fashion-mnist
installs them) with `:idx` and, for another folder, `--config.data.path=...`.
Networks: a quarter of the width of the CIFAR-10 ones.

On one core: GANs of 4 steps (`latent`, `wavelet`, `ddgan`) in 5 minutes each; VAE, U-Net and six halvings
(`small,distill`) in an hour: docs/results_fashion_mnist.md. The full sizes: not yet measured.

Codes, 8x8 of 256 (`vqvae2`: 8x8 and 4x4 of 64):

    python -m vaediff.main --config=configs/fashion_mnist.py:idx,vqvae            # or vqgan, dvae
    python -m vaediff.main --config=configs/fashion_mnist.py:idx,small,vqvae2     # 145 seconds: docs/codes.md
    python -m vaediff.main --config=configs/fashion_mnist.py:idx,divae,prior,label

`small,vqgan`, diffusion decoders and their students, `vqvae` and `prior` of 64 codes: docs/codes.md. `dvae`:
not yet measured.
"""

from configs import base, gan_small, parts, presets
from configs.stages import control, prior

DATA = {'name': 'fashion_mnist', 'image_size': 32, 'channels': 1, 'num_classes': 10, 'resize': 'pad'}


def _vae(stage):
  stage.model.update(
    presets.vae(
      '32x2,32d2,32t16,16x2,16d2,16t8,8x2,8d2,8t4,4x2,4d4,4t1,1x1',
      '1x1,1u4,1t4,4x2,4u2,4t8,8x2,8u2,8t16,16x2,16u2,16t32,32x3',
      '32:32,16:64,8:64,4:128,1:64',
      64,
    )
  )
  stage.train = parts.train(30_000, 128)


def _refiner(stage):
  stage.model.update(
    {
      'channels': 32,
      'channel_multipliers': (1, 2, 2, 2),
      'attention_resolutions': (8,),
      'num_heads': 4,
    }
  )
  stage.train = parts.train(100_000, 128)


def _distill(stage):
  stage.from_steps = 64
  stage.optim.learning_rate = 2e-4
  stage.train.num_steps = 10_000


def _autoencoder(stage):
  gan_small.autoencoder(stage)
  stage.loss.update({'perceptual': '', 'adversarial_weight': 0.0})


def _decoder(stage):
  gan_small.decoder(stage)
  stage.loss.perceptual = ''  # LPIPS costs more than all of these networks


def _vqvae2(stage):
  """Grids of 8x8 and 4x4, 64 codes each."""
  stage.model.update({'channels': 64, 'latent_channels': 16, 'codebook_size': 64})
  stage.optim.update({'learning_rate': 1e-3, 'schedule': 'cosine'})
  stage.train = parts.train(30_000, 128)


def _noisy_classifier(stage):
  stage.model.update(
    {'channels': 32, 'channel_multipliers': (1, 2, 2, 2), 'num_res_blocks': 1, 'attention_resolutions': ()}
  )
  stage.train = parts.train(20_000, 128, grid_every_steps=0)


def _vqvae(stage):
  # 8x8 codes; k-means of raw 4x4 patches with as many has a squared error of 0.0065
  gan_small.autoencoder(stage)
  stage.model.update(
    {
      'channels': 32,
      'channel_multipliers': (1, 2, 2),
      'attention_resolutions': (),  # the middle has it
      'latent_channels': 8,
      'codebook_size': 256,
    }
  )
  stage.train.num_steps = 2000


def _prior(stage):
  prior.small(stage)
  stage.model.update({'width': 128, 'num_layers': 4})
  stage.optim.learning_rate = 1e-3
  stage.train.num_steps = 4000


def _vqgan(stage):
  _vqvae(stage)
  stage.discriminator.update({'channels': 32, 'num_layers': 2})
  stage.loss.update({**gan_small.VQGAN, 'adversarial_start_step': 1000, 'discriminator_start_step': 800})


def _dvae(stage):
  # 8x8 codes
  gan_small.dvae(stage)
  stage.model.update({'channel_multipliers': (1, 2, 2), 'codebook_size': 256})
  stage.loss.tau_steps = 1500
  stage.train.num_steps = 2000


SIZES = {
  **gan_small.SIZES,
  'vae': _vae,
  'refiner': _refiner,
  'distill': _distill,
  'autoencoder': _autoencoder,
  'decoder': _decoder,
  'vqvae2': _vqvae2,
  'noisy_classifier': _noisy_classifier,
  'vqvae': _vqvae,
  'prior': _prior,
  'vqgan': _vqgan,
  'dvae': _dvae,
  **dict.fromkeys(control.STAGES, control.small),
  'evaluate': lambda section: section.update({'extractors': ('classifier', 'inception'), 'lpips': ''}),
  'classifier': lambda section: section.train.update({'num_steps': 1500}),
}

# `small` -------------------------------------------------------------------------------------------------

AVERAGED = {'ema_decay': 0.99, 'ema_warmup': True}


def _small_vae(stage):
  stage.model.update(
    presets.vae(
      '32x1,32d2,32t16,16x1,16d2,16t8,8x1,8d2,8t4,4x1,4d4,4t1,1x1',
      '1x1,1u4,1t4,4x1,4u2,4t8,8x1,8u2,8t16,16x1,16u2,16t32,32x1',
      '32:16,16:32,8:64,4:128,1:32',
      32,
    )
  )
  stage.model.stem = 'dense'
  stage.loss.reduction = 'mean'
  stage.optim.update({'learning_rate': 2e-3, 'schedule': 'cosine', 'ema_decay': 0.99})
  stage.prior.update({'kind': 'gmm', 'covariance': 'diag', 'num_components': (20, 40), 'num_encoded': 10_000})
  stage.train.update({'num_steps': 1200, 'batch_size': 64})


def _small_refiner(stage):
  stage.model.update(
    {
      'channels': 16,
      'channel_multipliers': (1, 2, 4),
      'num_res_blocks': 1,
      'dropout': 0.0,
    }
  )
  stage.diffusion.update({'prediction': 'v', 'loss_weight': 'v'})
  stage.optim.update(
    {
      'learning_rate': 1e-3,
      'schedule': 'cosine',
      'warmup_steps': 100,
      'ema_decay': 0.995,
      'ema_warmup': True,
    }
  )
  stage.train.update({'num_steps': 2500, 'batch_size': 32})


def _small_distill(stage):
  stage.from_steps = 64  # of DDIM; in 512 this teacher's samples are no nearer to the data
  stage.last_train_steps = 300
  stage.optim.learning_rate = 1e-4
  stage.train.update({'num_steps': 150, 'batch_size': 32})


# the other ways to few steps: 12 to 18 minutes of one core each


def _small_consistency(stage):
  stage.loss.update({'q': 2.0, 'double_every_steps': 200, 'level_mean': 0.0})
  stage.optim.update({'learning_rate': 3e-4, **AVERAGED})
  stage.train.update({'num_steps': 1000, 'batch_size': 32})


def _small_adversarial(stage):
  stage.discriminator.channels = 64
  stage.optim.update({'learning_rate': 3e-4, **AVERAGED})
  stage.optim_discriminator.learning_rate = 6e-4
  stage.train.update({'num_steps': 400, 'batch_size': 32})


def _small_matching(stage):
  stage.discriminator.channels = 64
  stage.optim.update({'learning_rate': 1e-4, **AVERAGED})
  stage.optim_fake.learning_rate = 3e-4
  stage.train.update({'num_steps': 750, 'batch_size': 32})


def _small_vqvae2(stage):
  stage.model.update({'channels': 32, 'num_res_blocks': 1, 'res_channels': 16, 'latent_channels': 8})
  stage.optim.learning_rate = 2e-3
  stage.train.update({'num_steps': 4000, 'batch_size': 64})


def _small_noisy_classifier(stage):
  stage.model.update({'channels': 16, 'channel_multipliers': (1, 2, 4)})
  stage.optim.update({'learning_rate': 1e-3, **AVERAGED})
  stage.train.update({'num_steps': 1500, 'batch_size': 32})


SMALL = {
  'noisy_classifier': _small_noisy_classifier,
  'vae': _small_vae,
  'refiner': _small_refiner,
  'distill': _small_distill,
  'consistency': _small_consistency,
  'adversarial': _small_adversarial,
  'matching': _small_matching,
  'vqvae2': _small_vqvae2,
}


def _often(stage):
  stage.train.update(
    {'save_every_steps': 400, 'eval_every_steps': 400, 'grid_every_steps': 0, 'eval_images': 512}
  )


def _small(run):
  """VAE and U-Net for an hour of one core, students from 64 steps to 1 included (with `distill`)."""
  run.edit_all(SMALL)
  run.edit_all(dict.fromkeys(SMALL, _often))
  run.config.evaluate.update({'extractors': ('classifier',), 'num_images': 1000})


def _idx(run):
  run.config.data.update({'source': 'idx', 'path': '/usr/share/datasets/fashion-mnist'})


OWN = {
  'idx': _idx,
  'small': _small,
  'wavelet': gan_small.wavelet,
  'latent': gan_small.latent,
  'free': gan_small.free,
}


def get_config(variant: str = ''):
  return base.make('fashion_mnist', DATA, SIZES, variant, own=OWN)
