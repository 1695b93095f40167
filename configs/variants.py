"""The variants that every config shares: small functions that edit a config, joined by commas."""

from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from configs import distill, gan, presets

Variants = Mapping[str, Callable[[ConfigDict], None]]


def _debug(config: ConfigDict) -> None:
  """The same stages, tiny, on synthetic images: seconds on a CPU."""
  if config.data.name != 'digits':
    config.data.source, config.data.path = 'synthetic', ''
    config.data.train_split, config.data.eval_split = 'train', 'test'
    config.data.image_size = 16
    config.data.crop, config.data.crop_size, config.data.resize = 'none', 0, 'none'
  size = config.data.image_size
  config.vae.model.update(presets.tiny_vae(size))
  config.refiner.model.update(
    {
      'channels': 8,
      'channel_multipliers': (1, 2),
      'num_res_blocks': 1,
      'attention_resolutions': (size // 2,),
      'num_heads': 2,
    }
  )
  gan.debug(config)
  distill.debug(config)
  sections = [config[name] for name in config if isinstance(config[name], ConfigDict)]
  stages = [section for section in sections if 'experiment' in section and section is not config.classifier]
  for stage in stages:
    stage.train.update(
      {
        'num_steps': 4,
        'batch_size': 8,
        'log_every_steps': 1,
        'save_every_steps': 2,
        'eval_every_steps': 2,
        'grid_every_steps': 4,
        'grid_images': 4,
        'eval_images': 16,
      }
    )
    if 'teacher' not in stage:  # it samples as its teacher does
      stage.sample.update({'num_images': 4, 'batch_size': 4})
  config.vae.prior.update({'num_components': (1, 2), 'num_encoded': 64})
  config.refiner.sample.num_steps = 4
  config.refiner.optim.warmup_steps = 2
  config.reconstruct.num_images = 4
  config.interpolate.update({'num_points': 3, 'num_rows': 1, 'num_encoded': 32})
  config.restore.num_images = 4
  config.benchmark.update(
    {
      'num_repeats': 2,
      'sample_batch_size': 4,
      'num_warmups': 1,
      'num_sample_repeats': 2,
      'matmul_size': 256,
    }
  )
  config.classifier.model.update({'channels': 8, 'num_features': 8})
  config.classifier.train.update(
    {'num_steps': 4, 'batch_size': 8, 'log_every_steps': 2, 'eval_every_steps': 4}
  )
  config.evaluate.update(
    {
      'extractors': ('classifier',),
      'num_images': 16,
      'num_reconstructions': 16,
      'batch_size': 16,
      'lpips': '',
      'num_memorisation': 8,
      'num_bound': 8,
      'num_bound_times': 4,
    }
  )
  config.evaluate.sweep.update(
    {'samplers': ('ddim',), 'num_steps': (1, 2), 'teacher_steps': 4, 'num_compared': 8}
  )


def _unconditional(config: ConfigDict) -> None:
  """The DDPM baseline: no VAE condition, one stage."""
  config.stages = ('refiner',)
  config.refiner.diffusion.update({'condition': 'none', 'z_conditioning': False})


def _formulation1(config: ConfigDict) -> None:
  config.refiner.diffusion.condition = 'formulation1'


def _formulation2(config: ConfigDict) -> None:
  config.refiner.diffusion.condition = 'formulation2'


def _z(config: ConfigDict) -> None:
  """The U-Net also reads the latent code, with scale-shift normalisation as in the official code."""
  config.refiner.diffusion.z_conditioning = True
  config.refiner.model.scale_shift_norm = True


def _gmm(config: ConfigDict) -> None:
  """Ex-post density estimation: z from a Gaussian mixture fitted to the encoded training set."""
  config.vae.prior.kind = 'gmm'


def _guided(config: ConfigDict) -> None:
  """Trained with condition dropout, sampled with classifier-free guidance."""
  config.refiner.diffusion.condition_dropout = 0.1
  config.refiner.sample.guidance_weight = 0.5


def _bfloat16(config: ConfigDict) -> None:
  for stage in (config.vae, config.refiner, config.autoencoder, config.decoder, config.ddgan):
    stage.model.dtype = 'bfloat16'
  for stage in (config.ddgan, config.adversarial, config.matching):
    stage.discriminator.dtype = 'bfloat16'


VARIANTS: Variants = {
  'unconditional': _unconditional,
  'formulation1': _formulation1,
  'formulation2': _formulation2,
  'z': _z,
  'gmm': _gmm,
  'guided': _guided,
  'bfloat16': _bfloat16,
  **gan.VARIANTS,
  **distill.VARIANTS,
  'debug': _debug,
}
