"""DiffuseVAE on LSUN church_outdoor, 256x256.

    python -m vaediff.main --config=configs/lsun_church256.py

Data: TFDS `lsun/church_outdoor` (images of any size; shorter side cropped square, then resized), or an image
folder. The papers have no DiffuseVAE settings for LSUN: those of CelebA-HQ 256 are used.
Denoising GANs with their papers' settings (4 steps): `ddgan`, `wavelet`, `latent`.

Hardware, hours and figures: not yet measured.
"""

from configs import base, gan_papers, presets


def _folder(config):
  config.data.update({'source': 'image_folder', 'name': 'lsun_church256', 'resize': 'bilinear'})


def get_config(variant: str = ''):
  config = base.default()
  config.name = 'lsun_church256'
  config.data.update(
    {
      'name': 'lsun/church_outdoor',
      'image_size': 256,
      'eval_split': 'validation',
      'crop': 'center',
      'resize': 'bilinear',
      'materialize': False,
      'num_threads': 16,
    }
  )
  config.vae.model.update(presets.VAE['celebahq256'])
  config.vae.train = base.train(400_000, 64, flip=True)
  config.refiner.model.update({'channel_multipliers': (1, 1, 2, 2, 4, 4), 'attention_resolutions': (16,)})
  config.refiner.optim.learning_rate = 2e-5
  config.refiner.train = base.train(500_000, 64, flip=True)
  config.refiner.sample.batch_size = 16
  return base.finish(
    config,
    variant,
    {
      'folder': _folder,
      'ddgan': gan_papers.lsun_church256_ddgan,
      'wavelet': gan_papers.lsun_church256_wavelet,
      'latent': gan_papers.lsun_church256_latent,
    },
  )
