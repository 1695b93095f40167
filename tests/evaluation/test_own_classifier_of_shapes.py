"""The own classifier of the data set shapes: a head for each attribute, and whether it sees what is read."""

import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff import experiments
from vaediff.data import oracle, shapes, sources
from vaediff.evaluation import own_classifier
from vaediff.experiments import classifier
from vaediff.machine import sharding

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))


def config_of(variant=''):
  return importlib.import_module('configs.shapes16').get_config(variant)


def built(variant):
  config = config_of(variant)
  config.classifier.model.num_classes = 6
  return experiments.build(config, 'classifier')


def test_the_loss_is_the_sum_over_heads_and_the_label_is_the_first():
  experiment = built('debug').with_heads(oracle.NUMBERS)
  random = np.random.RandomState(0)
  logits = random.standard_normal((4, sum(oracle.NUMBERS))).astype(np.float32)
  asked = np.stack([random.randint(count, size=4) for count in oracle.NUMBERS], axis=1)
  found = experiment.values(
    jnp.array(logits), {oracle.ATTRIBUTES: jnp.array(asked), 'label': jnp.zeros(4, int)}
  )
  expected, start = np.zeros(4), 0
  for head, count in enumerate(oracle.NUMBERS):
    part = logits[:, start : start + count].astype(np.float64)
    expected += np.log(np.exp(part).sum(1)) - part[np.arange(4), asked[:, head]]
    start += count
  np.testing.assert_allclose(found['loss'], expected, rtol=1e-5)
  np.testing.assert_array_equal(found['accuracy'], logits[:, :6].argmax(1) == asked[:, 0])
  assert [part.shape[1] for part in classifier.split(jnp.array(logits), oracle.NUMBERS)] == [6, 8, 3, 9, 4]


def test_batches_hold_what_their_images_show(tmp_path):
  image = shapes.images('train', range(30), 16, mini=True)
  source = sources.ArraySource(
    images=image, labels=np.zeros(30, np.int32), label_names=shapes.SHAPES, num_classes=6, captions=('',) * 30
  )
  config = config_of('mini')
  experiment = built('mini,debug')
  stage = own_classifier.Stage(
    name='classifier', folder=tmp_path, config=config, experiment=experiment, frozen={}, frozen_ids={},
    train_source=source, eval_source=source, extra={}, mesh=sharding.make_mesh(config.mesh),
  )  # fmt: skip
  seen = own_classifier._seen(stage).eval_source.read(np.array([7, 3]))
  expected = [shapes.scene('train', index, mini=True).attributes for index in (7, 3)]
  np.testing.assert_array_equal(seen[oracle.ATTRIBUTES], expected)
  np.testing.assert_array_equal(seen['image'], image[[7, 3]])
  stage.config.data.name = 'digits'
  assert own_classifier._seen(stage) is stage


@pytest.mark.slow
def test_it_is_trained_and_sees_all_attributes(monkeypatch, tmp_path, one_device):
  """On few images, for few steps: the right shapes come out, and colours and backgrounds are learned."""
  for split in shapes.COUNTS:
    monkeypatch.setitem(shapes.COUNTS, split, 600)
  config = config_of('mini')
  config.data.data_dir = str(tmp_path)
  config.classifier.train.update({'num_steps': 60, 'eval_every_steps': 60, 'save_every_steps': 60})
  extractor, accuracy = own_classifier.load(config, sharding.make_mesh(config.mesh))
  image = shapes.images('test', range(100), 16, mini=True)
  seen = jax.jit(extractor.apply)(extractor.params, image)
  assert seen['logits'].shape == (100, 3) and seen[oracle.ATTRIBUTES].shape == (100, 5)
  right = np.mean(seen[oracle.ATTRIBUTES] == oracle.Oracle(16, mini=True).read(image).attributes, axis=0)
  assert right[4] > 0.95 and right[1] > 0.6  # chance is 0.5 and 0.25
  assert 0 <= accuracy <= 1


@pytest.mark.long
@pytest.mark.parametrize('variant', ['', 'mini'])
def test_both_oracles_agree(variant, tmp_path, one_device):
  """On at least 98 % of the test images all five attributes are the same."""
  config = config_of(variant)
  config.data.data_dir = str(tmp_path)
  extractor, _ = own_classifier.load(config, sharding.make_mesh(config.mesh))
  image = sources.open_source(config.data, 'eval').images[:]
  run = jax.jit(extractor.apply)
  seen = np.concatenate([run(extractor.params, chunk)[oracle.ATTRIBUTES] for chunk in np.split(image, 20)])
  read = oracle.Oracle(16, mini=bool(variant)).read(image).attributes
  assert np.mean((seen == read).all(axis=1)) >= 0.98
