"""DiffuseVAE on the Noto emoji, 64x64 RGB.

    python -m vaediff.main --config=configs/emoji64.py

Data: the npm package emoji-datasource-google, unpacked in a folder that `--config.data.path=...` names
(`npm pack emoji-datasource-google`, then `tar xf`); 3,786 images, split by base emoji. A small set: expect
memorisation, and look at the nearest training images.

Codes, 8x8 of 256 (`vqvae2`: 16x16, 8x8 and 4x4):

    python -m vaediff.main --config=configs/emoji64.py:vqvae     # or vqvae2, vqgan, dvae (logit-Laplace)
    python -m vaediff.main --config=configs/emoji64.py:divae,prior,label

Names, and edges to follow:

    python -m vaediff.main --config=configs/emoji64.py:text,control

Caption to image as DALL-E 2, by a CLIP stage and a prior of its vectors (docs/unclip.md):

    python -m vaediff.main --config=configs/emoji64.py:unclip

Three levels of codes at half the width: docs/codes.md; captions to codes: docs/text.md. In latents of 16x16,
for a core or two, DiffuseVAE (docs/results_emoji.md), a class as condition, and LDDGAN:

    python -m vaediff.main --config=configs/emoji64.py:small,latent_diffusion,gmm
    python -m vaediff.main --config=configs/emoji64.py:small,latent_diffusion,unconditional,label,guided
    python -m vaediff.main --config=configs/emoji64.py:small,latent

The class as condition, all 6,000 updates of LDDGAN, and the full sizes: not yet measured.
"""

from configs import base, gan_small, parts, presets
from configs.stages import clip, control, diffusion, embedding_prior, prior, text

DATA = {
  'name': 'noto_emoji',
  'image_size': 64,
  'channels': 3,
  'num_classes': 10,
  'caption_feature': 'caption',
}


def _vae(stage):
  stage.model.update(presets.VAE['celeba64'])
  stage.train = parts.train(60_000, 64)


def _refiner(stage):
  stage.model.update(
    {
      'channels': 64,
      'channel_multipliers': (1, 2, 2, 4),
      'attention_resolutions': (16, 8),
      'num_heads': 4,
    }
  )
  stage.train = parts.train(200_000, 64)


def _ddgan(stage):
  gan_small.ddgan(stage)
  stage.train.num_steps = 50_000


def _vqvae2(stage):
  """Three levels: grids of 16x16, 8x8 and 4x4."""
  stage.model.update({'num_levels': 3, 'channels': 64, 'latent_channels': 32, 'codebook_size': 256})
  stage.optim.update({'learning_rate': 1e-3, 'schedule': 'cosine'})
  stage.train = parts.train(50_000, 64)


def _vqvae(stage):
  # 8x8 codes
  gan_small.autoencoder(stage)
  stage.model.update(
    {
      'channels': 32,
      'channel_multipliers': (1, 2, 2, 4),
      'attention_resolutions': (),  # the middle has it
      'latent_channels': 16,
      'codebook_size': 256,
    }
  )
  stage.train.num_steps = 5000


def _prior(stage):
  prior.small(stage)
  stage.model.update({'width': 256, 'num_layers': 6, 'num_heads': 8, 'dropout': 0.2})
  stage.optim.learning_rate = 1e-3
  stage.train.num_steps = 10_000


def _vqgan(stage):
  _vqvae(stage)
  stage.discriminator.update({'channels': 32, 'num_layers': 3})
  stage.loss.update({**gan_small.VQGAN, 'adversarial_start_step': 2500, 'discriminator_start_step': 2000})


def _dvae(stage):
  # 8x8 codes; colours, and shades between them: by their density
  gan_small.dvae(stage)
  stage.model.update({'channel_multipliers': (1, 2, 2, 4), 'codebook_size': 256, 'pixel_map': 0.1})
  stage.loss.update({'pixel': 'logit_laplace', 'pixel_weight': 1.0, 'tau_steps': 4000})
  stage.train.num_steps = 5000


def _classifier(stage):
  # nine minutes of a core; docs/text.md
  stage.model.channels = 16
  stage.train.update({'num_steps': 1500, 'batch_size': 64})


def _text(run):
  """As the shared one, in pieces of words: names of emoji have too many words for a table of them."""
  text.text(run, kind='subword', vocab_size=1024, length=32)
  if 'vae' in run.config.stages:  # its image would say what captions are to say
    diffusion.unconditional(run)


def _clip(run):
  """As the shared one, by the same tokenizer."""
  clip.clip(run, kind='subword', vocab_size=1024, length=32)


def _control(stage):
  control.small(stage)
  stage.train.update({'num_steps': 20_000, 'eval_every_steps': 1000, 'grid_every_steps': 2000})


def _unclip(run):
  """As the shared one, by the same tokenizer."""
  embedding_prior.unclip(run, kind='subword', vocab_size=1024, length=32)


def _embedding_prior(stage):
  embedding_prior.small(stage)
  stage.model.dropout = 0.1
  stage.train.num_steps = 10_000


SIZES = {
  **gan_small.SIZES,
  'vae': _vae,
  'refiner': _refiner,
  'ddgan': _ddgan,
  'vqvae': _vqvae,
  'prior': _prior,
  'clip': clip.small,
  **dict.fromkeys(control.STAGES, _control),
  'embedding_prior': _embedding_prior,
  'vqgan': _vqgan,
  'vqvae2': _vqvae2,
  'dvae': _dvae,
  'classifier': _classifier,
}


# `small` -------------------------------------------------------------------------------------------------


def _small_vae(stage):
  stage.model.update(
    presets.vae(
      '64x1,64d2,64t32,32x1,32d2,32t16,16x1,16d2,16t8,8x1,8d2,8t4,4x1,4d4,4t1,1x1',
      '1x1,1u4,1t4,4x1,4u2,4t8,8x1,8u2,8t16,16x1,16u2,16t32,32x1,32u2,32t64,64x1',
      '64:16,32:32,16:32,8:64,4:128,1:64',
      64,
    )
  )
  stage.model.stem = 'dense'
  stage.loss.reduction = 'mean'
  stage.optim.update({'learning_rate': 2e-3, 'schedule': 'cosine', 'ema_decay': 0.99})
  stage.train.update({'num_steps': 1000, 'batch_size': 32, **OFTEN, 'save_every_steps': 500})


def _small_autoencoder(stage):
  stage.model.update({'channels': 24, 'channel_multipliers': (1, 2, 2)})
  stage.loss.update({'perceptual': '', 'adversarial_weight': 0.0})
  stage.train.update({'num_steps': 700, 'batch_size': 32, 'flip': True, **OFTEN, 'save_every_steps': 350})


def _small_refiner(stage):
  stage.model.update(
    {
      'channels': 64,
      'channel_multipliers': (1, 2, 2),
      'num_res_blocks': 1,
      'attention_resolutions': (8, 4),
      'num_heads': 4,
      'dropout': 0.0,
      'scale_shift_norm': True,
      'coordinates': True,
    }
  )
  stage.diffusion.update({'prediction': 'v', 'loss_weight': 'v'})
  stage.optim.update(
    {
      'learning_rate': 5e-4,
      'schedule': 'cosine',
      'warmup_steps': 200,
      'ema_decay': 0.999,
      'ema_warmup': True,
    }
  )
  stage.train.update({'num_steps': 3000, 'batch_size': 32, 'flip': True, **OFTEN})


def _small_distill(stage):
  stage.from_steps = 32
  stage.last_train_steps = 600
  stage.optim.learning_rate = 1e-4
  stage.train.update({'num_steps': 300, **OFTEN})


OFTEN = {'save_every_steps': 1000, 'eval_every_steps': 1000, 'grid_every_steps': 0, 'eval_images': 256}
SMALL = {
  'vae': _small_vae,
  'autoencoder': _small_autoencoder,
  'refiner': _small_refiner,
  'distill': _small_distill,
}


def _unmirrored(run):
  """Names of emoji say left and right."""
  for stage in run.config.stages:
    section = run.section(stage)
    if 'text' in section:
      section.train.flip = False


def _small(run):
  """Latents of 16x16x4 and a U-Net of a few million parameters; no published weights."""
  run.edit_all(SMALL)
  run.at_end(diffusion.fit)
  run.at_end(_unmirrored)
  run.config.evaluate.update({'extractors': ('classifier',), 'num_images': 2000, 'lpips': ''})


def get_config(variant: str = ''):
  own = {'latent': gan_small.latent, 'free': gan_small.free, 'text': _text, 'clip': _clip}
  own |= {'unclip': _unclip, 'small': _small}
  return base.make('emoji64', DATA, SIZES, variant, own=own)
