"""The environment that the process starts in: looked at once, before JAX and the C library read it.

Imports no JAX until all is looked at; `main` calls `start` first. The variables that speak of other processes
of a job are read by `vaediff.machine.distributed`.
"""

import _thread
import atexit
import importlib.metadata
import importlib.util
import mmap
import os
import pathlib
import platform
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from vaediff.errors import UserError
from vaediff.storage import places

EIGEN_CONVOLUTIONS = '--xla_cpu_experimental_ynn_fusion_type=-individual_convolution'
"""Sends CPU convolutions to Eigen: about 1.4 times faster for U-Nets than the default on jaxlib 0.10."""
NO_FUSION_AUTOTUNER = '--xla_gpu_experimental_enable_fusion_autotuner=false'
"""XLA compiles each fusion of a GPU program twice, and times both: minutes for a U-Net."""
FLAGS = {'ynn_fusion_type': EIGEN_CONVOLUTIONS, 'enable_fusion_autotuner': NO_FUSION_AUTOTUNER}
"""By a part of its name, each flag that is set unless the user has set it."""
JAXLIB_WITH_FLAG = ('0.10.', '0.11.')
"""XLA aborts on a flag it does not know, so they are set only where they were tried."""
HUGE_PAGES = 'glibc.malloc.hugetlb=1'
"""Large blocks of memory in pages of 2 MiB instead of 4 KiB: train steps on CPUs take half to four fifths.

XLA takes its buffers anew at every step, gigabytes of them, and the kernel clears and maps them page by page.
"""
HUGE_PAGES_POLICY = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')
GLIBC_WITH_HUGE_PAGES = (2, 35)
TRUE, FALSE = ('y', 'yes', 't', 'true', 'on', '1'), ('n', 'no', 'f', 'false', 'off', '0')
"""Words for a switch that JAX reads, in any case."""
OFF = frozenset(FALSE)
ON = frozenset(TRUE)
RESULTS: Mapping[str, frozenset[str]] = {
  'JAX_ENABLE_X64': OFF,
  'JAX_DEFAULT_DTYPE_BITS': frozenset(('64',)),
  'JAX_NUMPY_DTYPE_PROMOTION': frozenset(('standard',)),
  'JAX_DEFAULT_MATMUL_PRECISION': frozenset(('default',)),
  'JAX_DEFAULT_PRNG_IMPL': frozenset(('threefry2x32',)),
  'JAX_ENABLE_CUSTOM_PRNG': OFF,
  'JAX_LEGACY_PRNG_KEY': frozenset(('allow',)),
  'JAX_THREEFRY_PARTITIONABLE': ON,
  'JAX_RANDOM_SEED_OFFSET': frozenset(('0',)),
  'JAX_HIGH_DYNAMIC_RANGE_GUMBEL': OFF,
  'JAX_SOFTMAX_CUSTOM_JVP': OFF,
  'JAX_DISABLE_JIT': OFF,
  'JAX_NO_TRACING': OFF,
  'JAX_NO_EXECUTION': OFF,
}
"""Variables that would change what a run computes, without a word in it, and the values that do not."""
SWITCHES = (
  *(name for name, kept in RESULTS.items() if kept in (OFF, ON)),
  'JAX_DEBUG_NANS',
  'JAX_DEBUG_INFS',
  'JAX_LOG_COMPILES',
  'JAX_DISABLE_MOST_OPTIMIZATIONS',
  'JAX_ENABLE_COMPILATION_CACHE',
  'JAX_DEBUG_KEY_REUSE',
  'JAX_ENABLE_CHECKS',
)
"""Variables that JAX reads as a switch when it is imported."""


def start(module: str) -> None:
  """Does all that comes before JAX is imported; ends the program with a message and status 2 where it must.

  Args:
    module: started as `python -m <module>`.
  """
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, interrupted)  # imports take seconds, and a trace of them says nothing
    # Registered first, so the last to run: Python then takes its handlers away, and Ctrl-C would still end
    # with a signal what has ended well.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
  open_streams()
  try:
    restart_with_huge_pages(module)
    set_environment()
    _import_jax()
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    raise SystemExit(2) from None


def open_streams() -> None:
  """Gives a process that was started without output or errors a place that takes them and keeps nothing.

  Otherwise the next file that is opened would be taken for the output.
  """
  for number, name in ((1, 'stdout'), (2, 'stderr')):
    if getattr(sys, name) is None:
      nowhere = os.open(os.devnull, os.O_WRONLY)
      if nowhere != number:
        os.dup2(nowhere, number)
      setattr(sys, name, open(number, 'w', encoding='utf-8', closefd=False))  # noqa: SIM115


def interrupted(number: int, frame: object) -> NoReturn:
  """Ends the process, during the imports and when `main` has ended: says so."""
  del number, frame
  os.write(2, b'interrupted\n')
  os._exit(130)


def interrupting_again(before: Callable[[Any], None]) -> Callable[[Any], None]:
  """Returns a `sys.unraisablehook` by which no interruption is lost: it comes again a moment later.

  While garbage is collected or an object ends, Python can raise nothing: it would print a trace and go on.

  Args:
    before: the hook that everything else is for.
  """

  def hook(unraisable: Any) -> None:
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
      before(unraisable)
      return
    again = threading.Timer(0.05, _thread.interrupt_main)  # by then Python is out of what cannot raise
    again.daemon = True
    again.start()

  return hook


def set_environment() -> None:
  """Sets the flags of `FLAGS` and the persistent compilation cache, unless the user has set them.

  Raises:
    UserError: for variables that cannot be, or that would change results; where JAX is not installed, or no
      place for the compilation cache is known.
  """
  if 'jax' in sys.modules:
    raise RuntimeError('set_environment must run before jax is imported')
  try:
    version = importlib.metadata.version('jaxlib')
  except importlib.metadata.PackageNotFoundError as error:
    raise UserError(
      f'jaxlib is not installed for {sys.executable}. In the folder of the project: pip install -e .'
    ) from error
  check_environment(os.environ)
  flags = words_of(os.environ.get('XLA_FLAGS', ''))
  missing = [flag for part, flag in FLAGS.items() if part not in flags]
  if missing and version.startswith(JAXLIB_WITH_FLAG):
    os.environ['XLA_FLAGS'] = ' '.join([flags, *missing]).strip()
  if not os.environ.get('JAX_COMPILATION_CACHE_DIR', ''):
    cache = places.cache('JAX_COMPILATION_CACHE_DIR (a folder that compiled programs are kept in)')
    os.environ['JAX_COMPILATION_CACHE_DIR'] = str(cache / 'vaediff' / 'xla')
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.5')
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')


def check_environment(environment: Mapping[str, str]) -> None:
  """Raises UserError for the first variable that cannot be, or would change results: names it and what to do.

  Args:
    environment: of the process.
  """
  for name in SWITCHES:
    value = environment.get(name, '').lower()
    if value and value not in (*TRUE, *FALSE):
      raise UserError(f'the environment variable {name} is {environment[name]!r}; valid: 0, 1. Unset it')
  for name, kept in RESULTS.items():
    value = environment.get(name, '')
    if value and value.lower() not in kept:
      raise UserError(
        f'the environment variable {name} is {value!r}, which changes what every run computes; unset it. '
        'The type that networks compute in is config.<stage>.model.dtype'
      )
  for name in ('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', 'JAX_COMPILATION_CACHE_MAX_SIZE'):
    value = environment.get(name, '')
    try:
      float(value or 0)
    except ValueError as error:
      raise UserError(
        f'the environment variable {name} is {value!r}; a number is needed. Unset it'
      ) from error
  check_xla_flags(environment.get('XLA_FLAGS', ''))


def words_of(flags: str) -> str:
  """Returns the flags that XLA_FLAGS holds, or that the file holds whose path it is.

  Raises:
    UserError: for what is neither.
  """
  if not flags.strip() or flags.lstrip().startswith('-'):
    return flags
  path = pathlib.Path(flags.strip())
  if not path.is_file():
    raise UserError(
      f'the environment variable XLA_FLAGS is {flags!r}; write --xla_<name>=<value>, or the path of a '
      'file of such'
    )
  return ' '.join(path.read_text(errors='replace').split())


def check_xla_flags(flags: str) -> None:
  """Raises UserError for what is no flag of this XLA, which would end the program without a message of ours.

  Args:
    flags: words `--xla_<name>` or `--xla_<name>=<value>`, or the path of a file of such words.
  """
  try:
    words = shlex.split(words_of(flags))
  except ValueError as error:
    raise UserError(
      f'the environment variable XLA_FLAGS is {flags!r}, which cannot be read: {error}'
    ) from error
  for word in words:
    match = re.fullmatch(r'--(xla_[A-Za-z0-9_]+)(=.*)?', word)
    if not match:
      raise UserError(
        f'the environment variable XLA_FLAGS holds {word!r}; write --xla_<name>=<value>, with blanks between'
      )
    if not _xla_knows(match.group(1)):
      raise UserError(
        f'the environment variable XLA_FLAGS holds {word!r}, which this XLA does not know; remove it'
      )
    _check_xla_value(word, (match.group(2) or '')[1:])


def _check_xla_value(word: str, value: str) -> None:
  if word.startswith('--xla_force_host_platform_device_count') and not re.fullmatch(r'0*[1-9]\d{0,4}', value):
    raise UserError(f'the environment variable XLA_FLAGS holds {word!r}; a number of devices >= 1 is needed')


def _xla_knows(name: str) -> bool:
  """Returns whether XLA's library holds the name of the flag; true where the library is not found."""
  found = importlib.util.find_spec('jaxlib')
  folders = found.submodule_search_locations if found else None
  files = [path for folder in folders or () for path in pathlib.Path(folder).glob('*.so')]
  if not files:
    return True
  library = max(files, key=lambda path: path.stat().st_size)
  with open(library, 'rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
    return re.search(re.escape(name.encode()) + rb'(?![A-Za-z0-9_])', content) is not None


def _import_jax() -> None:
  """Imports JAX, which reads its variables.

  Raises:
    UserError: when it cannot be: says what it says.
  """
  try:
    import jax  # noqa: F401
  except ValueError as error:  # of a variable; what is not installed stays an ImportError
    set_here = ', '.join(sorted(name for name in os.environ if name.startswith('JAX_')))
    raise UserError(
      f'JAX cannot start: {error}. Environment variables that it reads here: {set_here}'
    ) from error


def check_devices() -> None:
  """Raises UserError where JAX has no device to run on; starts JAX, after `distributed.join`."""
  import jax

  try:
    jax.devices()
  except RuntimeError as error:
    platforms = os.environ.get('JAX_PLATFORMS', '')
    if platforms:
      what = f'the environment variable JAX_PLATFORMS is {platforms!r}, and no such device can be used here'
    else:
      what = 'JAX finds no device that can be used'
    raise UserError(
      f'{what}: {str(error).strip().splitlines()[0]}. Unset it, or JAX_PLATFORMS=cpu for the processor alone'
    ) from error


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
    if sys.stdout:
      sys.stdout.flush()
    os.environ['GLIBC_TUNABLES'] = wanted
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
