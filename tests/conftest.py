"""Eight fake CPU devices, rank promotion an error, key reuse an error, a persistent compilation cache."""

import os
import pathlib
import tempfile

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    '--xla_cpu_experimental_ynn_fusion_type=-individual_convolution',
  ]
).strip()
CACHE = pathlib.Path(os.environ.get('VAEDIFF_TEST_CACHE', tempfile.gettempdir())) / 'vaediff_test_jax_cache'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(CACHE))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

from vaediff import sharding  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_debug_key_reuse', True)
flags.FLAGS.mark_as_parsed()


@pytest.fixture
def key():
  return jax.random.key(0)


@pytest.fixture
def one_device(monkeypatch):
  """A mesh of one device: eight compile slower and are tested where they matter."""
  make_mesh = sharding.make_mesh
  monkeypatch.setattr(sharding, 'make_mesh', lambda config: make_mesh(config, jax.devices()[:1]))
