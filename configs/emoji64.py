"""DiffuseVAE on the Noto emoji, 64x64 RGB.

    python -m vaediff.main --config=configs/emoji64.py

Data: the npm package emoji-datasource-google, unpacked in a folder that `--config.data.path=...` names
(`npm pack emoji-datasource-google`, then `tar xf`); 3,786 images, split by base emoji. A small set: expect
memorisation, and look at the nearest training images.

Hardware, hours and figures: not yet measured.
"""

from configs import base, gan_small, parts, presets
from configs.stages import prior

DATA = {'name': 'noto_emoji', 'image_size': 64, 'channels': 3, 'num_classes': 10}


def _vae(stage):
  stage.model.update(presets.VAE['celeba64'])
  stage.train = parts.train(60_000, 64)


def _refiner(stage):
  stage.model.update(
    {
      'channels': 64,
      'channel_multipliers': (1, 2, 2, 4),
      'attention_resolutions': (16, 8),
      'num_heads': 4,
    }
  )
  stage.train = parts.train(200_000, 64)


def _ddgan(stage):
  gan_small.ddgan(stage)
  stage.train.num_steps = 50_000


def _vqvae(stage):
  # 8x8 codes
  gan_small.autoencoder(stage)
  stage.model.update(
    {
      'channels': 32,
      'channel_multipliers': (1, 2, 2, 4),
      'attention_resolutions': (),  # the middle has it
      'latent_channels': 16,
      'codebook_size': 256,
    }
  )
  stage.train.num_steps = 5000


def _prior(stage):
  prior.small(stage)
  stage.model.update({'width': 256, 'num_layers': 6, 'num_heads': 8, 'dropout': 0.2})
  stage.optim.learning_rate = 1e-3
  stage.train.num_steps = 10_000


def _vqgan(stage):
  _vqvae(stage)
  stage.discriminator.update({'channels': 32, 'num_layers': 3})
  stage.loss.update({**gan_small.VQGAN, 'adversarial_start_step': 2500, 'discriminator_start_step': 2000})


SIZES = {
  **gan_small.SIZES,
  'vae': _vae,
  'refiner': _refiner,
  'ddgan': _ddgan,
  'vqvae': _vqvae,
  'prior': _prior,
  'vqgan': _vqgan,
}


def get_config(variant: str = ''):
  own = {'latent': gan_small.latent, 'free': gan_small.free}
  return base.make('emoji64', DATA, SIZES, variant, own=own)
