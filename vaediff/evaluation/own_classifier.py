"""The data set's own classifier as a feature network: trained once by the one loop, kept beside the data.

Every run on the same data set and settings reads the same classifier, whatever its networks are, so their
figures compare. Another device may train slightly other weights: compare figures of one fingerprint only.
"""

import hashlib
import json
import pathlib

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vaediff import experiments
from vaediff.data import cache, pixels, sources
from vaediff.errors import UserError
from vaediff.features.extractor import Extractor
from vaediff.machine import distributed
from vaediff.run import checkpoint, log
from vaediff.run.loop import SUMMARY, Stage, train
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
  with config.unlocked():
    config.seed = SEED
    config.classifier.model.num_classes = num_classes
  experiment = experiments.build(config, STAGE)
  folder = folder_of(config, splits)
  if not distributed.agree((folder / SUMMARY).exists()):
    log.say(f'training the classifier of this data set, {config.classifier.train.num_steps} steps: {folder}')
    train(
      Stage(
        name=STAGE,
        folder=folder,
        config=config,
        experiment=experiment,
        frozen={},
        frozen_steps={},
        train_source=splits['train'],
        eval_source=splits['eval'],
        extra={},
        mesh=mesh,
      )
    )
  accuracy = json.loads((folder / SUMMARY).read_text())['last']['val/accuracy']
  model = experiment.networks[STAGE]
  params = checkpoint.load_frozen(folder, STAGE, checkpoint.abstract_params(model, mesh))

  def apply(params, image):
    features, logits = model.apply(params, pixels.to_unit_range(image))
    return {'features': features, 'logits': logits}

  extractor = Extractor(
    name='classifier',
    resize='none: trained on images of this size',
    fingerprint=fingerprint_of(params),
    num_features=config.classifier.model.num_features,
    params=params,
    apply=apply,
  )
  return extractor, accuracy


def folder_of(config: ConfigDict, splits: dict[str, sources.Source]) -> pathlib.Path:
  """Returns where the classifier of these images and settings is kept."""
  facts = {
    'classifier': json.loads(config.classifier.to_json()),
    **{split: source_fingerprint(source) for split, source in splits.items()},
  }
  digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
  name = (config.data.name or config.data.source).replace('/', '_').replace(':', '_')
  return cache.data_root(config.data) / 'vaediff' / f'{name}-{config.data.image_size}px-{STAGE}-{digest}'


def source_fingerprint(source: sources.Source, most: int = 64) -> str:
  """Returns the sha256 of a split's length, shape and of up to `most` evenly spaced images and labels."""
  rows = np.unique(np.linspace(0, len(source) - 1, min(most, len(source))).astype(np.int64))
  batch = source.read(rows)
  digest = hashlib.sha256(f'{len(source)} {source.image_shape}'.encode())
  digest.update(batch['image'].tobytes())
  digest.update(batch[sources.LABEL].astype('<i4').tobytes())
  return digest.hexdigest()


def fingerprint_of(params: dict) -> str:
  """Returns the fingerprint of a tree of parameters."""
  leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(params))
  return tensors.fingerprint(
    {jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf) for path, leaf in leaves}
  )
