"""DiffuseVAE on CelebA-HQ, 128x128: the set-up of VAEDM (arXiv:2201.00308v1).

    python -m vaediff.main --config=configs/celebahq128.py

Data: TFDS `celeb_a_hq/128` (made by hand from the official archives), or an image folder with `:folder` and
`--config.data.path=...`. 21.1 M VAE. The last 1,000 images are held out for evaluation.

Hardware, hours and figures: not yet measured.
"""

from configs import base, presets


def _folder(config):
  config.data.update({'source': 'image_folder', 'name': 'celebahq128', 'resize': 'bilinear'})


def get_config(variant: str = ''):
  config = base.default()
  config.name = 'celebahq128'
  config.data.update(
    {
      'name': 'celeb_a_hq/128',
      'image_size': 128,
      'train_split': 'train[:29000]',
      'eval_split': 'train[29000:]',
      'materialize': False,
      'num_threads': 16,
    }
  )
  config.vae.model.update(presets.VAE['celebamaskhq128'])
  config.vae.train = base.train(234_000, 64, flip=True)
  config.refiner.model.update({'channel_multipliers': (1, 2, 2, 3, 4), 'attention_resolutions': (8,)})
  config.refiner.optim.learning_rate = 2e-5
  config.refiner.train = base.train(468_000, 64, flip=True)
  config.refiner.sample.variance = 'small'
  return base.finish(config, variant, {'folder': _folder})
