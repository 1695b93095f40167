"""Stages that were never trained: parameters at random, images of scikit-learn's digits; nothing is read."""

import importlib
import types

import as_trained
import jax
import numpy as np
from sklearn import datasets

from vaediff import experiments, reads
from vaediff.data import sources
from vaediff.machine import sharding
from vaediff.run import students
from vaediff.run import trained as opened


def images(count, channels=1):
  """Returns the first digits, uint8, and their labels; with several channels each has its own colour."""
  digits = datasets.load_digits()
  data = np.round(digits.images[:count, ..., None] * 255 / 16).astype(np.uint8)
  tint = 0.3 + 0.7 * np.random.default_rng(0).random((count, 1, 1, channels))
  return (data * (tint if channels > 1 else 1)).astype(np.uint8), digits.target[:count]


class Fresh(opened.Trained):
  """A stage of configs/digits.py."""

  made_of = {'network': 'none'}

  def __init__(self, variant, folder, stage='', **changes):
    config = importlib.import_module('configs.digits').get_config(f'{variant},debug' if variant else 'debug')
    config.update_from_flattened_dict(changes)
    self.config = students.resolve(config)
    self.workdir, self.stage = folder, stage or self.config.stages[-1]
    self.mesh = sharding.make_mesh(self.config.mesh)  # of one device: see `one_device`
    self.experiment = experiments.build(self.config, self.stage)
    networks = {name: model for name, model in self.experiment.networks.items()}
    frozen = {}
    for name, source in {**self.experiment.frozen, **self.experiment.for_sampling}.items():
      if isinstance(source, reads.FromStage):
        networks[name] = source.model
      elif isinstance(source, reads.Measured):
        frozen[name] = source.neutral()
    self.params = {
      name: as_trained.params_of(networks[name].init, seed, 0.05) for seed, name in enumerate(networks)
    }
    self.read = jax.device_put({**frozen, **self.params}, sharding.replicated(self.mesh))
    self._sources = {}
    data, labels = images(32, self.config.data.channels)
    source = sources.ArraySource(images=data, labels=labels.astype(np.int32), label_names=(), num_classes=10)
    self._sources['eval'] = source
    self._prepare()


def said(monkeypatch, module):
  """Returns the list of what a mode will say."""
  lines = []
  monkeypatch.setattr(module, 'log', types.SimpleNamespace(say=lines.append))
  return lines
