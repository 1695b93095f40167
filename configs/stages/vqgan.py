"""The VQGAN (arXiv:2012.09841): an autoencoder with a codebook, trained against a discriminator of patches.

Its codes are read as those of the stage `vqvae` are.
"""

from ml_collections import ConfigDict

from configs import parts
from configs.run import Run
from configs.stages import autoencoder

FLOAT32 = autoencoder.FLOAT32
STAGE = 'vqgan'
RATE = 4.5e-6
"""Of the published runs, per image of a batch over all devices."""


def section() -> ConfigDict:
  """The published f = 16 with 1,024 codes; codes start anew where they die, which those did not."""
  config = autoencoder.section()
  config.model.update(
    {
      'latent_channels': 256,
      'channel_multipliers': (1, 1, 2, 2, 4),
      'attention_resolutions': (16,),
      'bottleneck': 'vq',
      'codebook_size': 1024,
    }
  )
  config.loss.update(
    {
      'codebook': 'gradient',
      'adversarial_weight': 0.8,
      'adversarial_start_step': 250_001,
      'discriminator_start_step': 250_001,
    }
  )
  config.optim = parts.optim(32 * RATE, b1=0.5, b2=0.9)
  config.optim_discriminator = parts.optim(32 * RATE, b1=0.5, b2=0.9)
  config.train = parts.train(500_000, 32, flip=True)
  return config


def debug(stage: ConfigDict, image_size: int) -> None:
  """The discriminator learns in the first update, and weighs from the second on."""
  autoencoder.debug(stage, image_size)
  stage.loss.discriminator_start_step = 0


def vqgan(run: Run) -> None:
  """A VQGAN alone."""
  run.only(STAGE)


VARIANTS = {'vqgan': vqgan}
