"""One run that meets every fault at random moments ends with the parameters of one that met none."""

import contextlib
import importlib
import json
import pathlib
import random
import shutil
import signal
import sys
import time

import jax
import numpy as np
import pytest

from vaediff import experiments
from vaediff.machine import distributed, sharding
from vaediff.modes import train
from vaediff.run import checkpoint, loop
from vaediff.run import config as configs

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests' / 'machine')]
processes = importlib.import_module('test_distributed')

ROUNDS = 10
FAULTS = ('kill one', 'kill all', 'truncate', 'fill the disk', 'terminate')
NUM_STEPS = 400


def arguments(folder, workdir):
  return (
    *processes.settings(workdir, NUM_STEPS, save=5),
    f'--config.data.data_dir={folder / "data"}',
    '--config.vae.train.eval_every_steps=100',
    '--config.processes.heartbeat_timeout_seconds=10',
    '--config.processes.silence_timeout_seconds=60.0',
  )


def progress(workdir):
  path = workdir / 'vae' / 'metrics.jsonl'
  return path.read_text().count('\n') if path.exists() else 0


def parameters(workdir):
  config = configs.read(workdir)
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  experiment = experiments.build(config, 'vae')
  state, meta = checkpoint.Checkpointer(workdir / 'vae', 9).restore(loop.abstract_state(experiment, mesh))
  assert meta['data_position'] == NUM_STEPS
  return jax.tree.map(np.asarray, state.networks['vae'].params)


def run_until_fault(folder, workdir, fault):
  """Starts both processes, waits for a random moment, does the fault; returns the statuses."""
  begun, more = progress(workdir), random.randrange(2, 40)
  both = processes.start(workdir, 2, *arguments(folder, workdir), devices=1)
  deadline = time.monotonic() + 240
  while progress(workdir) < begun + more and time.monotonic() < deadline:
    if all(process.poll() is not None for process in both):
      break
    time.sleep(0.002)
  filler = workdir.parent / 'filler'
  if fault == 'kill one':
    both[random.randrange(2)].kill()
  elif fault == 'kill all' or fault == 'truncate':
    for process in both:
      process.kill()
  elif fault == 'terminate':
    both[random.randrange(2)].send_signal(signal.SIGTERM)
  else:
    with contextlib.suppress(OSError):  # the processes write too: it is full before all bytes are written
      filler.write_bytes(bytes(shutil.disk_usage(workdir.parent).free))
  statuses = processes.wait(both, 200)
  filler.unlink(missing_ok=True)
  if fault == 'truncate':
    step = checkpoint.latest_step(workdir / 'vae')
    files = [p for p in (workdir / 'vae' / checkpoint.FOLDER / str(step)).rglob('*') if p.is_file()]
    files = sorted(path for path in files if 'state' in path.parts and path.stat().st_size > 100)
    chosen = random.choice(files)
    chosen.write_bytes(chosen.read_bytes()[: chosen.stat().st_size // 2])
  return statuses


@pytest.mark.long
def test_ten_faults(tmp_path, small_disk):
  disk = small_disk('40m')
  seed = random.randrange(10**6)
  random.seed(seed)
  undisturbed, workdir = tmp_path / 'undisturbed', disk / 'run'
  statuses = processes.wait(processes.start(undisturbed, 2, *arguments(tmp_path, undisturbed), devices=1))
  assert statuses == [0, 0], processes.outputs(undisturbed)
  faults = [FAULTS[k % len(FAULTS)] for k in range(ROUNDS)]
  random.shuffle(faults)
  for number, fault in enumerate(faults):
    statuses = run_until_fault(tmp_path, workdir, fault)
    print(f'seed {seed}, round {number}, {fault}: statuses {statuses}, {progress(workdir)} lines')
    if fault == 'terminate' and statuses != [0, 0]:
      assert statuses == [distributed.PREEMPTED] * 2, processes.outputs(workdir)
  statuses = processes.wait(processes.start(workdir, 2, *arguments(tmp_path, workdir), devices=1))
  assert statuses == [0, 0], processes.outputs(workdir)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), parameters(workdir), parameters(undisturbed)
  )
  processes.same(processes.losses(workdir), processes.losses(undisturbed))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(tmp_path, one_device, capsys):
  config = importlib.import_module('configs.cifar10').get_config('debug')
  config.data.data_dir = str(tmp_path / 'data')
  workdir = tmp_path / 'run'
  train.run_stages(config, workdir, ('vae',))
  before = (workdir / 'vae' / 'metrics.jsonl').read_text()
  latest = workdir / 'vae' / checkpoint.FOLDER / '4'
  chosen = max(
    (path for path in (latest / 'state').rglob('*') if path.is_file()), key=lambda p: p.stat().st_size
  )
  chosen.write_bytes(chosen.read_bytes()[:50])
  train.run_stages(config, workdir, tuple(config.stages))  # the refiner reads the VAE, which is complete
  said = capsys.readouterr().out
  assert f'the checkpoint {latest} cannot be read' in said and 'resuming at step 2' in said
  assert (workdir / 'vae' / checkpoint.DAMAGED / '4').is_dir() and latest.is_dir()

  def values(text):
    rows = [json.loads(line) for line in text.splitlines()]
    return [(row['step'], row['loss']) for row in rows if 'loss' in row]

  assert values((workdir / 'vae' / 'metrics.jsonl').read_text()) == values(before)
