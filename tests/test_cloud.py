"""A run in a bucket of a server on this machine: killed, gone on with, sampled, evaluated."""

import importlib
import importlib.util
import json
import logging
import os
import pathlib
import subprocess
import sys
import time
from unittest import mock

import jax
import memory_bucket
import numpy as np
import pytest
from PIL import Image

from vaediff.data import arrays, sources
from vaediff.errors import UserError
from vaediff.experiments.base import Experiment
from vaediff.machine import sharding
from vaediff.modes import checked, evaluate, sample, train
from vaediff.run import adopting, checkpoint, log, precomputed, spool
from vaediff.run import config as configs
from vaediff.run.config import Run
from vaediff.storage import buckets, files
from vaediff.storage.buckets import BucketPath

PACKAGES = ('moto', 'flask', 'flask_cors', 's3fs')
INSTALLED = all(importlib.util.find_spec(name) for name in PACKAGES)
ROOT = pathlib.Path(__file__).parents[1]
CHANGES = {'vae.train.num_steps': 24, 'vae.train.save_every_steps': 4}


@pytest.fixture
def run(monkeypatch):
  """The folder of a run in an empty bucket."""
  if not INSTALLED:
    pytest.skip(f'the extra [test_cloud] is not installed: {", ".join(PACKAGES)}')
  from moto.server import ThreadedMotoServer

  logging.getLogger('werkzeug').setLevel(logging.ERROR)
  server = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)
  server.start()
  host, port = server.get_host_and_port()
  for name, value in {
    'AWS_ENDPOINT_URL': f'http://{host}:{port}',
    'AWS_ACCESS_KEY_ID': 'testing',
    'AWS_SECRET_ACCESS_KEY': 'testing',
    'AWS_DEFAULT_REGION': 'us-east-1',
  }.items():
    monkeypatch.setenv(name, value)
  buckets.filesystem.cache_clear()
  buckets.filesystem('s3').mkdir('bucket')
  yield BucketPath('s3://bucket/runs/digits')
  buckets.filesystem.cache_clear()
  server.stop()


@pytest.fixture
def memory_run(monkeypatch):
  """The folder of a stage in a store in memory."""
  store = memory_bucket.Store()
  monkeypatch.setattr(buckets, 'filesystem', lambda scheme: store)
  return BucketPath('s3://bucket/vae')


def killed_run(run, data, step):
  """Trains in a process that is killed once a step is saved; returns what it has printed."""
  overrides = {**CHANGES, 'data.data_dir': data}
  command = [sys.executable, '-m', 'vaediff.main', f'--config={ROOT}/configs/digits.py:debug']
  command += [f'--workdir={run}', '--stages=vae', '--distributed=off']
  command += [f'--config.{name}={value}' for name, value in overrides.items()]
  flags = os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=1')
  environment = {**os.environ, 'XLA_FLAGS': flags, 'PYTHONPATH': str(ROOT)}
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT}
  process = subprocess.Popen(command, env=environment, text=True, **pipes)
  while process.poll() is None and not (run / 'vae' / 'checkpoints' / str(step) / spool.DONE).exists():
    time.sleep(0.02)
  process.kill()
  return process.communicate()[0]


def trained_without_a_stop(config, workdir):
  """Returns the lines of metrics of the VAE of a run in a folder of this machine."""
  built = checked.check(Run(config, workdir, ('vae',)))
  images = {split: sources.open_source(config.data, split) for split in ('train', 'eval')}
  train.train_stage(built['vae'], config, workdir, 'vae', images, sharding.make_mesh(config.mesh))
  return metrics(workdir / 'vae')


def metrics(folder):
  return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


@pytest.mark.slow
def test_a_run_that_was_killed_ends_as_one_that_never_was(
  run, trained, tmp_path, one_device, capsys, monkeypatch
):
  printed = killed_run(run, trained('digits').data, 8)
  assert (run / files.LOCK).exists() and not (run / 'vae' / 'summary.json').exists(), printed
  saved = checkpoint.latest_step(run / 'vae')
  assert saved >= 8

  config = configs.read(run)
  monkeypatch.setattr(train, 'first_images', lambda *_: {})  # tested elsewhere
  train.run_stages(config, run, ('vae',))
  out = capsys.readouterr().out
  assert f'vae: resuming at step {saved} of 24' in out
  assert not (run / files.LOCK).exists()
  lines = [line for line in metrics(run / 'vae') if 'loss' in line]
  assert [line['step'] for line in lines] == list(range(1, 25))
  wanted = [line['loss'] for line in trained_without_a_stop(config, tmp_path / 'straight') if 'loss' in line]
  np.testing.assert_allclose([line['loss'] for line in lines], wanted, rtol=1e-3)  # a process of one device
  keep = config.vae.train.keep_checkpoints
  assert checkpoint.finished_steps(run / 'vae' / 'checkpoints') == list(range(4, 25, 4))[-keep:]
  assert len(list((run / 'vae' / 'tensorboard').iterdir())) == 2

  with config.unlocked():
    config.vae.sample.update({'save_images': True, 'num_images': 3})
  for _ in range(2):
    sample.mode(Run(config, run, ('vae',)))
  with (run / 'samples-vae' / '000002.png').open('rb') as file:
    assert np.asarray(Image.open(file)).shape == (8, 8)
  assert sorted(path.name for path in (run / 'samples-vae').iterdir()) == [f'{i:06d}.png' for i in range(3)]
  evaluate.mode(Run(config, run, ('vae',)))
  assert any(path.suffix == '.json' for path in (run / 'evaluation').iterdir())


def test_a_checkpoint_is_there_once_all_of_it_is(memory_run):
  """Of the objects of a save that was killed none counts, and the next save replaces them."""
  state = {'a': jax.numpy.arange(6.0), 'step': jax.numpy.int32(1)}
  checkpointer = checkpoint.Checkpointer(memory_run, keep=2)
  for step in (1, 2, 3):
    checkpointer.save(step, {**state, 'step': jax.numpy.int32(step)}, {'config': {}})
  checkpointer.close()
  folder = memory_run / 'checkpoints'
  assert checkpoint.finished_steps(folder) == [2, 3] and not (folder / '1').exists()
  (folder / '3' / spool.DONE).unlink()
  assert checkpoint.latest_step(memory_run) == 2

  again = checkpoint.Checkpointer(memory_run, keep=2)
  restored, meta = again.restore(jax.eval_shape(lambda: state))
  assert int(restored['step']) == 2 and again.latest_step() == 2
  np.testing.assert_array_equal(restored['a'], np.arange(6.0))
  again.save(3, {**state, 'step': jax.numpy.int32(30)}, {'config': {}})
  again.close()
  assert checkpoint.latest_step(memory_run) == 3 and checkpoint.load_meta(memory_run)['id'] != meta['id']
  assert checkpoint.stored_shapes(folder / '3')['a'] == (6,)


def test_a_save_that_cannot_be_sent_is_said(memory_run):
  state = {'a': jax.numpy.arange(6.0)}
  checkpointer = checkpoint.Checkpointer(memory_run, keep=2)
  checkpointer.save(1, state, {'config': {}})
  checkpointer.wait()
  buckets.filesystem('s3').broken = True
  checkpointer.save(2, state, {'config': {}})
  with pytest.raises(UserError, match='could not save step 2 .*the store does not answer as it should'):
    checkpointer.close()


def test_a_job_of_several_processes_is_refused(memory_run, monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(UserError, match=r's3://bucket/vae/checkpoints: checkpoints of 2 processes go to gs://'):
    spool.of(memory_run / 'checkpoints', 1)
  assert spool.of(BucketPath('gs://bucket/vae/checkpoints'), 1) is None  # Orbax writes there itself


def test_a_checkpoint_that_was_damaged_is_set_aside(memory_run):
  checkpointer = checkpoint.Checkpointer(memory_run, keep=2)
  checkpointer.save(1, {'a': jax.numpy.arange(6.0)}, {'config': {}})
  checkpointer.close()
  (memory_run / 'checkpoints' / '1' / 'meta' / 'metadata').put(b'{')
  with pytest.raises(checkpoint.DamagedCheckpoint) as caught:
    checkpoint.load_meta(memory_run)
  aside = checkpoint.set_aside(caught.value)
  assert str(aside) == 's3://bucket/vae/damaged/1' and checkpoint.latest_step(memory_run) is None
  assert (aside / 'meta' / 'metadata').read_bytes() == b'{'


def test_metrics_are_sent_before_a_checkpoint(memory_run):
  board = log.StageLog(memory_run, 'vae', 0, 9)
  for step in (1, 2, 3):
    board.scalars(step, {'loss': float(step)})
    if step == 2:
      board.flush()  # what the loop does before it saves
  assert (memory_run / 'metrics.jsonl').read_text().count('\n') == 2
  board.close()
  board = log.StageLog(memory_run, 'vae', 2, 9)
  assert board.logged == {'loss': 2.0}
  board.scalars(3, {'loss': 30.0})
  board.close()
  lines = [json.loads(line) for line in (memory_run / 'metrics.jsonl').read_text().splitlines()]
  assert [line['loss'] for line in lines] == [1.0, 2.0, 30.0]
  assert list((memory_run / 'tensorboard').iterdir())


def test_precomputed_arrays_are_mapped_from_a_copy(memory_run, monkeypatch):
  config = importlib.import_module('configs.digits').get_config('debug')
  config.data.source = 'synthetic'
  source = sources.open_source(config.data, 'train')
  rows = np.arange(3.0 * len(source), dtype=np.float32).reshape(-1, 3)
  experiment = mock.Mock(spec=Experiment, stored={'z_mean': jax.ShapeDtypeStruct((3,), np.float32)})
  made, mesh = [], sharding.make_mesh(config.mesh)

  def write(folder, *_):
    made.append(folder)
    with arrays.Writer(folder / 'z_mean.npy', rows.shape, rows.dtype) as writer:
      writer.write(0, rows)

  monkeypatch.setattr(precomputed.frozen_networks, 'ids', lambda *_: {})
  monkeypatch.setattr(precomputed, 'write', write)
  for _ in range(2):
    stored = precomputed.precomputed(config, memory_run, 'vae', experiment, {}, source, mesh)['z_mean']
    assert isinstance(stored, np.memmap)
    np.testing.assert_array_equal(stored, rows)
  assert len(made) == 1
  (facts,) = memory_run.rglob(precomputed.FACTS)
  (facts.parent / 'z_mean.npy').put((facts.parent / 'z_mean.npy').read_bytes()[:-4] + b'1234')
  with pytest.raises(files.Damaged, match=f'remove the folder {facts.parent}: it is made again'):
    precomputed.precomputed(config, memory_run, 'vae', experiment, {}, source, mesh)
  facts.unlink()  # as where the one who sent them was killed
  precomputed.precomputed(config, memory_run, 'vae', experiment, {}, source, mesh)
  assert len(made) == 2


def test_an_import_is_there_as_a_whole_or_not_at_all(memory_run, monkeypatch):
  """No folder of a bucket can be renamed: objects are copied, and what was begun is removed."""
  workdir = memory_run.parent / 'run'
  config = importlib.import_module('configs.digits').get_config('debug')
  plan = object.__new__(adopting.Plan)
  for name, value in {'experiments': {'vae': None}, 'scales': {}, 'config': config}.items():
    object.__setattr__(plan, name, value)

  def write_stage(plan, place, stage):
    (place / stage / 'summary.json').put(b'{}')

  monkeypatch.setattr(adopting, 'write_stage', write_stage)
  copied = []

  def lost(self, *paths, **_):
    if copied:
      raise OSError('lost')
    copied.append(paths)

  with monkeypatch.context() as patch:
    patch.setattr(memory_bucket.Store, 'cp_file', lost)
    with pytest.raises(UserError, match=r'run cannot be written: .*lost\). Nothing was imported'):
      adopting.write(plan, workdir)
  assert copied and not memory_run.parent.objects()
  adopting.write(plan, workdir)
  assert {str(path.relative_to(workdir)) for path in memory_run.parent.objects()} == {
    'config.json', 'vae/summary.json'
  }  # fmt: skip
