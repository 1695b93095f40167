"""What the configs of the data set `shapes` share: small networks, and captions without a VAE beside them.

Scenes of one shape on one background, drawn by `vaediff/data/shapes.py`: no download, and what an image shows
can be read out of it exactly, so `--mode=evaluate` says how often samples are what their captions ask for.
"""

from configs import gan_small, parts, presets, stages
from configs.stages import clip, control, diffusion, embedding_prior, prior

AVERAGED = {'ema_decay': 0.995, 'ema_warmup': True}
OFTEN = {'save_every_steps': 1000, 'eval_every_steps': 1000, 'eval_images': 512}


def data(size: int, **changes) -> dict:
  return {
    'name': f'shapes/{size}',
    'image_size': size,
    'channels': 3,
    'num_classes': 6,
    'caption_feature': 'caption',
    **changes,
  }


def _autoencoder(stage):
  gan_small.autoencoder(stage)
  stage.model.channel_multipliers = (1, 2, 2)
  stage.loss.update({'perceptual': '', 'adversarial_weight': 0.0})


def _decoder(stage):
  gan_small.decoder(stage)
  stage.loss.perceptual = ''


def _vqvae(stage):
  gan_small.autoencoder(stage)
  stage.model.update(
    {
      'channels': 32,
      'channel_multipliers': (1, 2, 2),
      'attention_resolutions': (),  # the middle has it
      'latent_channels': 8,
      'codebook_size': 128,
    }
  )
  stage.train.num_steps = 2000


def _vqvae2(stage):
  stage.model.update({'channels': 32, 'res_channels': 16, 'latent_channels': 8, 'codebook_size': 64})
  stage.optim.update({'learning_rate': 2e-3, 'schedule': 'cosine'})
  stage.train = parts.train(2000, 64, grid_every_steps=0)


def _vqgan(stage):
  _vqvae(stage)
  stage.discriminator.update({'channels': 32, 'num_layers': 2})
  stage.loss.update({**gan_small.VQGAN, 'adversarial_start_step': 1000, 'discriminator_start_step': 800})


def _dvae(stage):
  gan_small.dvae(stage)
  stage.model.update({'channel_multipliers': (1, 2, 2), 'codebook_size': 128})
  stage.loss.tau_steps = 1500
  stage.train.num_steps = 2000


def _prior(stage):
  prior.small(stage)
  stage.model.update({'width': 128, 'num_layers': 4})
  stage.optim.learning_rate = 1e-3
  stage.train.num_steps = 4000


def _evaluate(section):
  section.update({'extractors': ('classifier',), 'num_images': 2000, 'lpips': ''})


SIZES = {
  **gan_small.SIZES,
  'autoencoder': _autoencoder,
  'decoder': _decoder,
  'vqvae': _vqvae,
  'vqvae2': _vqvae2,
  'vqgan': _vqgan,
  'dvae': _dvae,
  'prior': _prior,
  'clip': clip.small,
  **dict.fromkeys(control.STAGES, control.small),
  'embedding_prior': embedding_prior.small,
  'evaluate': _evaluate,
  'classifier': lambda section: section.train.update({'num_steps': 5000}),
}
"""What is the same at every size of the images."""


def sizes(
  size: int, channels: int, multipliers: tuple, attention: tuple, num_steps: int, batch_size: int
) -> dict:
  """Returns what edits the sections, by stage; the U-Net has these channels, and trains so long."""

  def vae(stage):
    stage.model.update(vae_of(size))
    stage.model.stem = 'dense'
    stage.loss.reduction = 'mean'
    stage.optim.update({'learning_rate': 2e-3, 'schedule': 'cosine', 'ema_decay': 0.99})
    stage.train = parts.train(2000, 64, save_every_steps=1000, eval_every_steps=1000, grid_every_steps=0)

  def refiner(stage):
    stage.model.update(
      {
        'channels': channels,
        'channel_multipliers': multipliers,
        'num_res_blocks': 1,
        'attention_resolutions': attention,
        'num_heads': 4,
        'dropout': 0.0,
        'scale_shift_norm': True,
        'coordinates': True,
      }
    )
    stage.diffusion.update({'prediction': 'v', 'loss_weight': 'v'})
    stage.optim.update({'learning_rate': 1e-3, 'schedule': 'cosine', 'warmup_steps': 100, **AVERAGED})
    stage.train = parts.train(num_steps, batch_size, grid_every_steps=2000, **OFTEN)

  def noisy_classifier(stage):
    stage.model.update({'channels': 32, 'channel_multipliers': multipliers, 'num_res_blocks': 1})
    stage.model.attention_resolutions = ()
    stage.optim.update({'learning_rate': 1e-3, 'warmup_steps': 100, **AVERAGED})
    stage.train = parts.train(3000, 64, grid_every_steps=0)

  return {**SIZES, 'vae': vae, 'refiner': refiner, 'noisy_classifier': noisy_classifier}


def vae_of(size: int) -> dict:
  """Returns the blocks of a VAE down to one vector, a residual block at each side."""
  widths = {64: 16, 32: 16, 16: 32, 8: 64, 4: 64, 1: 32}
  sides = [side for side in widths if side <= size]
  down, up = [], []
  for side, below in zip(sides[:-1], sides[1:], strict=True):
    factor = side // below
    down += [f'{side}x1', f'{side}d{factor}', f'{side}t{below}']
    up = [f'{below}u{factor}', f'{below}t{side}', f'{side}x1', *up]
  channels = ','.join(f'{side}:{widths[side]}' for side in sides)
  return presets.vae(','.join([*down, '1x1']), ','.join(['1x1', *up]), channels, 32)


def text(run) -> None:
  """As the shared one; without a VAE, whose image would say what captions are to say."""
  stages.VARIANTS['text'](run)
  if 'vae' in run.config.stages:
    diffusion.unconditional(run)


def look(run) -> None:
  """Captions that tell colour, shape and background: size and place are left to a control image."""
  run.config.data.caption_feature = 'caption_look'


OWN = {
  'text': text,
  'look': look,
  'latent': gan_small.latent,
  'wavelet': gan_small.wavelet,
  'free': gan_small.free,
}
