"""A run of two stages that meets every fault at random moments, round after round.

At its end its parameters are bit-equal to those of a run that met none. A fault that cannot be mended by the
program ends with status 2 and a message that names it; what the message says is then done.
"""

import collections
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from vaediff import experiments
from vaediff.machine import distributed, sharding
from vaediff.run import checkpoint, loop
from vaediff.run import config as configs

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
NUM_STEPS = 24
STAGES = ('vae', 'refiner')
OVERRIDES = (
  *(
    f'--config.{stage}.train.{field}={value}'
    for stage in STAGES
    for field, value in (
      ('num_steps', NUM_STEPS), ('save_every_steps', 6), ('eval_every_steps', 12), ('grid_every_steps', 0)
    )
  ),
  '--config.refiner.diffusion.x0_vae_source=precomputed',
  '--config.refiner.train.best_measure=val/loss',
  '--config.refiner.train.best_every_steps=12',
  # few arrays: most of a round's time is tracing, and writing each of them
  '--config.vae.model.encoder_blocks=8d8,8t1',
  '--config.vae.model.encoder_channels=8:8,1:16',
  '--config.vae.model.decoder_blocks=1u8,1t8',
  '--config.vae.model.decoder_channels=8:8,1:16',
  '--config.refiner.model.channel_multipliers=(1,)',
  '--config.refiner.model.attention_resolutions=()',
  '--config.interpolate.num_pairs=0',
)  # fmt: skip


class Runner:
  """Starts runs in one folder; see `fault_runner`."""

  def __init__(self, folder):
    self.folder, self.workdir, self.log = folder, folder / 'run', folder / 'log.txt'
    flags = os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=1')
    self._server = subprocess.Popen(
      [sys.executable, str(ROOT / 'tests' / 'fault_runner.py')],
      cwd=ROOT,
      env={**os.environ, 'XLA_FLAGS': flags},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def _ask(self, **what):
    self._server.stdin.write(json.dumps(what) + '\n')
    self._server.stdin.flush()
    return int(self._server.stdout.readline())

  def start(self, workdir, *more, log=None, powerless=False):
    argv = [
      '--config=configs/digits.py:debug', f'--workdir={workdir}',
      f'--config.data.data_dir={self.folder / "data"}', *OVERRIDES, *more,
    ]  # fmt: skip
    return self._ask(argv=argv, log=str(log or self.log), powerless=powerless)

  def wait(self, process):
    return self._ask(wait=process)

  def finish(self, workdir, *more, powerless=False):
    """Returns exit status and what was printed of a run that is left alone."""
    self.log.write_text('')
    return self.wait(self.start(workdir, *more, powerless=powerless)), self.log.read_text()

  def close(self):
    self._server.stdin.close()
    self._server.wait(60)


@pytest.fixture
def runner(tmp_path):
  runner = Runner(tmp_path)
  yield runner
  runner.close()


# What is done to a run that is under way -----------------------------------------------------------


def progress(workdir):
  paths = [workdir / stage / 'metrics.jsonl' for stage in STAGES]
  return sum(path.read_text().count('\n') for path in paths if path.exists())


def until_a_moment(runner, workdir):
  """Starts the run and returns its process at a random moment, or once it has ended."""
  begun, more = progress(workdir), random.randrange(1, 30)
  runner.log.write_text('')
  process = runner.start(workdir)
  deadline = time.monotonic() + 60
  while progress(workdir) < begun + more and time.monotonic() < deadline:
    if 'seconds in all' in runner.log.read_text() or 'error: ' in runner.log.read_text():
      break
    time.sleep(0.002)
  time.sleep(random.random() * 0.3)
  return process


def interrupted(number, allowed):
  def fault(runner, workdir):
    process = until_a_moment(runner, workdir)
    os.kill(process, number)
    status = runner.wait(process)
    assert status in (0, *allowed), (status, runner.log.read_text())
    return f'status {status}'

  return fault


def paused(runner, workdir):
  process = until_a_moment(runner, workdir)
  os.kill(process, signal.SIGSTOP)
  time.sleep(0.5)
  os.kill(process, signal.SIGCONT)
  assert runner.wait(process) == 0, runner.log.read_text()
  return 'status 0'


def two_processes(runner, workdir):
  """The second one is refused, and names the first."""
  process = until_a_moment(runner, workdir)
  log = runner.folder / 'second.txt'
  log.write_text('')
  second = runner.wait(runner.start(workdir, log=log))
  first = runner.wait(process)
  assert first == 0, runner.log.read_text()
  if second:
    assert second == 2 and f'is in use by process {process} on host' in log.read_text(), log.read_text()
  return f'statuses {first} and {second}'


def full_disk(runner, workdir):
  """The disk is full for a while; only where the run lies on a small one."""
  process = until_a_moment(runner, workdir)
  filler = workdir.parent / 'filler'
  with open(filler, 'wb') as file:
    try:
      while True:
        file.write(bytes(2**16))
        file.flush()
    except OSError:
      pass
  status = runner.wait(process)
  filler.unlink()
  text = runner.log.read_text()
  assert status in (0, 2), text
  if status == 2:
    assert 'No space left on device' in text and 'Traceback' not in text, text
  return f'status {status}'


# What is done to the files of a run that is not ----------------------------------------------------


def kinds_of_files(workdir):
  """Returns the files of a run that are read again, by kind: checkpoints have hundreds, summaries are one."""
  kinds = collections.defaultdict(list)
  for path in sorted(workdir.rglob('*')):
    read_again = path.suffix != '.png' and 'tensorboard' not in path.parts and path.name != '.lock'
    if path.is_file() and path.stat().st_size and read_again:
      kind = re.sub(r'[0-9a-f]{16}|\d+', 'N', path.relative_to(workdir).as_posix())
      kinds['/'.join(part for part in kind.split('/') if part != 'd')].append(path)
  return kinds


def a_file(workdir):
  """Returns a random file of the run, of a random kind."""
  kinds = kinds_of_files(workdir)
  return random.choice(kinds[random.choice(sorted(kinds))]) if kinds else None


def truncated(runner, workdir):
  path = a_file(workdir)
  if path is None:
    return 'nothing there'
  path.write_bytes(path.read_bytes()[: random.randrange(path.stat().st_size)])
  return f'truncated {path.relative_to(workdir)}'


def flipped(runner, workdir):
  path = a_file(workdir)
  if path is None:
    return 'nothing there'
  content = bytearray(path.read_bytes())
  content[random.randrange(len(content))] ^= 1 << random.randrange(8)
  path.write_bytes(content)
  return f'flipped a bit of {path.relative_to(workdir)}'


def removed(runner, workdir):
  path = a_file(workdir)
  if path is None:
    return 'nothing there'
  path.unlink()
  return f'removed {path.relative_to(workdir)}'


def unreadable(runner, workdir):
  """A file, or the whole folder, may not be read: that is no damage, and nothing is moved away."""
  path = random.choice((a_file(workdir), workdir))
  if path is None or not path.exists():
    return 'nothing there'
  before, content = path.stat().st_mode, path.read_bytes() if path.is_file() else b''
  path.chmod(0o555 if path.is_dir() else 0)
  status, text = runner.finish(workdir, powerless=True)
  if status == 2:
    assert 'Permission denied' in text and 'Traceback' not in text and 'set aside' not in text, text
    assert path.is_dir() or path.read_bytes() == content
  else:
    assert status == 0 and 'set aside' not in text, text  # it was not read, as an older checkpoint
  if path.exists():
    path.chmod(before)
  return f'status {status}'


def moved(runner, workdir):
  """The run is finished under another name, and comes back."""
  elsewhere = workdir.with_name('moved')
  if not workdir.exists():
    return 'nothing there'
  workdir.rename(elsewhere)
  status, text = runner.finish(elsewhere)
  elsewhere.rename(workdir)
  assert status in (0, 2), text
  return f'status {status}'


def trained_anew(runner, workdir):
  """The VAE is removed and trained with another rate: a refiner that was begun with it is refused."""
  begun = checkpoint.latest_step(workdir / 'refiner') is not None
  kept = workdir.with_name('vae_kept')
  if not (workdir / 'vae').exists():
    return 'nothing there'
  shutil.move(workdir / 'vae', kept)
  status, text = runner.finish(workdir, '--config.vae.optim.learning_rate=1e-4')
  if begun:
    assert status == 2 and "was made of the network 'vae'" in text, text
  else:
    assert status == 0, text
    shutil.rmtree(workdir / 'refiner')
  shutil.rmtree(workdir / 'vae')
  shutil.move(kept, workdir / 'vae')
  return f'status {status}'


FAULTS = {
  'kill -9': interrupted(signal.SIGKILL, (-signal.SIGKILL,)),
  'SIGTERM': interrupted(signal.SIGTERM, (distributed.PREEMPTED, -signal.SIGTERM)),
  'Ctrl-C': interrupted(signal.SIGINT, (distributed.STOPPED,)),
  'stop, continue': paused,
  'two processes': two_processes,
  'full disk': full_disk,
  'truncated file': truncated,
  'flipped bit': flipped,
  'removed file': removed,
  'permission taken away': unreadable,
  'moved folder': moved,
  'VAE trained anew': trained_anew,
}


OF_FILES = (
  'truncated file', 'flipped bit', 'removed file', 'permission taken away', 'moved folder', 'VAE trained anew'
)  # fmt: skip


def mended(text, workdir):
  """Does what a refusal says, as a user would: removes the file or moves the folder that it names."""
  place = re.escape(str(workdir))
  named = re.search(rf'remove the folder ({place}/\S*)', text) or re.search(rf'error: .*?({place}\S*)', text)
  assert named and 'Traceback' not in text, text
  path = pathlib.Path(named[1].rstrip(':,;.'))
  assert path.exists() and path != workdir, text
  if 'remove the folder' in text:
    shutil.rmtree(path if path.is_dir() else path.parent)
  elif path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink()
  return path.relative_to(workdir)


def finished(runner, workdir):
  """Runs until all is done, doing what refusals say; returns how often that was."""
  for times in range(6):
    status, text = runner.finish(workdir)
    if status == 0:
      return times
    assert status == 2, text
    print(f'    refused and mended: {mended(text, workdir)}: {text.strip().splitlines()[-1][:160]}')
  raise AssertionError(text)


def states(workdir):
  config = configs.read(workdir)
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  found = {}
  for stage in STAGES:
    abstract = loop.abstract_state(experiments.build(config, stage), mesh)
    state, meta = checkpoint.Checkpointer(workdir / stage, 9).restore(abstract)
    assert meta['data_position'] == NUM_STEPS
    found[stage] = jax.tree.map(np.asarray, state)
  return found


def rows(workdir, stage):
  timed = ('images_per_second', 'waiting')
  lines = [json.loads(line) for line in (workdir / stage / 'metrics.jsonl').read_text().splitlines()]
  return [{name: x for name, x in line.items() if not name.startswith(timed)} for line in lines]


def same(workdir, undisturbed, damaged_log):
  jax.tree.map(np.testing.assert_array_equal, states(workdir), states(undisturbed))
  for name in ('samples.png', 'reconstructions.png', 'interpolation.png'):
    assert (workdir / name).read_bytes() == (undisturbed / name).read_bytes(), name
  for stage in () if damaged_log else STAGES:
    assert rows(workdir, stage) == rows(undisturbed, stage)


def rounds(runner, count, seed):
  """Meets `count` faults; whenever the run is complete it is compared, and another one begins."""
  random.seed(seed)
  undisturbed = runner.folder / 'undisturbed'
  status, text = runner.finish(undisturbed)
  assert status == 0, text
  turns = -(-count // len(FAULTS))
  names = [name for _ in range(turns) for name in random.sample(sorted(FAULTS), len(FAULTS))]
  table, damaged_log = collections.defaultdict(collections.Counter), False
  for number, name in enumerate(names[:count]):
    if name in OF_FILES and not runner.workdir.exists():  # a complete run, or one that was killed
      if random.random() < 0.5:
        shutil.copytree(undisturbed, runner.workdir)
      else:
        FAULTS['kill -9'](runner, runner.workdir)
    outcome = FAULTS[name](runner, runner.workdir)
    damaged_log |= 'metrics.jsonl' in outcome
    print(f'round {number}, {name}: {outcome}; {progress(runner.workdir)} lines')
    complete = all((runner.workdir / stage / loop.SUMMARY).exists() for stage in STAGES)
    mend = name in ('truncated file', 'flipped bit', 'removed file') or complete or number == count - 1
    refusals = finished(runner, runner.workdir) if mend else 0
    table[name][re.sub(r' .*/', ' ', outcome) if 'status' in outcome else 'files'] += 1
    table[name]['refused and mended'] += refusals
    if mend:
      same(runner.workdir, undisturbed, damaged_log)
      shutil.rmtree(runner.workdir)
      damaged_log = False
  for name, outcomes in sorted(table.items()):
    print(f'{name:22}' + ', '.join(f'{key}: {value}' for key, value in outcomes.items() if value))


def disturbed(runner, small_disk, count):
  runner.workdir = small_disk('24m') / 'run'
  seed = int(os.environ.get('VAEDIFF_FAULT_SEED', random.randrange(10**6)))
  print(f'VAEDIFF_FAULT_SEED={seed}')
  rounds(runner, count, seed)


@pytest.mark.slow
def test_five_rounds_of_faults(runner, small_disk):
  disturbed(runner, small_disk, 5)


@pytest.mark.slow
def test_forty_rounds_of_faults(runner, small_disk):
  disturbed(runner, small_disk, 40)


@pytest.mark.long
def test_a_hundred_rounds_of_faults(runner, small_disk):
  disturbed(runner, small_disk, 100)


@pytest.mark.slow
@pytest.mark.parametrize('fault', ('removed', 'cut in half', 'empty'))
def test_every_kind_of_file(runner, fault):
  """One file of every kind that a complete run has is damaged, one run for each."""
  undisturbed, workdir = runner.folder / 'undisturbed', runner.folder / 'run'
  status, text = runner.finish(undisturbed)
  assert status == 0, text
  kinds = kinds_of_files(undisturbed)
  assert len(kinds) > 20
  for kind, paths in sorted(kinds.items()):
    path = workdir / paths[-1].relative_to(undisturbed)
    shutil.copytree(undisturbed, workdir)
    if fault == 'removed':
      path.unlink()
    else:
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if fault == 'cut in half' else 0])
    print(f'{fault}: {path.relative_to(workdir)}')
    finished(runner, workdir)
    same(workdir, undisturbed, 'metrics.jsonl' in kind)
    shutil.rmtree(workdir)
