"""The two stages of an edit: their config, made of that of the run, and their training, in their own folder.

It is a run like any other: it goes on where it was stopped, and is opened by `--workdir`. What it reads of
the run that is edited it reads from there; nothing is written there.
"""

import pathlib
import re

import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8
from ml_collections import ConfigDict

from vaediff import experiments
from vaediff.data import arrays, sources
from vaediff.experiments.edit import EDIT_EMBEDDING, EDIT_FINETUNE, SECTION
from vaediff.modes import train
from vaediff.run import checkpoint, log
from vaediff.run import config as configs
from vaediff.storage import identity, places

STAGES = (EDIT_EMBEDDING, EDIT_FINETUNE)
REPORTS = 10
"""Lines of figures of each training."""
SAVES = 4
"""Checkpoints of each training, the last one too."""
PLAIN_ADAM = {
  'schedule': 'constant',
  'end_learning_rate': 0.0,
  'warmup_steps': 0,
  'b1': 0.9,
  'b2': 0.999,
  'eps': 1e-8,
  'weight_decay': 0.0,
  'clip_norm': 0.0,
  'ema_decay': 0.0,
  'ema_warmup': False,
}

Picture = UInt8[np.ndarray, 'size size channels']


def config_of(
  config: ConfigDict, stage: str, workdir: pathlib.Path, image: Picture, caption: str
) -> ConfigDict:
  """Returns the config of an edit: that of its run, with two stages that read one stage of it.

  Args:
    config: of the run.
    stage: whose network is edited.
    workdir: of the run.
    image: the picture.
    caption: what it is to show.
  """
  sizes = (config.edit.embedding, config.edit.finetune)
  made = config.copy_and_resolve_references()
  named = {
    'stage': stage,
    'workdir': str(workdir.absolute()),
    'caption': caption,
    'picture': arrays.digest_of(image),
  }
  with made.unlocked():
    made.stages = STAGES
    sample = made[stage].sample
    sample.update({'captions': (caption,), 'sampler': 'ddim', 'eta': 0.0, 'checkpoint': 'latest'})
    sample.rerank.stage = ''
    for name, size in zip(STAGES, sizes, strict=True):
      section = ConfigDict({'experiment': name, SECTION: named})
      section.optim = made[stage].optim.copy_and_resolve_references()
      section.optim.update({**PLAIN_ADAM, 'learning_rate': size.learning_rate})
      section.train = made[stage].train.copy_and_resolve_references()
      section.train.update(training_of(size.num_steps, size.batch_size))
      section.sample = sample.copy_and_resolve_references()
      made[name] = section
  return made


def training_of(num_steps: int, batch_size: int) -> dict[str, int | bool | str]:
  """Returns how long a stage of an edit trains, and what it reports."""
  return {
    'num_steps': num_steps,
    'batch_size': batch_size,
    'microbatches': 1,
    'flip': False,
    'log_every_steps': max(1, num_steps // REPORTS),
    'save_every_steps': max(1, num_steps // SAVES),
    'eval_every_steps': max(1, num_steps // SAVES),
    'eval_images': 0,
    'grid_every_steps': 0,
    'keep_checkpoints': 1,
    'best_measure': '',
  }


def name_of(config: ConfigDict, title: str) -> str:
  """Returns the name of the folder of an edit: a title, and the digest of all that its training depends on.

  So the same edit is found again, and another one never takes its place.

  Args:
    config: of the edit.
    title: as the name of the file of the picture.
  """
  sections = [{part: config[name][part].to_dict() for part in ('optim', 'train')} for name in STAGES]
  named = config[EDIT_EMBEDDING][SECTION].to_dict()
  own = checkpoint.identity_of(places.anywhere(named['workdir']) / named['stage'])
  known = identity.digest([sections, {**named, 'workdir': own}, config.seed])
  return f'{re.sub(r"[^A-Za-z0-9_-]+", "_", title)[:64] or "picture"}-{known[:8]}'


def train_edit(config: ConfigDict, folder: pathlib.Path, image: Picture, mesh: Mesh) -> None:
  """Trains both stages of an edit in its folder, as far as they are not; whoever calls it holds the folder.

  A damaged checkpoint is set aside, and its stage goes on from the one before.

  Raises:
    UserError: for anything of the user's that cannot work: names field or folder.
    Preempted: after SIGTERM, once everything is saved.
  """
  train.with_damage_set_aside(folder, lambda: _train_once(config, folder, image, mesh))


def _train_once(config: ConfigDict, folder: pathlib.Path, image: Picture, mesh: Mesh) -> None:
  """Does what `train_edit` says, as long as every checkpoint can be read."""
  built = {stage: experiments.build(config, stage) for stage in STAGES}
  train.check_workdir(config, folder)
  configs.save(config, folder)
  for stage, experiment in built.items():
    if train.finished(experiment, config, folder, stage):
      train.check_whole(experiment, config, folder, stage, mesh)
      log.say(f'{stage}: complete, skipped')
      continue
    source = repeated(image, config[stage].train.batch_size)
    images = {split: source for split in ('train', 'eval')}
    train.train_stage(experiment, config, folder, stage, images, mesh)


def repeated(image: Picture, count: int) -> sources.Source:
  """Returns images that are one picture, so often."""
  return sources.ArraySource(
    images=np.broadcast_to(image, (count, *image.shape)),
    labels=np.zeros(count, np.int32),
    label_names=(),
    num_classes=0,
  )
