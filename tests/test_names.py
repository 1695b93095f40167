"""Names and sizes: every name that a function reads exists, which annotations keep ruff from seeing.

And no function is longer than a screen.
"""

import ast
import builtins
import dis
import importlib
import pathlib
import types

import pytest

ROOT = pathlib.Path(__file__).parent.parent
MAX_LINES = 60
"""Of a function, from `def` to its end, docstring and all."""
BRANCHES = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.FunctionDef)
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


def is_table(node: ast.FunctionDef) -> bool:
  """Returns whether a function only sets values, one after the other, as the section of a config does."""
  return not any(isinstance(part, BRANCHES) for statement in node.body for part in ast.walk(statement))


def too_long(text: str, *, tables: bool = False) -> list[tuple[str, int]]:
  """Returns the functions of more than `MAX_LINES` lines, with their lines; with `tables` but for those."""
  nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
  lines = {node: node.end_lineno - node.lineno + 1 for node in nodes}
  return [
    (node.name, lines[node]) for node in nodes if lines[node] > MAX_LINES and not (tables and is_table(node))
  ]


@pytest.mark.parametrize('folder', ['vaediff', 'configs'])
def test_no_function_is_too_long(folder):
  """A config's section may be: it is a table of settings, with a line each."""
  texts = {path: path.read_text() for path in (ROOT / folder).rglob('*.py')}
  found = {path: too_long(text, tables=folder == 'configs') for path, text in texts.items()}
  assert {str(path): each for path, each in found.items() if each} == {}


def test_a_function_that_is_too_long_is_seen():
  body = '  x = 1\n' * (MAX_LINES - 1)
  assert too_long('def f():\n' + body) == []
  assert too_long('def f():\n' + body + '  return x\n') == [('f', MAX_LINES + 1)]
  assert too_long('def f():\n' + body + '  return x\n', tables=True) == []
  branch = '  if x:\n    return x\n'
  assert too_long('def f():\n' + body + branch, tables=True) == [('f', MAX_LINES + 2)]
