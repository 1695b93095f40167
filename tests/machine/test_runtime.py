"""What is set before JAX and the C library start, unless the user has set it."""

import json
import os
import pathlib
import subprocess
import sys
import threading
import types

import pytest

from vaediff.machine import runtime


def environment(**given):
  code = 'import json, os; from vaediff.machine import runtime; runtime.set_environment()'
  code += '; print(json.dumps(dict(os.environ)))'
  keep = {name: value for name, value in os.environ.items() if not name.startswith(('XLA', 'JAX'))}
  result = subprocess.run(
    [sys.executable, '-c', code], env={**keep, **given}, capture_output=True, text=True, check=True
  )
  return json.loads(result.stdout)


@pytest.mark.parametrize('flag', runtime.FLAGS.values())
def test_flags_of_xla_are_set_unless_the_user_chose(flag):
  assert flag in environment()['XLA_FLAGS'].split()
  own = f'{flag.partition("=")[0]}=x'
  words = environment(XLA_FLAGS=own)['XLA_FLAGS'].split()
  assert own in words and flag not in words
  runtime.check_xla_flags(flag)


def test_what_the_user_has_set_stays():
  assert environment(XLA_FLAGS='--xla_dump_to=a')['XLA_FLAGS'].startswith('--xla_dump_to=a ')
  assert environment(JAX_COMPILATION_CACHE_DIR='/c')['JAX_COMPILATION_CACHE_DIR'] == '/c'
  assert environment()['JAX_COMPILATION_CACHE_DIR'].endswith('vaediff/xla')


def test_flags_of_a_file_are_kept_beside_ours(tmp_path):
  """As words: XLA would take what is added for a part of the path."""
  path = tmp_path / 'flags'
  path.write_text('--xla_dump_to=a\n--xla_cpu_enable_fast_math=false\n')
  words = environment(XLA_FLAGS=str(path))['XLA_FLAGS'].split()
  assert words[:2] == ['--xla_dump_to=a', '--xla_cpu_enable_fast_math=false']
  assert runtime.EIGEN_CONVOLUTIONS in words


def test_an_interruption_where_nothing_can_be_raised_comes_again_and_the_rest_is_handed_on(monkeypatch):
  came, others = threading.Event(), []
  monkeypatch.setattr(runtime, '_thread', types.SimpleNamespace(interrupt_main=came.set))
  hook = runtime.interrupting_again(others.append)
  another = types.SimpleNamespace(exc_type=ValueError)
  hook(another)
  hook(types.SimpleNamespace(exc_type=KeyboardInterrupt))
  assert came.wait(10) and others == [another]


def test_an_environment_without_jax_is_told_how_to_get_it():
  code = 'from vaediff.machine import runtime; runtime.start("vaediff.main")'
  without_packages = [sys.executable, '-S', '-c', code]
  result = subprocess.run(without_packages, capture_output=True, text=True, check=False)
  assert result.returncode == 2
  assert 'jaxlib is not installed' in result.stderr and 'pip install -e .' in result.stderr
  assert 'Traceback' not in result.stderr


def test_huge_pages_are_asked_for_where_linux_gives_them_on_request(monkeypatch, tmp_path):
  policy = tmp_path / 'enabled'
  monkeypatch.setattr(runtime, 'HUGE_PAGES_POLICY', policy)
  monkeypatch.setattr(runtime.platform, 'libc_ver', lambda: ('glibc', '2.36'))
  monkeypatch.delenv('GLIBC_TUNABLES', raising=False)
  assert runtime.tunables() == ''
  policy.write_text('[always] madvise never')
  assert runtime.tunables() == ''
  policy.write_text('always [madvise] never')
  assert runtime.tunables() == 'glibc.malloc.hugetlb=1'
  monkeypatch.setenv('GLIBC_TUNABLES', 'glibc.malloc.check=1')
  assert runtime.tunables() == 'glibc.malloc.check=1:glibc.malloc.hugetlb=1'
  monkeypatch.setenv('GLIBC_TUNABLES', 'glibc.malloc.hugetlb=0')
  assert runtime.tunables() == 'glibc.malloc.hugetlb=0'
  monkeypatch.delenv('GLIBC_TUNABLES')
  for library in (('glibc', '2.34'), ('', '')):
    monkeypatch.setattr(runtime.platform, 'libc_ver', lambda library=library: library)
    assert runtime.tunables() == ''


PROGRAM = """
import json, os, pathlib, sys
from vaediff.machine import runtime
runtime.HUGE_PAGES_POLICY = pathlib.Path(sys.argv[1])
runtime.platform.libc_ver = lambda: ('glibc', '2.36')
print('started', flush=True)
runtime.restart_with_huge_pages(sys.argv[2])
print(json.dumps([os.getpid(), os.environ.get('GLIBC_TUNABLES'), sys.argv[1:]]))
"""


@pytest.mark.parametrize(('module', 'starts'), [('program', 2), ('another', 1)])
def test_a_program_starts_again_once_with_huge_pages_and_its_arguments(tmp_path, module, starts):
  (tmp_path / 'program.py').write_text(PROGRAM)
  policy = tmp_path / 'enabled'
  policy.write_text('always [madvise] never')
  keep = {name: value for name, value in os.environ.items() if name != 'GLIBC_TUNABLES'}
  path = os.pathsep.join([str(tmp_path), str(pathlib.Path(runtime.__file__).parents[2])])
  arguments = [str(policy), module, '--config.x=a b']
  process = subprocess.Popen(
    [sys.executable, '-m', 'program', *arguments],
    env={**keep, 'PYTHONPATH': path}, stdout=subprocess.PIPE, text=True,
  )  # fmt: skip
  *started, last = process.communicate()[0].splitlines()
  assert started == ['started'] * starts and process.returncode == 0
  wanted = 'glibc.malloc.hugetlb=1' if starts == 2 else None
  assert json.loads(last) == [process.pid, wanted, arguments]
