"""Settings that JAX reads when it is imported. Imports no JAX; `main` calls it first."""

import importlib.metadata
import os
import pathlib
import sys

EIGEN_CONVOLUTIONS = '--xla_cpu_experimental_ynn_fusion_type=-individual_convolution'
"""Sends CPU convolutions to Eigen: about 1.4 times faster for U-Nets than the default on jaxlib 0.10."""
JAXLIB_WITH_FLAG = ('0.10.', '0.11.')
"""XLA aborts on a flag it does not know, so it is set only where it was tried."""


def set_environment() -> None:
  """Sets the CPU convolution flag and the persistent compilation cache, unless the user has set them."""
  if 'jax' in sys.modules:
    raise RuntimeError('set_environment must run before jax is imported')
  flags = os.environ.get('XLA_FLAGS', '')
  version = importlib.metadata.version('jaxlib')
  if 'ynn_fusion_type' not in flags and version.startswith(JAXLIB_WITH_FLAG):
    os.environ['XLA_FLAGS'] = f'{flags} {EIGEN_CONVOLUTIONS}'.strip()
  cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME', pathlib.Path.home() / '.cache')) / 'vaediff' / 'xla'
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(cache))
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.5')
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
