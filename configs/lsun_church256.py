"""DiffuseVAE on LSUN church_outdoor, 256x256.

    python -m vaediff.main --config=configs/lsun_church256.py

Data: TFDS `lsun/church_outdoor` (images of any size; shorter side cropped square, then resized), or an image
folder with `:folder` and `--config.data.path=...`, of which 5 % are held out for evaluation, in a fixed
shuffled order. The papers have no DiffuseVAE settings for LSUN: those of CelebA-HQ 256 are used.
Denoising GANs with their papers' settings (4 steps): `ddgan`, `wavelet`, `latent`.
`latent_diffusion` has the size of latent diffusion's network for these images (arXiv:2112.10752), in latents
of 32x32x4: 294,966,916 parameters, joined with `unconditional`; what it is conditioned on comes on top. Its
betas are those of the paper's other data sets, to 0.0195; for these images it had 0.0155.

Hardware, hours and figures: not yet measured.
"""

from configs import base, code_papers, gan_papers, parts, presets
from configs.stages import diffusion

DATA = {
  'name': 'lsun/church_outdoor',
  'image_size': 256,
  'eval_split': 'validation',
  'crop': 'center',
  'resize': 'bilinear',
  'materialize': False,
  'num_threads': 16,
}


def _vae(stage):
  stage.model.update(presets.VAE['celebahq256'])
  stage.train = parts.train(400_000, 64, flip=True)


def _refiner(stage):
  stage.model.update({'channel_multipliers': (1, 1, 2, 2, 4, 4), 'attention_resolutions': (16,)})
  stage.optim.learning_rate = 2e-5
  stage.train = parts.train(500_000, 64, flip=True)
  stage.sample.batch_size = 16


def _latent_diffusion(run):
  run.edit('autoencoder', gan_papers.kl_f8)
  diffusion.published_latent_diffusion(run, presets.UNET['ldm_lsun_church256'])


def _folder(run):
  run.config.data.update({'source': 'image_folder', 'name': 'lsun_church256', 'resize': 'bilinear'})
  run.config.data.update({'train_split': 'train[:95%]', 'eval_split': 'train[95%:]'})


SIZES = {'vae': _vae, 'refiner': _refiner}
OWN = {
  **code_papers.VARIANTS,
  'folder': _folder,
  'ddgan': gan_papers.lsun_church256_ddgan,
  'wavelet': gan_papers.lsun_church256_wavelet,
  'latent': gan_papers.lsun_church256_latent,
  'latent_diffusion': _latent_diffusion,
}


def get_config(variant: str = ''):
  return base.make('lsun_church256', DATA, SIZES, variant, own=OWN)
