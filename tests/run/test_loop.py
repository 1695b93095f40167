"""The loop: resuming, devices, non-finite losses, what a second run does."""

import importlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs import presets
from vaediff import experiments, modes
from vaediff.data import sources
from vaediff.errors import UserError
from vaediff.machine import sharding
from vaediff.modes import train
from vaediff.run import checkpoint, loop
from vaediff.run import config as configs
from vaediff.run import frozen as frozen_networks

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


def synthetic(tmp_path, variant='debug', **changes):
  config = importlib.import_module('configs.cifar10').get_config(variant)
  config.data.data_dir = str(tmp_path / 'data')
  config.update_from_flattened_dict(changes)
  return config


def restored(config, workdir, stage, mesh=None):
  """Returns the whole state of a stage's latest checkpoint, on the host."""
  mesh = mesh or sharding.make_mesh(config.mesh)
  experiment = experiments.build(config, stage)
  state, meta = checkpoint.Checkpointer(workdir / stage, 9).restore(loop.abstract_state(experiment, mesh))
  return jax.tree.map(np.asarray, state), meta


def equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def lines(workdir, stage):
  text = (workdir / stage / 'metrics.jsonl').read_text()
  rows = [json.loads(line) for line in text.splitlines()]
  timed = ('images_per_second', 'waiting')
  return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


# A killed run ----------------------------------------------------------------------------------------

OVERRIDES = [
  f'--config.{stage}.train.{field}={value}'
  for stage in ('vae', 'refiner')
  for field, value in (
    ('num_steps', 40),
    ('save_every_steps', 7),
    ('eval_every_steps', 10),
    ('grid_every_steps', 0),
  )
]


def start(workdir, data_dir):
  flags = os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=1')  # as a user would have
  environment = {**os.environ, 'XLA_FLAGS': flags}
  return subprocess.Popen(
      [
          sys.executable, '-m', 'vaediff.main', '--config=configs/cifar10.py:debug', f'--workdir={workdir}',
          f'--config.data.data_dir={data_dir}', *OVERRIDES,
      ],
      cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
  )  # fmt: skip


def kill_at(workdir, data_dir, stage, step, saved=False):
  """Kills a run once its log has reached a step of a stage, plus a moment chosen at random.

  With `saved` not before there is a checkpoint to resume from: on a busy machine saving takes some steps.
  """
  process, path = start(workdir, data_dir), workdir / stage / 'metrics.jsonl'
  deadline = time.monotonic() + 240
  while time.monotonic() < deadline and process.poll() is None:
    ready = not saved or checkpoint.latest_step(workdir / stage) is not None
    if ready and path.exists() and path.read_text().count('\n') >= step:
      time.sleep(random.random() * 0.1)
      process.send_signal(signal.SIGKILL)
      process.wait()
      return
    time.sleep(0.005)
  raise AssertionError(f'the run ended before it could be killed:\n{process.communicate()[0][-3000:]}')


@pytest.mark.slow
def test_a_killed_run_ends_with_the_parameters_of_one_never_stopped(tmp_path):
  seed = random.randrange(10**6)
  random.seed(seed)
  print(f'random moments from seed {seed}')
  data_dir, undisturbed, killed = tmp_path / 'data', tmp_path / 'undisturbed', tmp_path / 'killed'
  process = start(undisturbed, data_dir)
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 0, output[-3000:]
  kill_at(killed, data_dir, 'vae', random.randrange(9, 30))
  assert not (killed / 'vae' / loop.SUMMARY).exists()
  kill_at(killed, data_dir, 'refiner', random.randrange(9, 30), saved=True)
  process = start(killed, data_dir)
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 0, output[-3000:]
  assert 'vae: complete at step 40, skipped' in output and 'refiner: resuming at step' in output
  config = configs.read(killed)
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  for stage in ('vae', 'refiner'):
    ours, meta = restored(config, killed, stage, mesh)
    theirs, _ = restored(config, undisturbed, stage, mesh)
    equal(ours, theirs)
    assert meta['data_position'] == 40
    assert lines(killed, stage) == lines(undisturbed, stage)
  for name in ('samples.png', 'reconstructions.png', 'interpolation.png'):
    assert (killed / name).read_bytes() == (undisturbed / name).read_bytes()


# In this process -------------------------------------------------------------------------------------


def five_steps(tmp_path, devices, stage, **changes):
  """Trains the refiner (with a fixed VAE) or the VAE for five steps on some devices."""
  config = synthetic(tmp_path, 'formulation2,z,guided,debug', **changes)
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
  experiment = experiments.build(config, stage)
  frozen = frozen_networks.fresh(experiment, mesh)
  config[stage].train.update({'num_steps': 5, 'save_every_steps': 5, 'grid_every_steps': 0})
  folder = tmp_path / f'{devices}-{stage}'
  source = sources.open_source(config.data, 'train')
  loop.train(
      loop.Stage(
          name=stage, folder=folder, config=config, experiment=experiment, frozen=frozen,
          train_source=source, eval_source=sources.open_source(config.data, 'eval'),
          frozen_ids={}, extra={}, mesh=mesh,
      )
  )  # fmt: skip
  return config, folder, mesh


@pytest.mark.slow
@pytest.mark.parametrize('stage', ['vae', 'refiner'])
def test_one_device_equals_eight(tmp_path, stage):
  """Eight devices that split the batch alone, and eight of which four split the state too."""
  states = []
  for devices, fsdp in ((1, 1), (8, 1), (8, 4)):
    config, folder, mesh = five_steps(tmp_path / str(fsdp), devices, stage, **{'mesh.fsdp': fsdp})
    abstract = loop.abstract_state(experiments.build(config, stage), mesh)
    state, _ = checkpoint.Checkpointer(folder, 9).restore(abstract)
    states.append({name: jax.tree.map(np.asarray, net.params) for name, net in state.networks.items()})
  (network,) = states[0].values()
  start = jax.jit(experiments.build(config, stage).init)(jax.random.key(0))
  (begun,) = [net.params for net in start.networks.values()]
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), network, begun)
  assert max(jax.tree.leaves(moved)) > 1e-3  # five steps at this rate change far more than the tolerance
  for other in states[1:]:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), states[0], other)


def copied(trained, tmp_path):
  """Returns the config and a copy of a run of both stages: four steps each, by one device."""
  workdir = trained('cifar10').copy(tmp_path / 'run')
  return configs.read(workdir), workdir


@pytest.mark.slow
def test_a_second_run_does_no_work_twice(tmp_path, capsys, one_device, trained):
  config, workdir = copied(trained, tmp_path)
  stages = tuple(config.stages)
  first = [loop.read_summary(workdir / stage) for stage in stages]
  times = {
    path: path.stat().st_mtime_ns
    for path in workdir.rglob('*')
    if path.is_file() and path.name not in ('config.json', '.lock')
  }
  capsys.readouterr()
  assert train.run_stages(config, workdir, stages) == first
  assert times == {
    path: path.stat().st_mtime_ns for path in times
  }
  assert capsys.readouterr().out.count('skipped') == 2


@pytest.mark.slow
def test_another_config_in_the_same_folder_is_refused_and_nothing_changes(tmp_path, one_device, trained):
  _, workdir = copied(trained, tmp_path)
  before = (workdir / configs.FILE).read_text()
  other = synthetic(tmp_path, **{'vae.model.latent_dim': 16, 'vae.loss.beta': 7.0})
  with pytest.raises(UserError, match='config.vae.loss.beta is 1.0 there, 7.0 now'):
    train.run_stages(other, workdir, ('vae',))
  assert (workdir / configs.FILE).read_text() == before


@pytest.mark.slow
def test_a_refiner_is_never_joined_with_another_vae(tmp_path, one_device, trained):
  config, workdir = copied(trained, tmp_path)
  config.vae.train.num_steps = 6
  with pytest.raises(UserError, match=r"of .*refiner was made of the network 'vae' \w+, which is \w+ now"):
    train.run_stages(config, workdir, tuple(config.stages))
  config.vae.train.num_steps = 8
  with pytest.raises(UserError, match="reads stage 'vae' of .* not trained to its last step"):
    train.run_stages(config, workdir, ('refiner',))


def test_sampling_with_settings_that_were_not_trained_is_refused(tmp_path, one_device, trained):
  workdir = trained('digits').copy(tmp_path / 'run')  # other tests read that run too
  config = configs.read(workdir)
  config.refiner.diffusion.prediction = 'eps'
  with pytest.raises(UserError, match="config.refiner.diffusion.prediction is 'v' there, 'eps' now"):
    modes.MODES['sample'](configs.Run(config, workdir, tuple(config.stages)))


@pytest.mark.slow
def test_training_longer_goes_on_from_the_checkpoint(tmp_path, one_device, trained):
  config, workdir = copied(trained, tmp_path)
  config.vae.train.num_steps = 6
  before = loop.read_summary(workdir / 'vae')
  train.run_stages(config, workdir, ('vae',))
  after = loop.read_summary(workdir / 'vae')
  for time_spent in ('seconds', 'compiling_seconds'):  # over both runs
    assert after[time_spent] > before[time_spent]
  more = {name: after[name] - before[name] for name in ('seconds', 'compiling_seconds')}
  assert more['seconds'] > more['compiling_seconds']
  assert [row['step'] for row in lines(workdir, 'vae') if 'loss' in row] == [1, 2, 3, 4, 5, 6]


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(tmp_path, one_device):
  workdir = tmp_path / 'run'
  config = synthetic(tmp_path, **{'vae.optim.learning_rate': 1e30, 'vae.train.num_steps': 30})
  config.vae.model.update(presets.vae('16x1,16d16,16t1,1x1', '1x1,1u16,1t16,16x1', '16:8,1:16', 16))
  with pytest.raises(UserError, match=r'stage vae, step \d+: .*loss.* = (nan|inf) is not finite'):
    train.run_stages(config, workdir, ('vae',))
  step = checkpoint.latest_step(workdir / 'vae')
  if step is not None:
    state, _ = restored(config, workdir, 'vae')
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.networks['vae'].params))


def test_a_stage_without_its_vae_says_so(tmp_path):
  config = synthetic(tmp_path)
  message = r"'refiner' reads stage 'vae' of .*run, .* not trained .*train it first \(--stages=vae\)"
  with pytest.raises(UserError, match=message):
    train.run_stages(config, tmp_path / 'run', ('refiner',))
  mesh = sharding.make_mesh(config.mesh)
  with pytest.raises(UserError, match='no checkpoint in .*vae/checkpoints: train that stage first'):
    frozen_networks.load(experiments.build(config, 'refiner'), config, tmp_path / 'run', mesh)


@pytest.mark.slow
def test_a_vae_of_another_run_is_read_from_there(tmp_path, one_device, trained, monkeypatch):
  monkeypatch.setattr(train, 'first_images', lambda *arguments: {})  # tested elsewhere
  first = str(trained('cifar10').run)
  second = synthetic(tmp_path, **{'refiner.vae.workdir': first, 'stages': ('refiner',)})
  train.run_stages(second, tmp_path / 'second', ('refiner',))
  assert not (tmp_path / 'second' / 'vae').exists()
  third = synthetic(tmp_path, **{'refiner.vae.workdir': first, 'vae.model.stem': 'dense'})
  mesh = sharding.make_mesh(third.mesh)
  with pytest.raises(UserError, match="config.vae.model.stem is 'dense', but 'nearest' in the stage 'vae'"):
    frozen_networks.load(experiments.build(third, 'refiner'), third, tmp_path / 'third', mesh)


@pytest.mark.slow
def test_precomputed_reconstructions_are_read_in_step(tmp_path, one_device, trained, monkeypatch):
  """With the mean, on the fly and precomputed differ by the rounding to bytes alone."""
  monkeypatch.setattr(train, 'first_images', lambda *arguments: {})  # tested elsewhere
  losses, vae = [], {'refiner.vae.workdir': str(trained('cifar10').run), 'stages': ('refiner',)}
  for source in ('mean', 'precomputed'):
    config = synthetic(tmp_path, **{'refiner.diffusion.x0_vae_source': source, **vae})
    train.run_stages(config, tmp_path / source, ('refiner',))
    losses.append([row['loss'] for row in lines(tmp_path / source, 'refiner') if 'loss' in row])
  np.testing.assert_allclose(*losses, rtol=2e-3)


def test_batch_size_must_fit_the_devices(tmp_path):
  config = synthetic(tmp_path, **{'vae.train.batch_size': 12})
  with pytest.raises(
    UserError, match='config.vae.train.batch_size must be a multiple of the 8 devices, got 12'
  ):
    train.run_stages(config, tmp_path / 'run', ('vae',))


def test_updates_before_an_import_are_not_counted_among_those_of_its_seconds(tmp_path, monkeypatch):
  """A published network of a million updates, trained on for ten: its images per second are of the ten."""
  imported = {'data_position': 1_000_000, 'seconds': 0.0, 'last': {}}
  saved = object.__new__(checkpoint.Checkpointer)
  for stored in (imported, {**imported, 'first_step': 1_000_000, 'compiling_seconds': 0.0}):
    step, spent, _ = loop.position_of(saved, stored)
    assert (step, spent.first_step) == (1_000_000, 1_000_000)
  own = {'data_position': 50, 'seconds': 3.0, 'last': {}}
  assert loop.position_of(saved, own)[1].first_step == 0
  monkeypatch.setattr(checkpoint, 'identity_of', lambda folder: 'id')
  stage = object.__new__(loop.Stage)
  for name, value in {'name': 'vae', 'folder': tmp_path}.items():
    object.__setattr__(stage, name, value)
  summary = loop.write_summary(stage, 1_000_010, 8, spent.plus(2.0, 0.5), {})
  assert summary['images_per_second'] == 40.0 and summary['compiling_seconds'] == 0.5
