"""What is measured: networks of this project's configs, tasks, batch sizes.

Imports neither JAX nor PyTorch: both sides read it. A measurement is written `<case>/<task>`.
"""

import dataclasses
from collections.abc import Callable

from ml_collections import ConfigDict

from configs import base, cifar10
from vaediff.errors import UserError

SAMPLING_STEPS = 20
TASKS = {
  'forward': 'one forward pass, no dropout',
  'train': 'one update',
  'sample': f'DDIM, {SAMPLING_STEPS} steps',
}
DTYPES = ('float32', 'bfloat16')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One network.

  Attributes:
    make_config: (variant) -> the config that describes it; variants are joined by commas.
    variant: of every use of this case.
    stage: the stage of the config that trains the network.
    network: 'unet', 'vae', 'ncsnpp' or 'decoder'; each side knows how to build it from the config.
    parameters: how many the network has; both sides are checked against it.
    batch_sizes: images per task on CPUs and on accelerators.
    about: for the table.
  """

  make_config: Callable[[str], ConfigDict]
  variant: str = ''
  stage: str
  network: str
  parameters: int
  batch_sizes: dict[str, tuple[int, int]]
  about: str

  def config(self, dtype: str = 'float32', tiny: bool = False) -> ConfigDict:
    """Returns the config; `tiny` is its `debug` variant, for tests."""
    names = (self.variant, 'bfloat16' if dtype == 'bfloat16' else '', 'debug' if tiny else '')
    config = self.make_config(','.join(filter(None, names)))
    with config.unlocked():
      # The condition is a stored image: the VAE's pass is the case `vae_cifar10`, not a part of this one.
      if 'refiner' in config:
        config.refiner.diffusion.x0_vae_source = 'precomputed'
        config.refiner.sample.update({'sampler': 'ddim', 'num_steps': SAMPLING_STEPS})
      if tiny and 'ddgan' in config:
        config.ddgan.model.attention_resolutions = (config.data.image_size,)
    return config

  def batch_size(self, task: str, device: str) -> int:
    """Returns the images of one call on 'cpu' or 'gpu'."""
    return self.batch_sizes[task][device != 'cpu']


def _small_unet(stage: ConfigDict) -> None:
  stage.model.update(
    {
      'channels': 32,
      'channel_multipliers': (1, 2, 2),
      'num_res_blocks': 1,
      'attention_resolutions': (8,),
      'dropout': 0.0,
    }
  )


def _small(variant: str) -> ConfigDict:
  """A U-Net as one would train on grey 32x32 images with a few cores: widths 32, 64, 64."""
  data = {'name': 'synthetic', 'source': 'synthetic', 'image_size': 32, 'channels': 1}
  return base.make('small', data, {'refiner': _small_unet}, variant)


CASES = {
  'unet_small': Case(
    make_config=_small,
    stage='refiner',
    network='unet',
    parameters=1_113_089,
    batch_sizes={'forward': (64, 512), 'train': (64, 512), 'sample': (16, 128)},
    about='U-Net, 2 -> 1 channels, 32x32, widths (32, 64, 64), attention at 8, no dropout',
  ),
  'unet_cifar10': Case(
    make_config=cifar10.get_config,
    stage='refiner',
    network='unet',
    parameters=35_749_763,
    batch_sizes={'forward': (16, 128), 'train': (16, 128), 'sample': (16, 128)},
    about="DiffuseVAE's U-Net of configs/cifar10.py, 6 -> 3 channels, 32x32, dropout 0.3 in training",
  ),
  'vae_cifar10': Case(
    make_config=cifar10.get_config,
    stage='vae',
    network='vae',
    parameters=9_243_107,
    batch_sizes={'train': (64, 128)},
    about='residual VAE of configs/cifar10.py, 32x32',
  ),
  'ncsnpp_cifar10': Case(
    make_config=cifar10.get_config,
    variant='ddgan',
    stage='ddgan',
    network='ncsnpp',
    parameters=48_432_515,
    batch_sizes={'forward': (16, 256)},
    about="DDGAN's NCSN++ generator of configs/cifar10.py:ddgan, 32x32",
  ),
  'decoder': Case(
    make_config=cifar10.get_config,
    variant='latent',
    stage='autoencoder',
    network='decoder',
    parameters=8_631_575,
    batch_sizes={'forward': (16, 256)},
    about='decoder of the autoencoder of configs/cifar10.py:latent, 16x16x4 -> 32x32x3',
  ),
}


def select(text: str) -> dict[str, list[str]]:
  """Returns case -> tasks for 'all' or a comma list of `<case>` and `<case>/<task>`.

  Raises:
    UserError: a name is not known.
  """
  chosen = {name: [] for name in CASES}
  for item in filter(None, (part.strip() for part in text.split(','))):
    name, _, task = item.partition('/')
    if item == 'all':
      for known, case in CASES.items():
        chosen[known] += case.batch_sizes
      continue
    if name not in CASES or (task and task not in CASES[name].batch_sizes):
      valid = ', '.join(f'{known}/{t}' for known, case in CASES.items() for t in case.batch_sizes)
      raise UserError(f'--cases names {item!r}; valid: all, {", ".join(CASES)}, or one task of them: {valid}')
    chosen[name] += [task] if task else CASES[name].batch_sizes
  chosen = {name: list(dict.fromkeys(tasks)) for name, tasks in chosen.items() if tasks}
  if not chosen:
    raise UserError(f'--cases is {text!r}, which names nothing; valid: all, {", ".join(CASES)}')
  return chosen
