"""The discrete VAE of DALL-E (arXiv:2102.12092, appendix A): an autoencoder with relaxed codes.

Its codes are what a token prior and a diffusion decoder read: `vaediff.spaces.tokenizers`.
"""

from ml_collections import ConfigDict

from configs import parts
from configs.run import Run
from configs.stages import autoencoder

FLOAT32 = autoencoder.FLOAT32
STAGE = 'dvae'


def section() -> ConfigDict:
  """The published one: 97,616,006 parameters of colour images, 8,192 codes, f = 8.

  With the weight of its KL, 6.6 per number of an image of 256 pixels, as that of a token: 6.6 / 192. Its
  rate falls to the end in 1.2 million updates; the paper goes on, at that, to 3 million.
  """
  config = autoencoder.section()
  config.model.update(
    {
      'bottleneck': 'gumbel',
      'network': 'openai',
      'channels': 256,
      'channel_multipliers': (1, 2, 4, 8),
      'latent_channels': 128,
      'codebook_size': 8192,
      'logits_scale': 1.0,
      'pixel_map': 0.1,
    }
  )
  config.loss.update(
    {
      'pixel': 'logit_laplace',
      'perceptual': '',
      'tau_start': 1.0,
      'tau_end': 1 / 16,
      'tau_steps': 150_000,
      'kl_token_weight': 6.6 / 192,
      'kl_warmup_steps': 5000,
      'adversarial_weight': 0.0,
    }
  )
  config.optim = parts.optim(
    1e-4, schedule='cosine', end_learning_rate=1.25e-6, weight_decay=1e-4, ema_decay=0.999
  )
  config.train = parts.train(1_200_000, 512, flip=True)
  return config


def debug(stage: ConfigDict, image_size: int) -> None:
  """For images of 8 or 16 pixels."""
  autoencoder.debug(stage, image_size)
  stage.model.update({'latent_channels': 4, 'codebook_size': 16})
  stage.loss.update({'tau_steps': 3, 'kl_warmup_steps': 2})


def dvae(run: Run) -> None:
  """A discrete VAE alone."""
  run.only(STAGE)


VARIANTS = {'dvae': dvae}
