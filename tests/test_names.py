"""No function reads a name that its module does not have: annotations keep ruff from seeing such names."""

import builtins
import dis
import importlib
import pathlib
import types

import pytest

ROOT = pathlib.Path(__file__).parent.parent
MODULES = sorted(
  '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')
  for folder in ('vaediff', 'configs')
  for path in (ROOT / folder).rglob('*.py')
)


def globals_read(code: types.CodeType) -> set[str]:
  """Returns the global names that a code object and all inside of it read."""
  names = {step.argval for step in dis.get_instructions(code) if step.opname == 'LOAD_GLOBAL'}
  return names.union(*(globals_read(part) for part in code.co_consts if isinstance(part, types.CodeType)))


@pytest.mark.parametrize('name', MODULES)
def test_every_name_that_is_read_exists(name):
  module = importlib.import_module(name)
  code = compile(pathlib.Path(module.__file__).read_text(), module.__file__, 'exec', dont_inherit=True)
  assert globals_read(code) - set(vars(module)) - set(vars(builtins)) == set()


def test_a_name_that_does_not_exist_is_seen():
  code = compile('import os\ndef f():\n  return [lambda: os.sep + missing]', 'f', 'exec')
  assert globals_read(code) == {'os', 'missing'}
