"""What is in use of codebooks is counted over the split: in validation and by --mode=evaluate."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from vaediff.data import sources
from vaediff.evaluation import codebooks
from vaediff.experiments import base
from vaediff.machine import sharding
from vaediff.models import codebook
from vaediff.run import review
from vaediff.run.trained import Trained


class Counting(base.Experiment):
  """A codebook whose ids are the upper bits of each image's first pixel, and another of its last."""

  networks, init, train_step = {}, None, None  # it is not trained here
  draws_images = False

  def eval_step(self, read, batch, key):
    return {'loss': base.masked_mean(jnp.ones(len(batch['mask'])), batch['mask'])}

  def counts(self, read, batch):
    ids = jnp.int32(batch['image']) // 32
    return {
      'first': codebook.histogram(ids[:, :1, :1, 0], 8, batch['mask']),
      'last': codebook.histogram(ids[:, -1:, -1:, 0], 8, batch['mask']),
    }


class Plain(Counting):
  """The same without a codebook."""

  counts = base.Experiment.counts


@pytest.fixture
def source():
  """Of 11 images the first pixels are 3 times 0, 5 times 32, 3 times 224; the last ones 64 all."""
  image = np.zeros((11, 2, 2, 1), np.uint8)
  image[:, 0, 0, 0] = [0] * 3 + [32] * 5 + [224] * 3
  image[:, 1, 1, 0] = 64
  return sources.ArraySource(images=image, labels=np.zeros(11, np.int32), label_names=(), num_classes=0)


@pytest.fixture
def mesh():
  return sharding.make_mesh(ConfigDict({'data': -1, 'fsdp': 1}), jax.devices()[:2])


def perplexity(*counts):
  p = np.array(counts) / sum(counts)
  return float(np.exp(-np.sum(p * np.log(p))))


@pytest.mark.parametrize(('limit', 'size'), [(10_000, 4), (10_000, 100), (7, 4)])
def test_evaluation_counts_every_image_once(source, mesh, limit, size):
  settings = ConfigDict({'num_reconstructions': limit, 'batch_size': size})
  trained = object.__new__(Trained)  # opened, without a checkpoint
  trained.config, trained.mesh, trained.read = ConfigDict({'evaluate': settings}), mesh, {}
  trained.experiment, trained._sources = Counting(), {'eval': source}
  found = codebooks.figures(trained)
  count = min(limit, 11)
  wanted = perplexity(3, 5, 3) if count == 11 else perplexity(3, 4)
  assert found['first/perplexity'].value == pytest.approx(wanted, abs=1e-6)
  assert found['first/used'].value == (3 / 8 if count == 11 else 2 / 8)
  assert (found['last/perplexity'].value, found['last/unused'].value) == (pytest.approx(1, abs=1e-6), 7)
  assert {figure.n for figure in found.values()} == {count}
  trained.experiment = Plain()
  assert codebooks.figures(trained) == {}


def test_validation_is_of_the_whole_split_too(source, mesh):
  train = {'batch_size': 4, 'eval_images': 0, 'grid_images': 1}
  config = ConfigDict(
    {'stage': {'train': train}, 'seed': 0, 'data': {'num_threads': 0, 'prefetch': 0}, 'mesh': {}}
  )
  stage = types.SimpleNamespace(
    name='stage', config=config, experiment=Counting(), frozen={}, eval_source=source, mesh=mesh
  )
  evaluate = review.Evaluator(stage, jax.random.key(0))
  found = evaluate(types.SimpleNamespace(eval_params={}))
  assert found['loss'] == 1 and found['first/used'] == 3 / 8 and found['first/unused'] == 5
  assert found['first/perplexity'] == pytest.approx(perplexity(3, 5, 3), abs=1e-6)
