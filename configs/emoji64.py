"""DiffuseVAE on the Noto emoji, 64x64 RGB.

    python -m vaediff.main --config=configs/emoji64.py

Data: the npm package emoji-datasource-google, unpacked in a folder that `--config.data.path=...` names
(`npm pack emoji-datasource-google`, then `tar xf`); 3,786 images, split by base emoji. A small set: expect
memorisation, and look at the nearest training images.

Hardware, hours and figures: not yet measured.
"""

from configs import base, gan, presets


def get_config(variant: str = ''):
  config = base.default()
  config.name = 'emoji64'
  config.data.update({'name': 'noto_emoji', 'image_size': 64, 'channels': 3})
  config.vae.model.update(presets.VAE['celeba64'])
  config.vae.train = base.train(60_000, 64)
  config.refiner.model.update(
    {
      'channels': 64,
      'channel_multipliers': (1, 2, 2, 4),
      'attention_resolutions': (16, 8),
      'num_heads': 4,
    }
  )
  config.refiner.train = base.train(200_000, 64)
  gan.small(config)
  config.ddgan.train.num_steps = 50_000
  return base.finish(config, variant, {'latent': gan.small_latent, 'free': gan.small_free})
