"""The walls of the house: which folder may import what."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent / 'vaediff'
FORBIDDEN = {
  # folder or file: prefixes that it must not import
  'diffusion': (
    'flax',
    'vaediff.config',
    'vaediff.data',
    'vaediff.models',
    'vaediff.experiments',
    'vaediff.train',
    'vaediff.evaluation',
  ),
  'models': (
    'vaediff.config',
    'vaediff.data',
    'vaediff.diffusion',
    'vaediff.experiments',
    'vaediff.train',
    'vaediff.evaluation',
  ),
  'data': (
    'flax',
    'vaediff.models',
    'vaediff.diffusion',
    'vaediff.experiments',
    'vaediff.train',
    'vaediff.evaluation',
  ),
  'features': (
    'vaediff.config',
    'vaediff.data',
    'vaediff.diffusion',
    'vaediff.models',
    'vaediff.experiments',
    'vaediff.train',
    'vaediff.evaluation',
  ),
  'experiments': (
    'vaediff.evaluation',
    'flax.linen',
    'vaediff.train',
    'vaediff.checkpoint',
    'vaediff.pipeline',
    'vaediff.sample',
  ),
}
ONLY_IN = {
  'orbax': ('checkpoint.py',),
  'flax.linen': ('models/', 'features/'),
  'matplotlib': ('evaluation/plots.py',),
  'safetensors': ('features/weights.py',),
  'tensorflow_datasets': ('data/',),
  'grain': ('data/',),
  'tensorflow': (),
}


def imports(path: pathlib.Path) -> set[str]:
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names |= {node.module} | {f'{node.module}.{alias.name}' for alias in node.names}
  return names


def within(name: str, prefix: str) -> bool:
  return name == prefix or name.startswith(prefix + '.')


@pytest.mark.parametrize('folder', FORBIDDEN)
def test_folder_keeps_its_walls(folder):
  for path in (ROOT / folder).rglob('*.py'):
    for name in imports(path):
      for prefix in FORBIDDEN[folder]:
        assert not within(name, prefix), f'{path} imports {name}'


@pytest.mark.parametrize('package', ONLY_IN)
def test_package_stays_in_its_place(package):
  for path in ROOT.rglob('*.py'):
    where = path.relative_to(ROOT).as_posix()
    if not where.startswith(ONLY_IN[package]) if ONLY_IN[package] else True:
      assert not any(within(name, package) for name in imports(path)), f'{where} imports {package}'


def test_imports_run_one_way():
  """No cycle between the modules of the package."""
  modules = {}
  for path in ROOT.rglob('*.py'):
    parts = ('vaediff', *path.relative_to(ROOT).with_suffix('').parts)
    modules['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
  graph = {name: {m for m in imports(path) if m in modules and m != name} for name, path in modules.items()}
  # `from package import module` names the package too; what counts is the module
  for name, targets in graph.items():
    graph[name] = {t for t in targets if not any(within(o, t) and o != t for o in targets)}
  done, under_way = set(), []

  def visit(name):
    assert name not in under_way, ' -> '.join([*under_way, name])
    if name in done:
      return
    under_way.append(name)
    for target in graph[name]:
      visit(target)
    under_way.pop()
    done.add(name)

  for name in graph:
    visit(name)
  assert len(done) > 20


def test_no_config_defaults_outside_configs():
  """A default lives in configs/ alone: no `.get(key, default)` on a config anywhere in the package."""
  for path in [*ROOT.glob('*.py'), *(ROOT / 'experiments').glob('*.py')]:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == 'get':
        owner = ast.unparse(node.func.value)
        assert not any(word in owner for word in ('config', 'settings', 'section')), f'{path}: {owner}.get'
