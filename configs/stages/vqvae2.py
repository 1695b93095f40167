"""VQ-VAE-2: an autoencoder with codes on several grids, coarse to fine (arXiv:1906.00446)."""

from ml_collections import ConfigDict

from configs import parts
from configs.run import Run


def section() -> ConfigDict:
  """Two levels, as published for 256 pixels: grids of 64x64 and 32x32, 512 codes each."""
  config = ConfigDict()
  config.experiment = 'hierarchy'
  config.model = ConfigDict(
    {
      'num_levels': 2,  # 1 .. 4; the bottom's sides are a quarter of the image's, each above has half of them
      'channels': 128,
      'num_res_blocks': 2,  # of each encoder and decoder
      'res_channels': 32,  # inside of them
      'latent_channels': 64,  # size of a code
      'codebook_size': 512,  # codes of each level
      'dtype': 'float32',
    }
  )
  config.loss = ConfigDict(
    {
      'commitment_weight': 0.25,  # of |z - sg(e)|^2, at each level
      'codebook_decay': 0.99,  # of the averages that codes follow
      'restart_below': 1.0,  # a code with a smaller average count starts anew at a vector of the batch
    }
  )
  config.optim = parts.optim(3e-4)
  config.train = parts.train(250_000, 128, flip=True)
  # fill: in reconstructions by level, what a level is that is left out: 'mean' (its mean code) | 'zeros'
  config.sample = parts.sample(with_vae=False, fill='mean')
  return config


def debug(stage: ConfigDict, image_size: int) -> None:
  """For images of 8 or 16 pixels: with as many levels as they have."""
  while image_size % (4 * 2 ** (stage.model.num_levels - 1)):
    stage.model.num_levels -= 1
  stage.model.update(
    {'channels': 8, 'num_res_blocks': 1, 'res_channels': 4, 'latent_channels': 4, 'codebook_size': 8}
  )
  stage.loss.restart_below = 0.25  # the top of such images has one vector each


def vqvae2(run: Run) -> None:
  """VQ-VAE-2 alone: codes on several grids, for a token prior."""
  run.only('vqvae2')


VARIANTS = {'vqvae2': vqvae2}
