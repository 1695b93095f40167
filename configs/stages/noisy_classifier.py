"""A classifier of noisy states, which guides samples: Dhariwal & Nichol 2021 (arXiv:2105.05233)."""

from ml_collections import ConfigDict

from configs import parts
from configs.run import Run
from configs.stages import diffusion

FLOAT32 = ('model',)
"""The gradient that guides is computed in it."""
STAGE = 'noisy_classifier'


def section() -> ConfigDict:
  """The published settings; data sets have their own sizes."""
  config = ConfigDict()
  config.experiment = 'noisy_classifier'
  config.space = 'pixel'  # that of the diffusion that it guides, as are the next two
  config.autoencoder = diffusion.section().autoencoder
  config.diffusion = ConfigDict({'schedule': 'linear'})
  config.model = ConfigDict(
    {
      'variant': 'openai',  # 'openai' | 'ddim'
      'channels': 128,
      'channel_multipliers': (1, 2, 3, 4),
      'num_res_blocks': 2,
      'attention_resolutions': (32, 16, 8),  # in pixels of the space's maps
      'num_heads': 4,
      'pool_heads': 4,  # of the attention that makes one vector of the lowest level's map
      'dropout': 0.0,
      'scale_shift_norm': True,
      'remat': False,  # recompute activations in the backward pass
      'dtype': 'float32',
    }
  )
  config.optim = parts.optim(3e-4, schedule='linear', weight_decay=0.05)
  config.train = parts.train(300_000, 256, grid_every_steps=0)
  config.sample = ConfigDict({'checkpoint': 'latest', 'num_images': 1, 'batch_size': 64, 'seed': 0})
  return config


def debug(stage: ConfigDict, image_size: int) -> None:
  stage.model.update(
    {
      'channels': 8,
      'channel_multipliers': (1, 2),
      'num_res_blocks': 1,
      'attention_resolutions': (),
      'num_heads': 2,
      'pool_heads': 2,
    }
  )


def reads(stage: ConfigDict) -> tuple[str, ...]:
  """The stages whose sections it needs."""
  named = (stage.autoencoder.stage, stage.autoencoder.decoder_stage)
  return tuple(filter(None, named)) if stage.space == 'latent' else ()


def match(run: Run) -> None:
  """Gives the classifier the space and the schedule of the refiner, and levels for its maps."""
  if STAGE not in run.config.stages:
    return
  refiner, classifier = run.section('refiner'), run.section(STAGE)
  classifier.space = refiner.space
  classifier.autoencoder.update(refiner.autoencoder)
  classifier.diffusion.schedule = refiner.diffusion.schedule
  side = run.config.data.image_size
  if refiner.space == 'latent':
    side //= 2 ** (len(run.section('autoencoder').model.channel_multipliers) - 1)
  elif refiner.space == 'wavelet':
    side //= 2
  diffusion.fit_levels(classifier.model, side)


def classifier_guided(run: Run) -> None:
  """Before the refiner a classifier of its noisy states, which guides its samples to a class.

  Raises:
    ValueError: the data set has no classes, or it is not known how many.
  """
  run.need_classes('classifier_guided')
  run.edit('refiner', lambda refiner: refiner.sample.classifier.update({'stage': STAGE}))
  if 'refiner' in run.config.stages and STAGE not in run.config.stages:
    place = run.config.stages.index('refiner')
    run.only(*run.config.stages[:place], STAGE, *run.config.stages[place:])
  run.at_end(match)


VARIANTS = {'classifier_guided': classifier_guided}
