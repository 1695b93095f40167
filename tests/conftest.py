"""Eight fake CPU devices, rank promotion an error, key reuse an error; what the tests of a session share.

Almost all time goes into compiling: XLA leaves most optimizations out, and programs are kept on disk; the
processes that tests start inherit both. `JAX_DISABLE_MOST_OPTIMIZATIONS=0 pytest` tests with optimizations.
"""

import fcntl
import importlib
import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import types

# before anything of the package: its type checks import jax, which reads these
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
CACHE = pathlib.Path(os.environ.get('VAEDIFF_TEST_CACHE', tempfile.gettempdir())) / 'vaediff_test_jax_cache'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(CACHE))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')

from vaediff.machine import runtime  # noqa: E402

QUICK = os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] == '1'
JAXLIB = importlib.metadata.version('jaxlib')
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    *([runtime.EIGEN_CONVOLUTIONS] if JAXLIB.startswith(runtime.JAXLIB_WITH_FLAG) else []),
    # compiles in half the time; later versions do not know it, and abort on what they do not know
    *(['--xla_cpu_use_fusion_emitters=false'] if QUICK and JAXLIB.startswith('0.10.') else []),
  ]
).strip()

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

from vaediff.machine import sharding  # noqa: E402  (what is imported here is not type-checked: no more than this)

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # the folders of configs, and of what tests share

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_debug_key_reuse', True)
flags.FLAGS.mark_as_parsed()
BEGUN = time.monotonic()


def pytest_addoption(parser):
  parser.addoption('--seconds', type=float, help='tests that would start later than this are skipped')


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
  seconds = item.config.getoption('--seconds')
  if seconds is not None and time.monotonic() - BEGUN > seconds:
    pytest.skip('no time is left of --seconds')


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
  """Of the quick tests one worker runs those that read the run of `trained`: none waits until it is made."""
  for item in items:
    elsewhere = any(item.get_closest_marker(name) for name in ('slow', 'long', 'xdist_group'))
    if not elsewhere and reads_trained(item):
      item.add_marker(pytest.mark.xdist_group('trained'))


def reads_trained(item):
  """Whether the fixture `trained` of an item is the one below: others have that name too."""
  found = getattr(getattr(item, '_fixtureinfo', None), 'name2fixturedefs', {}).get('trained', ())
  return bool(found) and found[-1].func.__code__.co_filename == __file__


@pytest.fixture
def key():
  return jax.random.key(0)


MAKE_MESH = sharding.make_mesh


def make_one_device(patch):
  patch.setattr(sharding, 'make_mesh', lambda config: MAKE_MESH(config, jax.devices()[:1]))


@pytest.fixture
def one_device(monkeypatch):
  """A mesh of one device: eight compile slower and are tested where they matter."""
  make_one_device(monkeypatch)


@pytest.fixture
def small_disk(tmp_path):
  """Returns small_disk(size) -> the folder of a file system of so many bytes, as '24m'; needs root."""
  mounted = []

  def small_disk(size):
    folder = tmp_path / f'disk{len(mounted)}'
    folder.mkdir()
    command = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(folder)]
    result = subprocess.run(command, capture_output=True, check=False)
    if result.returncode:
      pytest.skip('mounting a small file system needs root: ' + result.stderr.decode().strip())
    mounted.append(folder)
    return folder

  yield small_disk
  for folder in mounted:
    subprocess.run(['umount', '-l', str(folder)], check=True)


@pytest.fixture(scope='session')
def once(tmp_path_factory):
  """Returns once(name, make) -> a folder that one worker of the session has filled by make(folder)."""
  root = tmp_path_factory.getbasetemp()
  root = (root.parent if 'PYTEST_XDIST_WORKER' in os.environ else root) / 'shared'

  def once(name, make):
    folder, done = root / name, root / f'{name}.done'
    folder.mkdir(parents=True, exist_ok=True)
    with open(root / f'{name}.lock', 'w') as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      if not done.exists():
        make(folder)
        done.touch()
    return folder

  return once


@pytest.fixture(scope='session')
def trained(once):
  """Returns trained(config, **changes) -> its debug run, made once by one device; change only copies of it.

  `trained('digits').run` is the workdir, `.data` the data folder; `.copy(folder)` copies the workdir.
  """

  def trained(name, **changes):
    from vaediff.modes import train

    def make(folder):
      config = importlib.import_module(f'configs.{name}').get_config('debug')
      config.data.data_dir = str(folder / 'data')
      config.update_from_flattened_dict(changes)
      with pytest.MonkeyPatch.context() as patch:
        make_one_device(patch)
        train.run_stages(config, folder / 'run', tuple(config.stages))

    folder = once('-'.join([name, *(f'{key}={value}' for key, value in changes.items())]), make)
    copy = lambda target: pathlib.Path(shutil.copytree(folder / 'run', target))
    return types.SimpleNamespace(run=folder / 'run', data=folder / 'data', copy=copy)

  return trained
