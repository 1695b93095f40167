"""DiffuseVAE on CelebA-HQ, 128x128: the set-up of VAEDM (arXiv:2201.00308v1).

    python -m vaediff.main --config=configs/celebahq128.py

Data: TFDS `celeb_a_hq/128` (made by hand from the official archives), or an image folder with `:folder` and
`--config.data.path=...`. 21.1 M VAE. The last 1,000 images are held out for evaluation.

Hardware, hours and figures: not yet measured.
"""

from configs import base, parts, presets

DATA = {
  'name': 'celeb_a_hq/128',
  'image_size': 128,
  'train_split': 'train[:29000]',
  'eval_split': 'train[29000:]',
  'materialize': False,
  'num_threads': 16,
}


def _vae(stage):
  stage.model.update(presets.VAE['celebamaskhq128'])
  stage.train = parts.train(234_000, 64, flip=True)


def _refiner(stage):
  stage.model.update({'channel_multipliers': (1, 2, 2, 3, 4), 'attention_resolutions': (8,)})
  stage.optim.learning_rate = 2e-5
  stage.train = parts.train(468_000, 64, flip=True)
  stage.sample.variance = 'small'


def _folder(run):
  run.config.data.update({'source': 'image_folder', 'name': 'celebahq128', 'resize': 'bilinear'})


SIZES = {'vae': _vae, 'refiner': _refiner}
OWN = {'folder': _folder}


def get_config(variant: str = ''):
  return base.make('celebahq128', DATA, SIZES, variant, own=OWN)
