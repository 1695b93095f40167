"""What every run has, and how a config is made: `make`.

A config file names its data, its stages and the sizes of each. Every key is declared once, with its unit:
those of stages in configs/stages, one file per experiment, the others here. A stage's section exists only
where a stage of the run uses it. Types come from the defaults: a wrong type or an unknown key fails at once.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import modes
from configs import stages as known
from configs.run import Edit, Run
from configs.stages import classifier, divae

Variants = Mapping[str, Callable[[Run], None]]
STAGES = ('vae', 'refiner')
"""DiffuseVAE: what a run trains where neither its config file nor a variant says otherwise."""
NO_VARIANTS: Variants = {}


def make(
  name: str,
  data: Mapping[str, Any],
  sizes: Mapping[str, Edit],
  variant: str = '',
  stages: tuple[str, ...] = STAGES,
  own: Variants = NO_VARIANTS,
) -> ConfigDict:
  """Returns the locked config of a data set.

  Args:
    name: of the run folder, runs/<name>; variants are appended.
    data: what differs from the defaults of `config.data`.
    sizes: by stage, what edits its section when the stage is added; by other section, at once.
    variant: names joined by commas, applied in this order; those of `LAST` after all others.
    stages: trained in this order.
    own: variants of this data set alone, and those that it has instead of a shared one.

  Raises:
    ValueError: for an unknown variant; the message lists the valid ones.
  """
  config = default()
  config.name = name
  config.lock()
  config.data.update(data)
  run = Run(config, known.BY_NAME, sizes)
  for section in sizes.keys() - known.BY_NAME.keys():
    sizes[section](config[section])
  run.only(*stages)
  variants = {**known.VARIANTS, **own}
  chosen = [item for item in variant.split(',') if item]
  for item in chosen:
    if item not in variants and item not in LAST:
      valid = ', '.join(sorted({*variants, *LAST}))
      raise ValueError(f'config {name!r} has no variant {item!r}; valid: {valid}')
    if item not in LAST:
      variants[item](run)
  used = run.finish()
  for item in LAST:
    if item in chosen:
      LAST[item](config, used)
  with config.unlocked():
    config.update(used)
  config.name = '-'.join([name, *chosen])
  return config.lock()


def default() -> ConfigDict:
  """What every run has; the sections of its stages are in configs/stages."""
  config = ConfigDict()
  config.name = ''  # run folder: runs/<name>; variants are appended
  config.stages = ('vae', 'refiner')  # trained in this order by the one loop
  config.seed = 0  # of initialisation, data order and training noise
  config.data = data()
  config.mesh = ConfigDict(
    {
      'data': -1,  # devices that split the batch only; -1 = the rest
      'fsdp': 1,  # devices that split the batch and the state
      'rules': (),  # ((regex, spec), ...) over paths of the state, before the last resort; sharding.rules_of
    }
  )
  config.processes = ConfigDict(
    {
      'join_timeout_seconds': 300,  # for the processes of a job to find each other
      'heartbeat_timeout_seconds': 100,  # after which a silent process is taken for dead
      'silence_timeout_seconds': 3600.0,  # longest time without the end of a step, compilation too; 0 = off
    }
  )
  config.log = ConfigDict(
    {
      'wandb': {
        'mode': 'disabled',  # 'disabled' | 'offline' | 'online': Weights & Biases (extra `[wandb]`)
        'project': 'vaediff',
        'entity': '',  # user or team; '' = W&B's own choice
      },
    }
  )
  config.checkpoints = ConfigDict(
    {
      'check_arrays': True,  # store digests of all arrays, and compare them when they are read
    }
  )
  config.classifier = classifier.section()
  for name, section in modes.SECTIONS.items():
    config[name] = section()
  return config


def data() -> ConfigDict:
  """Where pixels come from and how they are cropped and resized; read by `vaediff.data`."""
  return ConfigDict(
    {
      'source': 'tfds',  # 'tfds' | 'idx' | 'image_folder' | 'parquet' | 'npz' | 'synthetic'
      'name': '',  # TFDS name with its config, as 'celeb_a_hq/256'
      'path': '',  # folder or file for idx, image_folder, parquet, npz and noto_emoji
      'data_dir': '',  # '' = $TFDS_DATA_DIR or ~/tensorflow_datasets; also holds the array cache
      'train_split': 'train',
      'eval_split': 'test',
      'image_size': 32,  # pixels, height = width
      'channels': 3,
      'num_classes': 0,  # labels are 0 .. num_classes - 1; 0 = none or unknown
      # the field with captions: a feature of TFDS; a column of parquet files, or of captions.jsonl or
      # metadata.csv in an image folder; '' = none are read
      'caption_feature': '',
      'crop': 'none',  # 'none' | 'center'
      'crop_size': 0,  # pixels; 0 = the shorter side
      # 'none' | 'pad' | 'nearest' | 'bilinear' | 'bicubic' | 'lanczos' | 'box'; what is not square is refused
      # by a filter alone, and distorted by one after 'squash_', such as 'squash_bilinear'
      'resize': 'none',
      'materialize': True,  # store once as memory-mapped uint8 arrays
      'num_threads': 2,  # reading threads per process
      'prefetch': 4,  # batches read ahead per process
      'check_fingerprint': True,  # refuse other images than a stage was trained with; off: only say so
    }
  )


# The variants that are about every stage -----------------------------------------------------------


def bfloat16(config: ConfigDict, sections: Mapping[str, ConfigDict]) -> None:
  """All networks compute in it, but for those that their stage keeps in float32."""
  for stage, section in sections.items():
    kept = getattr(known.BY_NAME[stage], 'FLOAT32', ())
    for name, part in section.items():
      if isinstance(part, ConfigDict) and 'dtype' in part and name not in kept:
        part.dtype = 'bfloat16'


def debug(config: ConfigDict, sections: Mapping[str, ConfigDict]) -> None:
  """The same stages, tiny, on synthetic images: seconds on a CPU."""
  if config.data.name != 'digits':
    config.data.update(
      {
        'source': 'synthetic',
        'path': '',
        'train_split': 'train',
        'eval_split': 'test',
        'image_size': 16,
        'num_classes': 10,
        'crop': 'none',
        'crop_size': 0,
        'resize': 'none',
      }
    )
  for stage, section in sections.items():
    known.BY_NAME[stage].debug(section, config.data.image_size)
    _debug_training(section)
  divae.fit_all(sections, config.data.image_size)
  classifier.debug(config.classifier, config.data.image_size)
  modes.debug(config)


def _debug_training(section: ConfigDict) -> None:
  section.train.update(
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
  if not {'teacher', 'base'} & set(section):  # it samples as its teacher, or its base, does
    section.sample.update({'num_images': 4, 'batch_size': 4})


def variants_with(stage: str) -> list[str]:
  """Returns the shared variants that give a run this stage; of a stage that runs have anyway, none."""
  if stage in STAGES:
    return []
  data = {'num_classes': 1, 'caption_feature': 'caption'}
  return [name for name in known.VARIANTS if stage in make('', data, {}, name).stages]


LAST = {'bfloat16': bfloat16, 'debug': debug}
"""Applied to the sections that exist when all others are done, wherever they stand in the list."""
VARIANTS = (*known.VARIANTS, *LAST)
"""The names of those that every config shares."""
