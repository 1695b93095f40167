"""DiffuseVAE on CIFAR-10, 32x32.

    python -m vaediff.main --config=configs/cifar10.py

Data: TFDS `cifar10`. Settings of the official code (arXiv:2201.00308): 9.24 M VAE, U-Net of width 128 with
attention at 16 pixels, dropout 0.3, flips for the refiner only. Steps: 1,000 and 2,850 epochs of batch 128.
Variants: `large` (width 160, 3 blocks), `ddim_unet` (the U-Net of the DDIM code, global batch 256),
`published` (attention in the middle alone, one head where unconditional, as in the published files).
Denoising GANs with their papers' settings: `ddgan`, `wavelet`, `latent` (4 steps).

Hardware, hours and figures: not yet measured.
"""

from configs import base, code_papers, gan_papers, parts, presets

DATA = {'name': 'cifar10', 'image_size': 32, 'num_classes': 10}


def _vae(stage):
  stage.model.update(presets.VAE['cifar10'])
  stage.train = parts.train(390_000, 128)


def _refiner(stage):
  stage.model.dropout = 0.3
  stage.train = parts.train(1_111_000, 128, flip=True)


def _large(run):
  run.edit('refiner', lambda stage: stage.model.update({'channels': 160, 'num_res_blocks': 3}))


def _ddim(stage):
  stage.model.variant = 'ddim'
  stage.train.batch_size = 256


def _ddim_unet(run):
  run.edit('refiner', _ddim)


def _as_published(run):
  refiner = run.section('refiner')
  if refiner.model.variant == 'openai':
    refiner.model.attention_resolutions = ()
    refiner.model.num_heads = 1 if refiner.diffusion.condition == 'none' else 8


def _published(run):
  run.at_end(_as_published)


SIZES = {'vae': _vae, 'refiner': _refiner, 'vqgan': code_papers.vqgan_f4}
OWN = {
  'large': _large,
  'ddim_unet': _ddim_unet,
  'published': _published,
  'latent': gan_papers.cifar10_latent,
  'wavelet': gan_papers.cifar10_wavelet,
}


def get_config(variant: str = ''):
  return base.make('cifar10', DATA, SIZES, variant, own=OWN)
