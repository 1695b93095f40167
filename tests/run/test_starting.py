"""Training that begins as a network of another run: once, and what is refused."""

import importlib
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest

from vaediff import experiments
from vaediff.errors import UserError
from vaediff.machine import sharding
from vaediff.modes import train
from vaediff.run import checkpoint, log, starting
from vaediff.run.trained import Trained

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
ID = 'first_denoiser'


def config_of(folder, variant='unconditional', **changes):
  config = importlib.import_module('configs.digits').get_config(f'{variant},debug')
  config.data.data_dir = str(folder / 'data')
  for stage in config.stages:
    config[stage].train.update({'num_steps': 2, 'grid_every_steps': 0})
  config.update_from_flattened_dict(changes)
  return config


@pytest.fixture
def first(tmp_path, one_device, monkeypatch):
  """A run of two updates; only its networks are looked at."""
  monkeypatch.setattr(train, 'first_images', lambda *run: {})
  config = config_of(tmp_path)
  train.run_stages(config, tmp_path / 'first', config.stages)
  return tmp_path / 'first'


def averages(folder, config):
  return Trained(config, folder, 'refiner', sharding.make_mesh(config.mesh)).read['denoiser']


@pytest.mark.slow
def test_it_begins_as_the_other_and_needs_it_no_more(first, tmp_path, monkeypatch):
  said = []
  monkeypatch.setattr(log, 'say', lambda text: said.append(str(text)))
  changes = {'refiner.start.workdir': str(first), 'refiner.optim.learning_rate': 1e-12, 'seed': 5}
  changes['refiner.train.save_every_steps'] = 1
  changes['refiner.model.dropout'] = 0.3  # how a network is trained may differ
  config = config_of(tmp_path, **changes)
  train.run_stages(config, tmp_path / 'second', config.stages)
  assert f'refiner: begins as {first / "refiner"} at step 2' in said
  near = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
  jax.tree.map(near, averages(tmp_path / 'second', config), averages(first, config_of(tmp_path)))
  meta = checkpoint.load_meta(tmp_path / 'second' / 'refiner')
  assert meta[checkpoint.STARTS] == {ID: checkpoint.identity_of(first / 'refiner')}
  assert ID not in meta['frozen']
  shutil.rmtree(first)
  own = Trained(config, tmp_path / 'second', 'refiner', sharding.make_mesh(config.mesh))
  assert own.draw(np.arange(2))['x0'].shape == (2, 8, 8, 1) and ID not in own.read
  shutil.rmtree(tmp_path / 'second' / 'refiner' / 'checkpoints' / '2')
  train.run_stages(config, tmp_path / 'second', config.stages)
  assert 'refiner: resuming at step 1 of 2' in said
  again = checkpoint.load_meta(tmp_path / 'second' / 'refiner')
  assert again['data_position'] == 2 and again[checkpoint.STARTS] == meta[checkpoint.STARTS]


@pytest.mark.slow
def test_what_has_begun_or_is_not_there_is_refused_before_anything_is_written(first, tmp_path):
  config = config_of(tmp_path)
  train.run_stages(config, tmp_path / 'second', config.stages)
  stored = (tmp_path / 'second' / 'config.json').read_text()
  config.refiner.start.workdir = str(first)
  with pytest.raises(UserError, match='has begun without it, and is at step 2: use another --workdir'):
    train.run_stages(config, tmp_path / 'second', config.stages)
  assert (tmp_path / 'second' / 'config.json').read_text() == stored
  with pytest.raises(UserError, match="start.workdir is '.*first', this run: .* would begin as itself"):
    train.run_stages(config, first, config.stages)
  config.refiner.start.workdir = str(tmp_path / 'none')
  with pytest.raises(UserError, match="where no stage 'refiner' is trained; .* config.refiner.start.stage"):
    train.run_stages(config, tmp_path / 'third', config.stages)
  assert not (tmp_path / 'third' / 'config.json').exists()


@pytest.mark.slow
def test_another_architecture_or_space_is_refused(first, tmp_path):
  for changes, message in (
    ({'refiner.model.channels': 16}, 'config.refiner.model.channels is 16, but 8'),
    ({'refiner.diffusion.prediction': 'eps'}, "config.refiner.diffusion.prediction is 'eps', but 'v'"),
  ):
    config = config_of(tmp_path, **{'refiner.start.workdir': str(first), **changes})
    with pytest.raises(UserError, match=message):
      train.run_stages(config, tmp_path / 'second', config.stages)
  config = config_of(tmp_path, 'wavelet_diffusion,unconditional', **{'refiner.start.workdir': str(first)})
  source = experiments.build(config, 'refiner').starts[ID]
  with pytest.raises(UserError, match="config.refiner.space is 'wavelet', but 'pixel' in the stage"):
    starting.check_space(config_of(tmp_path), config, source, 'refiner', 'config.refiner.start.workdir')
