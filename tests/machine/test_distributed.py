"""Several real processes on this machine: the same losses, restarts with other counts, lost peers."""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from vaediff import modes
from vaediff.errors import UserError
from vaediff.machine import distributed
from vaediff.run import config as configs

pytestmark = pytest.mark.xdist_group('processes')  # one worker: the tests share what is dear
ROOT = pathlib.Path(__file__).parents[2]
ARGUMENTS = ('--config=configs/cifar10.py:debug', '--stages=vae')
TIMEOUT = 600


def free_port():
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    return probe.getsockname()[1]


def start(workdir, count, *overrides, devices=2, config=ARGUMENTS):
  """Starts `count` processes with `devices` fake devices each; their output goes to files."""
  port, processes = free_port(), []
  workdir.mkdir(parents=True, exist_ok=True)
  for index in range(count):
    environment = {
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': os.environ['XLA_FLAGS'].replace('device_count=8', f'device_count={devices}'),
    }
    if count > 1:
      environment |= {
        'JAX_COORDINATOR_ADDRESS': f'localhost:{port}',
        'JAX_NUM_PROCESSES': str(count),
        'JAX_PROCESS_ID': str(index),
      }
    output = open(workdir / f'output-{count}-{index}.txt', 'w')  # noqa: SIM115
    command = [sys.executable, '-m', 'vaediff.main', *config, f'--workdir={workdir}', *overrides]
    processes.append(
      subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    )
  return processes


def wait(processes, timeout=TIMEOUT):
  deadline = time.monotonic() + timeout
  try:
    return [process.wait(max(1, deadline - time.monotonic())) for process in processes]
  finally:
    for process in processes:
      process.kill()


def outputs(workdir):
  return '\n'.join(path.read_text()[-30_000:] for path in sorted(workdir.glob('output-*.txt')))


def train(workdir, count, num_steps, *overrides, **kwargs):
  """Trains the VAE to a step; the data are shared between the runs of a test."""
  statuses = wait(start(workdir, count, *settings(workdir, num_steps), *overrides, **kwargs))
  assert statuses == [0] * count, outputs(workdir)


def settings(workdir, num_steps, save=4):
  return (
    f'--config.data.data_dir={workdir.parent / "data"}',
    f'--config.vae.train.num_steps={num_steps}',
    f'--config.vae.train.save_every_steps={save}',
    '--config.vae.train.eval_every_steps=4',
    '--config.vae.train.grid_every_steps=0',
    '--config.vae.train.keep_checkpoints=3',
    '--config.interpolate.num_encoded=8',
  )


def losses(workdir, stage='vae'):
  rows = [json.loads(line) for line in (workdir / stage / 'metrics.jsonl').read_text().splitlines()]
  return {(row['step'], name): row[name] for row in rows for name in ('loss', 'val/loss') if name in row}


def same(a, b):
  assert a.keys() == b.keys() and len(a) > 4
  for key, value in a.items():
    assert value == pytest.approx(b[key], rel=1e-5), key


@pytest.fixture(scope='module')
def one(tmp_path_factory):
  """The losses of one process with one device, never stopped."""
  workdir = tmp_path_factory.mktemp('one') / 'run'
  train(workdir, 1, 12, devices=1)
  return losses(workdir)


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(one, tmp_path):
  train(tmp_path / 'run', 2, 12)
  same(losses(tmp_path / 'run'), one)
  for name in ('samples', 'reconstructions', 'interpolation'):
    assert (tmp_path / 'run' / f'{name}-vae.png').exists()
  first, second = ((tmp_path / 'run' / f'output-2-{k}.txt').read_text() for k in (0, 1))
  assert 'vae 12/12' in first and 'vae 12/12' not in second  # one process speaks


@pytest.mark.slow
def test_four_then_two_then_one_process(one, tmp_path):
  workdir = tmp_path / 'run'
  train(workdir, 4, 4)
  train(workdir, 2, 8, '--config.mesh.fsdp=2', '--config.mesh.data=-1')
  train(workdir, 1, 12, devices=1)
  same(losses(workdir), one)


@pytest.mark.slow
def test_a_lost_process_ends_the_other_and_both_go_on(one, tmp_path):
  workdir = tmp_path / 'run'
  overrides = (*settings(workdir, 12), '--config.processes.heartbeat_timeout_seconds=10')
  processes = start(workdir, 2, *overrides)
  deadline = time.monotonic() + TIMEOUT
  while not (workdir / 'vae' / 'checkpoints' / '4').exists() and time.monotonic() < deadline:
    time.sleep(0.01)
  victim = random.randrange(2)
  processes[victim].send_signal(signal.SIGKILL)
  statuses = wait(processes, 120)
  other = statuses[1 - victim]
  assert statuses[victim] == -signal.SIGKILL and other != 0, outputs(workdir)
  said = (workdir / f'output-2-{1 - victim}.txt').read_text()
  assert 'error' in said.lower() and ('lost' in said or 'distributed service' in said), said[-2000:]
  train(workdir, 2, 12)
  same(losses(workdir), one)


@pytest.mark.slow
def test_preemption_of_one_process_stops_and_saves_both(one, tmp_path):
  workdir = tmp_path / 'run'
  processes = start(workdir, 2, *settings(workdir, 12, save=100), '--config.vae.train.eval_every_steps=4')
  path, deadline = workdir / 'vae' / 'metrics.jsonl', time.monotonic() + TIMEOUT
  while not (path.exists() and path.read_text().count('\n') >= 2) and time.monotonic() < deadline:
    time.sleep(0.005)
  processes[1].send_signal(signal.SIGTERM)
  statuses = wait(processes, 300)
  if statuses != [0, 0]:  # else it was done before the notice went round
    assert statuses == [distributed.PREEMPTED] * 2, outputs(workdir)
    train(workdir, 2, 12)
  same(losses(workdir), one)


# A whole run, drawn from and measured ---------------------------------------------------------------


def close(a, b, where=''):
  """Equal but for rounding: the same names, texts and counts; seconds and devices differ."""
  if isinstance(a, dict):
    assert a.keys() == b.keys(), where
    for key in a.keys() - {'device', 'seconds per image', 'weights sha256'}:
      close(a[key], b[key], f'{where}/{key}')
  elif isinstance(a, list):
    assert len(a) == len(b), where
    for index, pair in enumerate(zip(a, b, strict=True)):
      close(*pair, f'{where}/{index}')
  else:
    assert a == (pytest.approx(b, rel=1e-3, abs=1e-5) if isinstance(b, float) else b), where


def run_mode(workdir, count, mode, *overrides):
  statuses = wait(start(workdir, count, f'--mode={mode}', *overrides, config=()))
  assert statuses == [0] * count, outputs(workdir)


def pictures(folder):
  """Returns the images of a folder by their path in it."""
  found = {}
  for path in folder.rglob('*.png'):
    with Image.open(path) as picture:
      found[str(path.relative_to(folder))] = np.asarray(picture).astype(int)
  return found


@pytest.mark.slow
def test_two_processes_draw_the_images_of_one(tmp_path, trained, one_device):
  one, two = trained('digits').copy(tmp_path / 'one'), trained('digits').copy(tmp_path / 'two')
  config = configs.read(one)
  config.refiner.sample.update({'save_images': True, 'num_images': 5, 'save_npz': True})
  modes.MODES['sample'](configs.Run(config, one, ('vae', 'refiner')))
  changes = ('save_images=True', 'num_images=5', 'save_npz=True')
  run_mode(two, 2, 'sample', *(f'--config.refiner.sample.{change}' for change in changes))
  ours, theirs = pictures(two), pictures(one)
  assert ours.keys() == theirs.keys()
  names = {f'{index:06d}.png' for index in range(5)}
  assert {f'samples/{name}' for name in names} | {f'samples/x0_vae/{name}' for name in names} < ours.keys()
  for name, picture in ours.items():
    assert np.abs(picture - theirs[name]).max() <= 1, name  # a byte may round the other way
  with np.load(one / 'samples.npz') as a, np.load(two / 'samples.npz') as b:
    assert sorted(a) == sorted(b) == ['provenance', 'x0', 'x0_vae']
    assert json.loads(str(a['provenance'])).keys() == json.loads(str(b['provenance'])).keys() != set()
    for index in range(5):
      assert np.array_equal(a['x0'][index, :, :, 0], theirs[f'samples/{index:06d}.png'])
  config.refiner.sample.num_images = 4
  modes.MODES['sample'](configs.Run(config, one, ('vae', 'refiner')))
  assert {path.name for path in (one / 'samples').rglob('*.png')} == names - {'000004.png'}  # no older ones


@pytest.mark.slow
def test_two_processes_measure_the_figures_of_one(tmp_path, trained, one_device):
  one, two = trained('digits').copy(tmp_path / 'one'), trained('digits').copy(tmp_path / 'two')
  config = configs.read(one)
  modes.MODES['evaluate'](configs.Run(config, one, ('vae', 'refiner')))
  run_mode(
    two, 2, 'evaluate', f'--config.data.data_dir={tmp_path / "data"}'
  )  # with a classifier of their own
  files = [{path.name for path in (run / 'evaluation').iterdir()} for run in (one, two)]
  assert files[0] == files[1] and len(files[0]) > 3
  (name,) = (path.name for path in (one / 'evaluation').glob('*.json'))
  close(*(json.loads((run / 'evaluation' / name).read_text()) for run in (one, two)))


@pytest.mark.slow
def test_two_processes_train_all_stages_as_one(tmp_path, trained):
  one, two = trained('digits').run, tmp_path / 'two'
  digits, data_dir = '--config=configs/digits.py:debug', f'--config.data.data_dir={tmp_path / "data"}'
  statuses = wait(start(two, 2, data_dir, config=(digits,)))
  assert statuses == [0, 0], outputs(two)
  for stage in ('vae', 'refiner'):
    rows = [losses(run, stage) for run in (one, two)]
    assert len(rows[0]) > 4
    same(*rows)
  for path in [*one.glob('*.png'), *one.glob('*.json')]:
    assert (two / path.name).exists(), path.name


# One process by itself ------------------------------------------------------------------------------


@pytest.mark.slow
def test_sigterm_saves_and_the_next_run_goes_on(one, tmp_path):
  workdir = tmp_path / 'run'
  (process,) = start(workdir, 1, *settings(workdir, 12, save=100), devices=1)
  path, deadline = workdir / 'vae' / 'metrics.jsonl', time.monotonic() + TIMEOUT
  while not (path.exists() and path.read_text().count('\n') >= 2) and time.monotonic() < deadline:
    time.sleep(0.001)
  process.send_signal(signal.SIGTERM)
  (status,) = wait([process])
  said = outputs(workdir)
  assert status == distributed.PREEMPTED, said
  assert 'preempted: stage vae was stopped and saved at step' in said and 'Traceback' not in said
  (workdir / 'output-1-0.txt').rename(workdir / 'before.txt')
  train(workdir, 1, 12, devices=1)
  assert 'vae: resuming at step' in outputs(workdir)
  same(losses(workdir), one)


# Finding the others -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('environment', 'expected'),
  [
    ({}, None),
    ({'SLURM_NTASKS': '1', 'SLURM_PROCID': '0'}, None),
    ({'SLURM_NTASKS': '4'}, None),  # a batch script outside srun
    ({'SLURM_NTASKS': '4', 'SLURM_PROCID': '2'}, {}),
    (
      {
        'SLURM_NTASKS': '2',
        'SLURM_PROCID': '1',
        'SLURM_STEP_TASKS_PER_NODE': '1(x2)',
        'SLURM_GPUS_ON_NODE': '4',
      },
      {'local_device_ids': [0, 1, 2, 3]},
    ),
    ({'TPU_WORKER_HOSTNAMES': 'localhost'}, None),
    ({'TPU_WORKER_HOSTNAMES': 'a,b,c'}, {}),
    (
      {'JAX_COORDINATOR_ADDRESS': 'a:1', 'JAX_NUM_PROCESSES': '3', 'JOB_COMPLETION_INDEX': '2'},
      {'coordinator_address': 'a:1', 'num_processes': 3, 'process_id': 2},
    ),
    (
      {
        'JAX_COORDINATOR_ADDRESS': 'a:1',
        'JAX_NUM_PROCESSES': '8',
        'JAX_PROCESS_ID': '5',
        'JOB_COMPLETION_INDEX': '2',
      },
      {'coordinator_address': 'a:1', 'num_processes': 8, 'process_id': 5},
    ),
  ],
)
def test_what_the_environment_says(environment, expected):
  assert distributed.arguments_from(environment) == expected


@pytest.mark.parametrize(
  ('environment', 'message'),
  [
    ({}, "JAX_NUM_PROCESSES must be a number too; it is ''"),
    ({'JAX_NUM_PROCESSES': 'two'}, "JAX_NUM_PROCESSES must be a number too; it is 'two'"),
    ({'JAX_NUM_PROCESSES': '2'}, 'JAX_PROCESS_ID must be a number too'),
    ({'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '2'}, r'JAX_PROCESS_ID=2 must be in 0\.\.1'),
  ],
)
def test_variables_that_are_incomplete(environment, message):
  with pytest.raises(UserError, match=message):
    distributed.arguments_from({'JAX_COORDINATOR_ADDRESS': 'a:1', **environment})


def test_others_that_do_not_come_are_said(tmp_path):
  environment = {
    **os.environ,
    'JAX_COORDINATOR_ADDRESS': f'localhost:{free_port()}',
    'JAX_NUM_PROCESSES': '2',
    'JAX_PROCESS_ID': '1',
  }
  command = [sys.executable, '-m', 'vaediff.main', *ARGUMENTS, f'--workdir={tmp_path / "run"}']
  result = subprocess.run(
    [*command, '--config.processes.join_timeout_seconds=1'],
    cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False,
  )  # fmt: skip
  assert result.returncode != 0
  assert 'did not find each other' in result.stderr or 'DEADLINE_EXCEEDED' in result.stderr, result.stderr
  assert not (tmp_path / 'run').exists()


def test_silence_ends_the_process():
  code = (
    'import time; from vaediff.machine import distributed as d\n'
    'dog = d.Watchdog(1.0, "stage vae")\n'
    'for step in range(4): time.sleep(0.4); dog.beat(f"step {step}")\n'
    'time.sleep(60)'
  )
  started = time.monotonic()
  result = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
  )
  assert result.returncode == distributed.LOST and time.monotonic() - started < 50
  assert 'stage vae: nothing has moved for 1 seconds since step 3' in result.stderr


def test_a_closed_watchdog_and_none_at_all_do_nothing():
  for seconds in (0.05, 0.0):
    dog = distributed.Watchdog(seconds, 'x')
    dog.close()
  time.sleep(0.3)
  assert np.isfinite(dog._silence)


def test_the_steps_that_many_processes_agree_on_are_those_of_all_stages(monkeypatch):
  """JAX names the step after the last one asked for: the next stage would reach that of the last too late."""
  asked = []
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  agreed = lambda step: asked.append(step) or False
  monkeypatch.setattr(distributed.multihost_utils, 'reached_preemption_sync_point', agreed)
  for _ in ('vae', 'refiner'):
    stage = distributed.Preemption()
    assert [stage.reached() for _ in range(3)] == [False] * 3
    stage.close()
  assert asked == list(range(asked[0], asked[0] + 6))
