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

import numpy as np
import pytest

from vaediff import distributed
from vaediff.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
ARGUMENTS = ('--config=configs/cifar10.py:debug', '--stages=vae')
TIMEOUT = 600


def free_port():
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    return probe.getsockname()[1]


def start(workdir, count, *overrides, devices=2):
  """Starts `count` processes with `devices` fake devices each; their output goes to files."""
  port, processes = free_port(), []
  workdir.mkdir(parents=True, exist_ok=True)
  for index in range(count):
    environment = {
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
    }
    if count > 1:
      environment |= {
        'JAX_COORDINATOR_ADDRESS': f'localhost:{port}',
        'JAX_NUM_PROCESSES': str(count),
        'JAX_PROCESS_ID': str(index),
      }
    output = open(workdir / f'output-{count}-{index}.txt', 'w')  # noqa: SIM115
    command = [sys.executable, '-m', 'vaediff.main', *ARGUMENTS, f'--workdir={workdir}', *overrides]
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
  return '\n'.join(path.read_text()[-3000:] for path in sorted(workdir.glob('output-*.txt')))


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


def losses(workdir):
  rows = [json.loads(line) for line in (workdir / 'vae' / 'metrics.jsonl').read_text().splitlines()]
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


# One process by itself ------------------------------------------------------------------------------


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
    'import time; from vaediff import distributed as d\n'
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
