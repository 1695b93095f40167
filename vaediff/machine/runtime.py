"""Settings that JAX and the C library read when they start. Imports no JAX; `main` calls it first."""

import importlib.metadata
import os
import pathlib
import platform
import sys

EIGEN_CONVOLUTIONS = '--xla_cpu_experimental_ynn_fusion_type=-individual_convolution'
"""Sends CPU convolutions to Eigen: about 1.4 times faster for U-Nets than the default on jaxlib 0.10."""
JAXLIB_WITH_FLAG = ('0.10.', '0.11.')
"""XLA aborts on a flag it does not know, so it is set only where it was tried."""
HUGE_PAGES = 'glibc.malloc.hugetlb=1'
"""Large blocks of memory in pages of 2 MiB instead of 4 KiB: train steps on CPUs take half to four fifths.

XLA takes its buffers anew at every step, gigabytes of them, and the kernel clears and maps them page by page.
"""
HUGE_PAGES_POLICY = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')
GLIBC_WITH_HUGE_PAGES = (2, 35)


def set_environment() -> None:
  """Sets the CPU convolution flag and the persistent compilation cache, unless the user has set them.

  Ends the program with a message and status 2 where JAX is not installed.
  """
  if 'jax' in sys.modules:
    raise RuntimeError('set_environment must run before jax is imported')
  flags = os.environ.get('XLA_FLAGS', '')
  try:
    version = importlib.metadata.version('jaxlib')
  except importlib.metadata.PackageNotFoundError:
    print(
      f'error: jaxlib is not installed for {sys.executable}. In the folder of the project: pip install -e .',
      file=sys.stderr,
    )
    raise SystemExit(2) from None
  if 'ynn_fusion_type' not in flags and version.startswith(JAXLIB_WITH_FLAG):
    os.environ['XLA_FLAGS'] = f'{flags} {EIGEN_CONVOLUTIONS}'.strip()
  cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME', pathlib.Path.home() / '.cache')) / 'vaediff' / 'xla'
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(cache))
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.5')
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')


def tunables() -> str:
  """Returns what GLIBC_TUNABLES is to be: with huge pages, where Linux gives them to those who ask.

  What the user has set about them stays: GLIBC_TUNABLES=glibc.malloc.hugetlb=0 turns them off.
  """
  known = os.environ.get('GLIBC_TUNABLES', '')
  library, version = platform.libc_ver()
  if library != 'glibc' or tuple(map(int, version.split('.')[:2])) < GLIBC_WITH_HUGE_PAGES:
    return known
  asked_for = HUGE_PAGES_POLICY.exists() and '[madvise]' in HUGE_PAGES_POLICY.read_text()
  if 'glibc.malloc.hugetlb' in known or not asked_for:
    return known
  return ':'.join(filter(None, (known, HUGE_PAGES)))


def restart_with_huge_pages(module: str) -> None:
  """Replaces this process by itself with `tunables`, which the C library reads only when it starts.

  Does nothing where they are set already, or where another program, such as a notebook, runs `module`.
  """
  wanted = tunables()
  started_as_module = ('-m', module) in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
  if started_as_module and wanted != os.environ.get('GLIBC_TUNABLES', ''):
    sys.stdout.flush()
    os.environ['GLIBC_TUNABLES'] = wanted
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
