"""DiffuseVAE on CelebA-HQ, 256x256.

    python -m vaediff.main --config=configs/celeba256.py

Data: TFDS `celeb_a_hq/256` (made by hand from the official archives), or an image folder with `:folder` and
`--config.data.path=...`. Settings of the official code (arXiv:2201.00308): 32.6 M VAE, 113.7 M U-Net,
attention at 16 pixels. The last 1,000 images are held out for evaluation.
Denoising GANs with their papers' settings (2 steps): `ddgan`, `wavelet`, `latent` (64x64x3, 8,192 codes).

Hardware, hours and figures: not yet measured.
"""

from configs import base, gan_papers, presets


def _folder(config):
  config.data.update({'source': 'image_folder', 'name': 'celeba256', 'resize': 'bilinear'})


def get_config(variant: str = ''):
  config = base.default()
  config.name = 'celeba256'
  config.data.update(
    {
      'name': 'celeb_a_hq/256',
      'image_size': 256,
      'train_split': 'train[:29000]',
      'eval_split': 'train[29000:]',
      'materialize': False,
      'num_threads': 16,
    }
  )
  config.vae.model.update(presets.VAE['celebahq256'])
  config.vae.train = base.train(234_000, 64, flip=True)
  config.refiner.model.update({'channel_multipliers': (1, 1, 2, 2, 4, 4), 'attention_resolutions': (16,)})
  config.refiner.optim.learning_rate = 2e-5
  config.refiner.train = base.train(369_000, 64, flip=True)
  config.refiner.sample.update({'variance': 'small', 'temperature': 0.8, 'batch_size': 16})
  return base.finish(
    config,
    variant,
    {
      'folder': _folder,
      'ddgan': gan_papers.celeba256_ddgan,
      'wavelet': gan_papers.celeba256_wavelet,
      'latent': gan_papers.celeba256_latent,
    },
  )
