"""The data set's own classifier as a feature network: trained once by the one loop, kept beside the data.

Of the data set `shapes` it learns all that images show, not the label alone, so that what it sees can be
compared with what is read in closed form. Every run on the same data set and settings reads the same
classifier, whatever its networks are, so their figures compare. Another device may train slightly other
weights: compare figures of one fingerprint only.
"""

import contextlib
import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vaediff import experiments
from vaediff.data import cache, oracle, pixels, shapes, sources
from vaediff.errors import UserError
from vaediff.experiments import classifier
from vaediff.features.extractor import Extractor
from vaediff.machine import distributed
from vaediff.run import checkpoint, log
from vaediff.run.loop import Stage, read_summary, train
from vaediff.storage import files, identity
from vaediff.types import Params
from vaediff.weights import tensors

STAGE = 'classifier'
SEED = 0
"""Of initialisation and data order, whatever the run's seed is: the classifier belongs to the data."""


def load(config: ConfigDict, mesh: Mesh) -> tuple[Extractor, float]:
  """Returns the classifier, trained first if need be, and its accuracy on the evaluation split, in [0, 1].

  Raises:
    UserError: when the images have no labels.
  """
  splits = {split: sources.open_source(config.data, split) for split in sources.SPLITS}
  num_classes = splits['train'].num_classes
  if num_classes < 2:
    raise UserError('the classifier needs labelled images, and these have no labels')
  config = config.copy_and_resolve_references()
  heads = oracle.NUMBERS if shapes.is_named(config.data) else ()
  with config.unlocked():
    config.seed = SEED
    config.classifier.model.num_classes = num_classes
  experiment = experiments.build(config, STAGE).with_heads(heads)
  folder = folder_of(config, splits, heads)
  model = experiment.networks[STAGE]
  params, accuracy = trained(
    Stage(
      name=STAGE,
      folder=folder,
      config=config,
      experiment=experiment,
      frozen={},
      frozen_ids={},
      train_source=splits['train'],
      eval_source=splits['eval'],
      extra={},
      mesh=mesh,
    )
  )

  def apply(params, image):
    features, logits = model.apply(params, pixels.to_unit_range(image))
    seen = {'features': features, 'logits': logits[:, :num_classes]}
    if heads:
      parts = classifier.split(logits, heads)
      seen[oracle.ATTRIBUTES] = jnp.stack([jnp.argmax(part, axis=1) for part in parts], axis=1)
    return seen

  extractor = Extractor(
    name='classifier',
    resize='none: trained on images of this size',
    fingerprint=fingerprint_of(params),
    num_features=config.classifier.model.num_features,
    params=params,
    apply=apply,
  )
  return extractor, accuracy


def trained(stage: Stage) -> tuple[Params, float]:
  """Returns the classifier's parameters and its accuracy; trains it where that is not done.

  Other runs read the same folder: whoever trains it holds its lock, and the others wait. A damaged checkpoint
  is set aside, as those of a run are.
  """
  folder, steps = stage.folder, stage.config[STAGE].train.num_steps
  params = checkpoint.abstract_params(stage.experiment.networks[STAGE], stage.mesh)
  while True:
    try:
      if not distributed.agree(_accuracy(folder, steps) is not None):
        with contextlib.ExitStack() as held:
          if jax.process_index() == 0:
            held.enter_context(files.lock(folder, 'training the classifier of a data set', wait=True))
          distributed.wait_for_all(f'{folder} is locked')
          if not distributed.agree(_accuracy(folder, steps) is not None):  # by another process meanwhile
            log.say(f'training the classifier of this data set, {steps} steps: {folder}')
            train(_seen(stage))
      check = stage.config.checkpoints.check_arrays
      return checkpoint.load_frozen(folder, STAGE, params, check_arrays=check), _accuracy(folder, steps)
    except checkpoint.DamagedCheckpoint as error:
      log.say(f'{error}\nset aside as {checkpoint.set_aside(error)}')


def _seen(stage: Stage) -> Stage:
  """Returns the stage with what its images show in every batch, where it learns that."""
  if not shapes.is_named(stage.config.data):
    return stage
  mini = shapes.is_mini(stage.config.data)
  return dataclasses.replace(
    stage,
    train_source=oracle.with_attributes(stage.train_source, mini=mini),
    eval_source=oracle.with_attributes(stage.eval_source, mini=mini),
  )


def _accuracy(folder: pathlib.Path, steps: int) -> float | None:
  """Returns the accuracy of a classifier that is trained to its last step, in [0, 1]; else None."""
  if checkpoint.latest_step(folder) != steps:
    return None
  summary = read_summary(folder)
  return None if summary is None else summary['last'].get('val/accuracy')


def folder_of(
  config: ConfigDict, splits: dict[str, sources.Source], heads: tuple[int, ...] = ()
) -> pathlib.Path:
  """Returns where the classifier of these images and settings is kept."""
  facts = {
    'classifier': json.loads(config.classifier.to_json()),
    **{split: source.fingerprint for split, source in splits.items()},
    **({'heads': heads} if heads else {}),
  }
  name = (config.data.name or config.data.source).replace('/', '_').replace(':', '_')
  folder = f'{name}-{config.data.image_size}px-{STAGE}-{identity.digest(facts)}'
  return cache.data_root(config.data) / 'vaediff' / folder


def fingerprint_of(params: dict) -> str:
  """Returns the fingerprint of a tree of parameters."""
  leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(params))
  return tensors.fingerprint(
    {jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf) for path, leaf in leaves}
  )
