"""Weights & Biases gets what TensorBoard gets, goes on with a run that goes on, and never ends a training."""

import importlib
import importlib.machinery
import importlib.util
import json
import sys
import types

import jax
import numpy as np
import pytest

from vaediff.errors import UserError
from vaediff.run import log, wandb_log

INSTALLED = importlib.util.find_spec('wandb') is not None


@pytest.fixture
def config():
  config = importlib.import_module('configs.digits').get_config('debug')
  config.log.wandb.update({'mode': 'offline', 'entity': 'team'})
  return config


@pytest.fixture
def calls(monkeypatch):
  """What a module in the place of wandb is called with; `calls.broken` names what it raises at."""
  calls = types.SimpleNamespace(begun=[], logged=[], finished=0, broken='')

  class Run:
    def log(self, values, step):
      if calls.broken == 'log':
        raise ConnectionError('no network')
      calls.logged.append((step, values))

    def finish(self):
      calls.finished += 1

  def init(**asked):
    if calls.broken == 'init':
      raise RuntimeError('api_key not configured')
    calls.begun.append(asked)
    return Run()

  module = types.ModuleType('wandb')
  module.__spec__ = importlib.machinery.ModuleSpec('wandb', None)
  module.init, module.Image = init, lambda picture: ('image', picture.shape)
  monkeypatch.setitem(sys.modules, 'wandb', module)
  return calls


def board(config, folder, start_step=0):
  return log.StageLog(folder, 'vae', start_step, 9, wandb_log.writers(config, 'vae', folder, start_step))


def test_scalars_and_pictures_go_there_too(config, calls, tmp_path):
  folder = tmp_path / 'my-run' / 'vae'
  writer = board(config, folder)
  writer.scalars(1, {'loss': 2.5, 'bad': float('nan')})
  writer.picture(1, 'samples/x0', np.zeros((4, 6, 3), np.uint8))
  writer.close()
  assert calls.logged == [(1, {'loss': 2.5}), (1, {'samples/x0': ('image', (4, 6, 3))})]
  assert calls.finished == 1
  (asked,) = calls.begun
  about = {'project': 'vaediff', 'entity': 'team', 'group': 'my-run', 'job_type': 'vae', 'mode': 'offline'}
  assert about.items() <= asked.items() and asked['name'] == 'my-run-vae' and asked['dir'] == str(folder)
  assert asked['config']['vae']['train']['num_steps'] == config.vae.train.num_steps
  assert asked['config'] == json.loads(config.to_json())


def test_a_run_that_goes_on_has_the_same_id(config, calls, tmp_path):
  for start_step in (0, 3, 0):
    board(config, tmp_path, start_step).close()
  config.log.wandb.project = 'other'
  board(config, tmp_path, 3).close()
  ids = [asked['id'] for asked in calls.begun]
  assert ids[0] == ids[1] and len(set(ids)) == 3  # from the start, or in another project, it is another
  assert json.loads((tmp_path / wandb_log.FILE).read_text())['id'] == ids[-1]
  assert {asked['resume'] for asked in calls.begun} == {'allow'}


@pytest.mark.parametrize('broken', ['init', 'log'])
def test_a_failure_is_said_once_and_training_goes_on(config, calls, tmp_path, capsys, broken):
  calls.broken = broken
  writer = board(config, tmp_path)
  for step in (1, 2):
    writer.scalars(step, {'loss': 1.0})
  writer.close()
  out = capsys.readouterr().out
  assert out.count('Weights & Biases has failed and gets nothing more') == 1 and not calls.logged
  assert len((tmp_path / 'metrics.jsonl').read_text().splitlines()) == 2


def test_one_process_writes_and_none_where_it_is_off(config, calls, tmp_path, monkeypatch):
  config.log.wandb.mode = 'disabled'
  assert wandb_log.writers(config, 'vae', tmp_path, 0) == ()
  config.log.wandb.mode = 'online'
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  assert wandb_log.writers(config, 'vae', tmp_path, 0) == () and not calls.begun


def test_a_missing_package_is_said_before_anything_is_done(config, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"config.log.wandb.mode is 'offline'.*pip install -e '\.\[wandb\]'"):
    wandb_log.check(config)
  config.log.wandb.mode = 'disabled'
  wandb_log.check(config)


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason='the extra [wandb] is not installed')
def test_the_package_writes_what_it_is_given(config, tmp_path, monkeypatch, capsys):
  """Offline, and twice with the same id: what it has written holds the values and the picture."""
  monkeypatch.setenv('WANDB_DIR', str(tmp_path))
  for start_step in (0, 2):
    writer = board(config, tmp_path / 'vae', start_step)
    writer.scalars(start_step + 1, {'loss': 2.5})
    writer.picture(start_step + 1, 'samples/x0', np.zeros((4, 6, 3), np.uint8))
    writer.close()
  assert 'has failed' not in capsys.readouterr().out
  identity = json.loads((tmp_path / 'vae' / wandb_log.FILE).read_text())['id']
  folders = list((tmp_path / 'vae' / 'wandb').glob(f'offline-run-*-{identity}'))
  files = [file for folder in folders for file in folder.rglob('*') if file.is_file()]
  assert any(file.suffix == '.wandb' and b'loss' in file.read_bytes() for file in files)
  assert sum(file.suffix == '.png' for file in files) == 2
