"""The VQ-VAE (arXiv:1711.00937): an autoencoder with a codebook, trained by its squared error alone.

Its codes are what a token prior and a diffusion decoder read: `vaediff.spaces.tokenizers`.
"""

from ml_collections import ConfigDict

from configs import parts
from configs.run import Run
from configs.stages import autoencoder

FLOAT32 = autoencoder.FLOAT32
STAGE = 'vqvae'

debug = autoencoder.debug


def section() -> ConfigDict:
  """With 512 codes and f = 4: 8x8 codes of 32 pixels; rates and updates of the paper's first experiments."""
  config = autoencoder.section()
  config.model.update({'latent_channels': 64, 'bottleneck': 'vq', 'codebook_size': 512})
  config.loss.update({'pixel': 'l2', 'perceptual': '', 'adversarial_weight': 0.0})
  config.optim = parts.optim(2e-4)
  config.train = parts.train(250_000, 128, flip=True)
  return config


def vqvae(run: Run) -> None:
  """A VQ-VAE alone."""
  run.only(STAGE)


VARIANTS = {'vqvae': vqvae}
