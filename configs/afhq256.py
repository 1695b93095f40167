"""DiffuseVAE on AFHQ dogs, 256x256.

    python -m vaediff.main --config=configs/afhq256.py

Data: an image folder, `--config.data.path=.../afhq/train/dog`. Settings of the official code
(arXiv:2201.00308). The last twentieth of the images is held out for evaluation. `.../afhq/train` has three
classes, cat, dog and wild; the dogs alone have one label.

Hardware, hours and figures: not yet measured.
"""

from configs import base, code_papers, parts, presets

DATA = {
  'source': 'image_folder',
  'name': 'afhq_dog',
  'image_size': 256,
  'num_classes': 3,
  'train_split': 'train[:95%]',
  'eval_split': 'train[95%:]',
  'resize': 'bilinear',
}


def _vae(stage):
  stage.model.update(presets.VAE['afhq256'])
  stage.train = parts.train(74_000, 32, flip=True)


def _refiner(stage):
  stage.model.update({'channel_multipliers': (1, 1, 2, 2, 4, 4), 'attention_resolutions': (16,)})
  stage.optim.learning_rate = 2e-5
  stage.train = parts.train(200_000, 64, flip=True)
  stage.sample.update({'variance': 'small', 'batch_size': 16})


SIZES = {'vae': _vae, 'refiner': _refiner}


def get_config(variant: str = ''):
  return base.make('afhq256', DATA, SIZES, variant, own=code_papers.VARIANTS)
