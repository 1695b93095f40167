"""DiffuseVAE on scikit-learn's 1,797 real 8x8 digits: the quickstart, no download.

    python -m vaediff.main --config=configs/digits.py

On 2 cores of a 2.5 GHz Xeon: 270 seconds. `fd_classifier` of 800 samples, mean and standard deviation over 3
seeds: VAE 23.4 +- 0.4, refined 7.11 +- 0.04; real images get 5.5. Mean squared error per pixel (pixels in [0,
1]) over the evaluation digits: 0.0173 for the VAE's reconstructions, 0.0354 for the refined ones.

Codes, 4x4 of 64 (`vqvae2`: 2x2 and 1): a tokenizer, a diffusion decoder with students, a prior of classes:

    python -m vaediff.main --config=configs/digits.py:vqvae                # or vqvae2, vqgan, dvae
    python -m vaediff.main --config=configs/digits.py:divae,distill
    python -m vaediff.main --config=configs/digits.py:divae,prior,label
    python -m vaediff.main --config=configs/digits.py:vqvae,prior,text     # 'the digit three'

On one core of an AMD EPYC, mean squared error over the evaluation digits: `vqvae` 0.00267 in 87 seconds,
`dvae` 0.00427 in 69, `vqvae2` 0.0181 in 29; these, `vqgan`, `divae` and `prior`: docs/codes.md.
Variants: configs/base.py.
"""

from configs import base, gan_small, parts, presets
from configs.stages import clip, control, diffusion, embedding_prior, prior, text

DATA = {'name': 'digits', 'image_size': 8, 'channels': 1, 'num_classes': 10}


def _vae(stage):
  stage.model.update(
    presets.vae(
      '8x1,8d2,8t4,4x1,4d4,4t1,1x1',
      '1x1,1u4,1t4,4x2,4u2,4t8,8x2',
      '8:32,4:64,1:16',
      16,
    )
  )
  stage.model.stem = 'dense'
  # With beta = 1 the 64 pixels do not pay for z: the posterior collapses. With 0.1 the aggregated posterior
  # is so far from any prior that the refiner is given images unlike those it was trained on.
  stage.loss.update({'reduction': 'mean', 'beta': 0.2})
  stage.optim.update({'learning_rate': 3e-3, 'schedule': 'cosine', 'ema_decay': 0.99})
  stage.train = parts.train(
    1200, 64, save_every_steps=400, eval_every_steps=400, grid_every_steps=1200, eval_images=0
  )
  stage.prior.update({'kind': 'gmm', 'covariance': 'diag', 'num_components': (20, 40, 60)})


def _refiner(stage):
  stage.model.update(
    {
      'channels': 32,
      'channel_multipliers': (1, 2),
      'num_res_blocks': 1,
      'attention_resolutions': (4,),
      'num_heads': 4,
      'dropout': 0.0,
    }
  )
  # v trains a small network in few steps better than eps, whose error is multiplied at high noise
  stage.diffusion.update({'prediction': 'v', 'loss_weight': 'v'})
  stage.optim.update(
    {
      'learning_rate': 1e-3,
      'schedule': 'cosine',
      'warmup_steps': 100,
      'ema_decay': 0.995,
      'ema_warmup': True,
    }
  )
  stage.train = parts.train(
    1600, 64, save_every_steps=400, eval_every_steps=400, grid_every_steps=1200, eval_images=0
  )
  stage.train.grid_images = 64  # as many as are sampled: the same program, from the compilation cache
  stage.sample.num_steps = 50


def _distill(stage):
  stage.from_steps = 64  # DDIM with 64 steps is as good as with 512 here
  stage.optim.learning_rate = 5e-4
  stage.train = parts.train(
    600, 64, save_every_steps=300, eval_every_steps=300, grid_every_steps=0, eval_images=0
  )


def _consistency(stage):
  # from far pairs to near ones: in few updates near ones alone do not carry the data to high noise
  stage.loss.update({'q': 2.0, 'double_every_steps': 400, 'level_mean': 0.0})
  stage.optim.update({'learning_rate': 3e-4, 'ema_decay': 0.99, 'ema_warmup': True})
  stage.train = parts.train(
    2000, 64, save_every_steps=500, eval_every_steps=500, grid_every_steps=0, eval_images=0
  )


def _adversarial(stage):
  stage.discriminator.channels = 64
  # with 3e-4 and 6e-4 the student was ahead of the heads from the first updates on: they stayed at chance
  stage.optim.update({'learning_rate': 3e-5, 'ema_decay': 0.99, 'ema_warmup': True})
  stage.optim_discriminator.learning_rate = 2e-3
  stage.train = parts.train(
    600, 64, save_every_steps=300, eval_every_steps=100, grid_every_steps=0, eval_images=0
  )


def _matching(stage):
  stage.discriminator.channels = 64
  stage.optim.update({'learning_rate': 1e-4, 'ema_decay': 0.99, 'ema_warmup': True})
  stage.optim_fake.learning_rate = 3e-4
  stage.train = parts.train(
    1500, 64, save_every_steps=500, eval_every_steps=250, grid_every_steps=0, eval_images=0
  )


def _autoencoder(stage):
  gan_small.autoencoder(stage)
  stage.model.channel_multipliers = (1, 2)
  stage.loss.update({'perceptual': '', 'adversarial_weight': 0.0})


def _vqvae2(stage):
  """Grids of 2x2 and 1x1: all that 8 pixels allow."""
  stage.model.update({'channels': 32, 'res_channels': 16, 'latent_channels': 8, 'codebook_size': 64})
  stage.loss.restart_below = 0.5  # the top has one vector per image
  stage.optim.update({'learning_rate': 2e-3, 'schedule': 'cosine'})
  stage.train = parts.train(
    1000, 128, save_every_steps=500, eval_every_steps=500, grid_every_steps=0, eval_images=0
  )


def _decoder(stage):
  gan_small.decoder(stage)
  stage.loss.perceptual = ''


def _ddgan(stage):
  gan_small.ddgan(stage)
  stage.model.channel_multipliers = (1, 2)


def _noisy_classifier(stage):
  stage.model.update(
    {
      'channels': 32,
      'channel_multipliers': (1, 2),
      'num_res_blocks': 1,
      'attention_resolutions': (),  # the middle has it
    }
  )
  stage.optim.update({'learning_rate': 1e-3, 'warmup_steps': 100, 'ema_decay': 0.99, 'ema_warmup': True})
  stage.train = parts.train(
    1000, 64, save_every_steps=500, eval_every_steps=500, grid_every_steps=0, eval_images=0
  )


def _vqvae(stage):
  # 4x4 codes; k-means of raw 2x2 patches with as many has a squared error of 0.0057
  gan_small.autoencoder(stage)
  stage.model.update(
    {
      'channels': 32,
      'channel_multipliers': (1, 2),
      'attention_resolutions': (),  # the middle has it
      'latent_channels': 8,
      'codebook_size': 64,
    }
  )


def _prior(stage):
  prior.small(stage)
  stage.train.eval_images = 0


def _vqgan(stage):
  _vqvae(stage)
  stage.discriminator.update({'channels': 32, 'num_layers': 1})
  stage.loss.update(gan_small.VQGAN)


def _dvae(stage):
  # 4x4 codes; k-means of raw 2x2 patches with half as many has a squared error of 0.00895
  gan_small.dvae(stage)
  stage.model.update({'channel_multipliers': (1, 2), 'codebook_size': 64})


def _evaluate(section):
  section.update(
    {
      'extractors': ('classifier', 'inception'),
      'num_images': 800,  # of 1,797: the floor can be taken at the same N
      'num_seeds': 3,
      'lpips': '',  # its networks were trained on photographs of 64 pixels and more
    }
  )


SIZES = {
  'vae': _vae,
  'refiner': _refiner,
  'distill': _distill,
  'consistency': _consistency,
  'adversarial': _adversarial,
  'matching': _matching,
  'autoencoder': _autoencoder,
  'decoder': _decoder,
  'ddgan': _ddgan,
  'vqvae2': _vqvae2,
  'noisy_classifier': _noisy_classifier,
  'vqvae': _vqvae,
  'prior': _prior,
  'clip': clip.small,
  'embedding_prior': embedding_prior.small,
  'vqgan': _vqgan,
  'dvae': _dvae,
  **dict.fromkeys(control.STAGES, control.small),
  'evaluate': _evaluate,
  'reconstruct': lambda section: section.update({'num_images': 297}),  # the whole evaluation split
  'restore': lambda section: section.update({'num_images': 297}),
  'classifier': lambda section: section.train.update({'num_steps': 1000}),
}


def _wavelet(run):
  """With a wide generator: on maps of 4x4, 16 channels draw nothing that is like a digit."""
  gan_small.wavelet(run)
  run.section('ddgan').model.channels = 64


def _text(run):
  """As the shared one, of captions such as 'the digit three'; without a VAE, whose image would say it."""
  run.config.data.caption_feature = 'caption'
  text.text(run, **WORDS)
  if 'vae' in run.config.stages:
    diffusion.unconditional(run)


def _clip(run):
  """As the shared one, by the same tokenizer."""
  run.config.data.caption_feature = 'caption'
  clip.clip(run, **WORDS)


def _unclip(run):
  """As the shared one, by the same tokenizer."""
  run.config.data.caption_feature = 'caption'
  embedding_prior.unclip(run, **WORDS)


WORDS = {'kind': 'word', 'vocab_size': 32, 'length': 8}
OWN = {
  'wavelet': _wavelet,
  'latent': gan_small.latent,
  'free': gan_small.free,
  'text': _text,
  'clip': _clip,
  'unclip': _unclip,
}


def get_config(variant: str = ''):
  return base.make('digits', DATA, SIZES, variant, own=OWN)
