"""Latent spaces and denoising GANs for 8 to 64 pixels and a few cores: minutes to hours, not days."""

from ml_collections import ConfigDict

from configs.run import Run
from configs.stages import ddgan as gan


def autoencoder(stage: ConfigDict) -> None:
  stage.model.update({'channels': 8, 'num_res_blocks': 1})
  stage.loss.update({'kl_weight': 1e-4, 'adversarial_start_step': 500})
  stage.optim.update({'learning_rate': 2e-3, 'b1': 0.9, 'b2': 0.99, 'schedule': 'cosine'})
  stage.train.update(TRAIN)


def dvae(stage: ConfigDict) -> None:
  """Relaxed codes: measured on digits, where the published weights code nothing at all."""
  stage.model.update(
    {
      'network': 'taming',
      'channels': 32,
      'num_res_blocks': 1,
      'latent_channels': 32,
      'logits_scale': 0.1,
      'pixel_map': 0.0,
    }
  )
  stage.loss.update(
    {
      'pixel': 'l2',
      'pixel_weight': 10.0,
      'kl_token_weight': 0.01,
      'kl_warmup_steps': 0,
      'tau_steps': 800,
    }
  )
  stage.optim.update(
    {
      'learning_rate': 2e-3,
      'end_learning_rate': 0.0,
      'b2': 0.99,
      'weight_decay': 0.0,
      'ema_decay': 0.0,
    }
  )
  stage.train.update(TRAIN)


def decoder(stage: ConfigDict) -> None:
  stage.model.update({'channels': 24, 'num_blocks': 1})
  stage.train.update(TRAIN)


VQGAN = {
  'perceptual': '',
  'codebook': 'ema',
  'adversarial_weight': 0.2,  # with 0.8, small decoders lose their images within a thousand updates
  'adversarial_start_step': 500,
  'discriminator_start_step': 400,
}
"""Of 1,000 updates, the second half against a discriminator that has learned before; without LPIPS."""
TRAIN = {'num_steps': 1000, 'batch_size': 64, 'eval_every_steps': 500, 'save_every_steps': 500, 'flip': False}


def ddgan(stage: ConfigDict) -> None:
  stage.model.update(
    {
      'channels': 16,
      'channel_multipliers': (1, 2, 2),
      'num_res_blocks': 1,
      'attention_resolutions': (),
      'latent_dim': 32,
      'num_mapping_layers': 2,
    }
  )
  stage.discriminator.update({'num_layers': 3, 'channels': 8, 'time_dim': 64, 'init_scale': 1.0})
  # The discriminator is narrow and must stay ahead: at equal rates, started at zero, it stayed at chance.
  stage.optim.update(
    {'learning_rate': 2e-4, 'end_learning_rate': 2e-5, 'ema_decay': 0.999, 'ema_warmup': True}
  )
  stage.optim_discriminator.update({'learning_rate': 2e-3, 'end_learning_rate': 2e-4})
  stage.train.update(
    {
      'num_steps': 6000,
      'batch_size': 32,
      'eval_every_steps': 1000,
      'save_every_steps': 1000,
      'grid_every_steps': 2000,
      'flip': False,
    }
  )


SIZES = {'autoencoder': autoencoder, 'decoder': decoder, 'ddgan': ddgan}

# Variants, in place of the shared ones of the same name -------------------------------------------------


def latent(run: Run) -> None:
  """As the shared one, with few positions, so a wider generator of two levels.

  Latents are scaled to unit deviation. Over their largest magnitude, the paper's scaling, those of
  Fashion-MNIST have deviations of 0.1 to 0.3, little beside the noise of the first step, and the
  discriminator stayed at chance.
  """
  gan.latent(run)
  stage = run.section('ddgan')
  stage.model.update({'channels': 32, 'channel_multipliers': (1, 2), 'bounded': False})
  stage.autoencoder.scaling = 'std'
  stage.discriminator.channels = 16
  # twice the width, half the rate: with 2e-3 its logits ran away and came back to chance
  stage.optim_discriminator.learning_rate = 1e-3


def wavelet(run: Run) -> None:
  """With the plain generator: WaveDiff's own choice for 32 pixels, whose wavelets are 16x16."""
  gan.wavelet(run)
  run.section('ddgan').model.network = 'ncsnpp'


def free(run: Run) -> None:
  """As `latent`, on free latents; in a run that diffuses in latents already, those."""
  if 'refiner' not in run.in_space('latent'):
    latent(run)
  run.section('autoencoder').model.bottleneck = 'none'
