"""DiffuseVAE on CelebA-HQ, 256x256.

    python -m vaediff.main --config=configs/celeba256.py

Data: TFDS `celeb_a_hq/256` (made by hand from the official archives), or an image folder with `:folder` and
`--config.data.path=...`. Settings of the official code (arXiv:2201.00308): 32.6 M VAE, 113.7 M U-Net,
attention at 16 pixels. The last 1,000 images are held out for evaluation.
Figures are those of temperature 1. `pictures` draws as the paper's pictures were drawn, with 0.8:

    python -m vaediff.main --config=configs/celeba256.py:pictures --workdir=runs/celeba256 --mode=sample

Denoising GANs with their papers' settings (2 steps): `ddgan`, `wavelet`, `latent` (64x64x3, 8,192 codes).
`latent_diffusion` has the size of latent diffusion's network for these images (arXiv:2112.10752), in the same
latents: 274,056,163 parameters, joined with `unconditional`; what it is conditioned on comes on top.
Codes: `vqvae` (32x32 of 1,024), `vqvae2` (64x64 and 32x32 of 512), `dvae` (DALL-E's, 32x32 of 8,192),
`vqgan`, and published settings of it: `vqgan_f16_1024`, `vqgan_f16_16384`, `vqgan_f8_gumbel`, `ldm_vq_f4`,
`ldm_vq_f8`, `ldm_vq_f16`, `llamagen_vq16`, `llamagen_vq8`. `divae` is DiVAE (arXiv:2206.00386) of codes that
are 8 or 16 times smaller than the image: 296,029,190 or 350,341,638 parameters before what the codes add,
10,000 updates of 256 images. `prior` is as large as taming-transformers' for faces: 24 blocks of width 1024.

    python -m vaediff.main --config=configs/celeba256.py:divae                         # of vqvae, f = 8
    python -m vaediff.main --config=configs/celeba256.py:vqgan_f16_1024,divae,prior    # f = 16

Hardware, hours and figures: not yet measured.
"""

from configs import base, code_papers, gan_papers, parts, presets
from configs.stages import diffusion, divae

DATA = {
  'name': 'celeb_a_hq/256',
  'image_size': 256,
  'train_split': 'train[:29000]',
  'eval_split': 'train[29000:]',
  'materialize': False,
  'num_threads': 16,
}


def _vae(stage):
  stage.model.update(presets.VAE['celebahq256'])
  stage.train = parts.train(234_000, 64, flip=True)


def _refiner(stage):
  stage.model.update({'channel_multipliers': (1, 1, 2, 2, 4, 4), 'attention_resolutions': (16,)})
  stage.optim.learning_rate = 2e-5
  stage.train = parts.train(369_000, 64, flip=True)
  stage.sample.update({'variance': 'small', 'batch_size': 16})


def _vqvae2(stage):
  """The published network: grids of 64x64 and 32x32, 512 codes each, 560 epochs."""
  stage.train = parts.train(127_000, 128, flip=True)
  stage.sample.batch_size = 16


def _pictures(run):
  """The temperature of the paper's pictures; its figures are those of temperature 1."""
  run.edit('refiner', lambda stage: stage.sample.update({'temperature': 0.8}))


def _latent_diffusion(run):
  run.edit('autoencoder', gan_papers.vq_f4)
  diffusion.published_latent_diffusion(run, presets.UNET['ldm_celeba256'])


def _folder(run):
  run.config.data.update({'source': 'image_folder', 'name': 'celeba256', 'resize': 'bilinear'})


def _vqvae(stage):
  # 32x32 codes
  stage.model.update({'channel_multipliers': (1, 2, 2, 4), 'codebook_size': 1024})
  stage.train.update({'batch_size': 32})


def _prior(stage):
  # of 32x32 codes: as large as taming's for faces, 24 blocks of width 1024
  stage.model.update({**presets.PRIOR['taming_1024x24'], 'dropout': 0.0})
  stage.optim = parts.optim(4.5e-6 * 64, b2=0.95, weight_decay=0.01, clip_norm=1.0)
  stage.train = parts.train(300_000, 64, flip=True)


def _published_decoder(stage):
  # 256 images at a time for 10,000 updates; average, weight decay and clipping are not in the paper
  stage.diffusion.update({'prediction': 'eps', 'loss_weight': 'snr'})
  stage.optim = parts.optim(1e-4, warmup_steps=1000, ema_decay=0.9999)
  stage.train = parts.train(10_000, 256, flip=True)
  stage.sample.update({'num_steps': 1000, 'batch_size': 16})


def _published(variant):
  def of_published_size(run):
    variant(run, {16: presets.UNET['divae_f16'], 8: presets.UNET['divae_f8']})
    _published_decoder(run.section('refiner'))

  return of_published_size


SIZES = {'vae': _vae, 'refiner': _refiner, 'vqvae': _vqvae, 'vqvae2': _vqvae2, 'prior': _prior}
OWN = {
  **code_papers.VARIANTS,
  **{name: _published(variant) for name, variant in divae.VARIANTS.items()},
  'folder': _folder,
  'pictures': _pictures,
  'ddgan': gan_papers.celeba256_ddgan,
  'wavelet': gan_papers.celeba256_wavelet,
  'latent': gan_papers.celeba256_latent,
  'latent_diffusion': _latent_diffusion,
}


def get_config(variant: str = ''):
  return base.make('celeba256', DATA, SIZES, variant, own=OWN)
