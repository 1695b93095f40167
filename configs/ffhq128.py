"""DiffuseVAE on FFHQ, 128x128.

    python -m vaediff.main --config=configs/ffhq128.py --config.data.path=.../ffhq128

Data: an image folder. Settings of the official code (arXiv:2201.00308): 21.1 M VAE, attention at 8 pixels.
The last 1,000 of the 70,000 images are held out for evaluation.

Hardware, hours and figures: not yet measured.
"""

from configs import base, parts, presets

DATA = {
  'source': 'image_folder',
  'name': 'ffhq128',
  'image_size': 128,
  'train_split': 'train[:69000]',
  'eval_split': 'train[69000:]',
  'resize': 'bilinear',
  'materialize': False,
  'num_threads': 16,
}


def _vae(stage):
  stage.model.update(presets.VAE['ffhq128'])
  stage.train = parts.train(270_000, 128, flip=True)


def _refiner(stage):
  stage.model.update({'channel_multipliers': (1, 1, 2, 3, 4), 'attention_resolutions': (8,)})
  stage.optim.learning_rate = 2e-5
  stage.train = parts.train(540_000, 128, flip=True)


SIZES = {'vae': _vae, 'refiner': _refiner}


def get_config(variant: str = ''):
  return base.make('ffhq128', DATA, SIZES, variant)
