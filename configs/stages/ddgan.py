"""Denoising GANs of a few large steps, in pixels, wavelets and latents.

DDGAN (arXiv:2112.07804), WaveDiff (arXiv:2211.16152), LDDGAN (thesis, with the settings of its training
scripts where the text gives none).
"""

from ml_collections import ConfigDict

from configs import parts
from configs.run import Run
from configs.stages import diffusion

LARGE = 128
"""Pixels from which the sizes of the 256 pixel networks are taken."""


def section() -> ConfigDict:
  """The denoising GAN on pixels, with DDGAN's settings for CIFAR-10."""
  config = ConfigDict()
  config.experiment = 'ddgan'
  config.space = 'pixel'  # 'pixel' | 'wavelet' | 'latent'
  config.autoencoder = ConfigDict(
    {
      'stage': 'autoencoder',  # space = latent: the frozen autoencoder, this stage ...
      'workdir': '',  # ... of this other run; '' = this run
      'scaling': 'max',  # 'std' | 'max' | 'tanh': see vaediff/spaces/latents.py
      'posterior': 'sample',  # of a KL bottleneck: 'sample' | 'mean'
      'decoder_stage': '',  # the stage of a light decoder to sample with; '' = the autoencoder's own
    }
  )
  config.vae = ConfigDict({'stage': 'vae', 'workdir': ''})  # diffusion.condition = formulation1
  config.conditions = ConfigDict()  # further ones, by name: a section each
  config.model = _generator()
  config.discriminator = ConfigDict(
    {
      'variant': 'small',
      'num_layers': 4,
      'channels': 64,
      'time_dim': 256,
      'group_size': 4,
      'group_order': 'consecutive',  # whose examples: 'consecutive' | 'strided', as published
      'init_scale': 0.0,  # of the kernels that end a branch; 1 where the channels are few
      'dtype': 'float32',
    }
  )
  config.diffusion = ConfigDict(
    {
      'num_steps': 4,
      'beta_min': 0.1,
      'beta_max': 20.0,
      'condition': 'none',  # 'none' | 'formulation1': refine a VAE's image
      'x0_vae_source': 'sample',  # 'sample' | 'mean' of q(z | x) at each step
    }
  )
  config.loss = ConfigDict(
    {
      'r1_gamma': 0.02,
      'r1_every_steps': 15,
      'reconstruction': 'none',  # weight of |x0 - x0'|: 'none' | 'constant' | 'linear' | 'weighted_learning'
    }
  )
  schedule = {'b1': 0.5, 'b2': 0.9, 'schedule': 'cosine', 'end_learning_rate': 1e-5}
  config.optim = parts.optim(1.6e-4, **schedule, ema_decay=0.9999)
  config.optim_discriminator = parts.optim(1.25e-4, **schedule)
  config.train = parts.train(351_000, 256, flip=True)
  config.sample = parts.sample(with_vae=True)  # show the VAE sample beside each refined one
  return config


def _generator() -> ConfigDict:
  return ConfigDict(
    {
      'network': 'ncsnpp',  # 'ncsnpp' | 'wavelet_ncsnpp' | 'uvit'
      'channels': 128,
      'channel_multipliers': (1, 2, 2, 2),
      'num_res_blocks': 2,
      'attention_resolutions': (16,),  # in pixels of the space's maps
      'latent_dim': 100,  # of the generator's z
      'num_mapping_layers': 4,
      'mapping_dim': 256,  # width of what is made of z
      'dropout': 0.0,
      'patch_size': 1,
      'bounded': True,  # a tanh at the end
      'remat': False,
      'dtype': 'float32',
      'wavelet': {  # wavelet_ncsnpp alone
        'use_frequency_bottleneck': True,
        'use_frequency_skips': True,
        'use_residual': True,
      },
      'uvit': {'patch_size': 2, 'dim': 384, 'depth': 8, 'num_heads': 6, 'mlp_ratio': 4.0},  # uvit alone
    }
  )


def debug(stage: ConfigDict, image_size: int) -> None:
  stage.model.update(
    {
      'channels': 8,
      'channel_multipliers': (1, 1),
      'num_res_blocks': 1,
      'attention_resolutions': (),
      'latent_dim': 8,
      'num_mapping_layers': 1,
    }
  )
  stage.model.uvit.update({'dim': 16, 'depth': 2, 'num_heads': 2})
  stage.discriminator.update({'variant': 'small', 'num_layers': 3, 'channels': 4, 'time_dim': 8})
  stage.loss.r1_every_steps = 2


def reads(stage: ConfigDict) -> tuple[str, ...]:
  """The stages whose sections it needs."""
  needed = (stage.vae.stage,) if stage.diffusion.condition != 'none' else ()
  if stage.space == 'latent':
    needed += tuple(filter(None, (stage.autoencoder.stage, stage.autoencoder.decoder_stage)))
  return needed


# Variants ------------------------------------------------------------------------------------------


def ddgan(run: Run) -> None:
  """On pixels alone."""
  (stage,) = run.only('ddgan')
  stage.space = 'pixel'
  if run.config.data.image_size >= LARGE:
    stage.model.update({'channels': 64, 'channel_multipliers': (1, 1, 2, 2, 4, 4), 'num_mapping_layers': 3})
    stage.discriminator.update({'variant': 'large', 'num_layers': 6})


def wavelet(run: Run) -> None:
  """On Haar wavelets, with the wavelet generator and the reconstruction loss (WaveDiff)."""
  (stage,) = run.only('ddgan')
  stage.space = 'wavelet'
  stage.model.network = 'wavelet_ncsnpp'
  stage.discriminator.num_layers = 3
  stage.loss.reconstruction = 'constant'
  if run.config.data.image_size >= LARGE:
    stage.model.update({'channels': 64, 'channel_multipliers': (1, 2, 2, 2, 4), 'num_mapping_layers': 3})
    stage.discriminator.update({'variant': 'large', 'num_layers': 5})


def latent(run: Run) -> None:
  """On the latents of an autoencoder, with Weighted Learning and constant learning rates (LDDGAN)."""
  _, stage = run.only('autoencoder', 'ddgan')
  stage.space = 'latent'
  stage.discriminator.num_layers = 3
  stage.loss.reconstruction = 'weighted_learning'
  for optim in (stage.optim, stage.optim_discriminator):
    optim.schedule = 'constant'
  if run.config.data.image_size >= LARGE:
    stage.model.num_mapping_layers = 3
    stage.discriminator.update({'variant': 'large', 'num_layers': 4})


def _in_latents(run: Run) -> dict[str, ConfigDict]:
  """The stages that diffuse in latents; those of `latent` where there are none."""
  if not run.in_space('latent'):
    latent(run)
  return run.in_space('latent')


def vq(run: Run) -> None:
  """In latents, with a codebook, that the decoder alone quantises with."""
  _in_latents(run)
  run.section('autoencoder').model.update({'bottleneck': 'vq', 'codebook_size': 512})


def light(run: Run) -> None:
  """In latents, sampling with a light decoder that is distilled from the autoencoder's."""
  stages = _in_latents(run)
  for stage in stages.values():
    stage.autoencoder.decoder_stage = 'decoder'
  if 'refiner' in stages and 'refiner' in run.config.stages:
    diffusion.arrange(run, vae='vae' in run.config.stages)
  else:
    run.only('autoencoder', 'decoder', 'ddgan')


def free(run: Run) -> None:
  """In the free latents of LDDGAN's text: deterministic and bounded, without KL."""
  for stage in _in_latents(run).values():
    stage.autoencoder.scaling = 'tanh'
  run.section('autoencoder').model.bottleneck = 'none'


def adversarial_refiner(run: Run) -> None:
  """DiffuseVAE with a denoising GAN of 4 steps as its second stage."""
  ddgan(run)
  _, stage = run.only('vae', 'ddgan')
  stage.diffusion.condition = 'formulation1'
  stage.loss.reconstruction = 'weighted_learning'


VARIANTS = {
  'ddgan': ddgan,
  'wavelet': wavelet,
  'latent': latent,
  'light': light,
  'free': free,
  'vq': vq,
  'adversarial_refiner': adversarial_refiner,
}
