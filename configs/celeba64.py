"""DiffuseVAE on CelebA, 64x64.

    python -m vaediff.main --config=configs/celeba64.py

Data: TFDS `celeb_a` (178 wide, 218 high), squashed to 64x64 without a crop as in the official code
(arXiv:2201.00308); `:crop140` takes the centre 140 pixels instead. The two are not comparable.
Attention at 4 pixels, as the official code has it in effect.

Hardware, hours and figures: not yet measured.
"""

from configs import base, code_papers, parts, presets

DATA = {'name': 'celeb_a', 'image_size': 64, 'resize': 'squash_bilinear', 'eval_split': 'validation'}


def _vae(stage):
  stage.model.update(presets.VAE['celeba64'])
  stage.train = parts.train(475_000, 128)


def _refiner(stage):
  stage.model.update({'channel_multipliers': (1, 2, 2, 2, 4), 'attention_resolutions': (4,)})
  stage.train = parts.train(546_000, 128, flip=True)


def _crop140(run):
  run.config.data.update({'crop': 'center', 'crop_size': 140, 'resize': 'bilinear'})


SIZES = {'vae': _vae, 'refiner': _refiner, 'vqgan': code_papers.vqgan_f4}


def get_config(variant: str = ''):
  return base.make('celeba64', DATA, SIZES, variant, own={'crop140': _crop140})
