"""The walls of the house: which folder may import what."""

import ast
import functools
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent / 'vaediff'
ROOMS = (
  ('errors', 'types'),
  ('checks', 'storage'),
  ('machine', 'data', 'models', 'diffusion', 'weights', 'optim'),
  ('features', 'reads'),
  ('spaces',),
  ('conditions',),
  ('experiments',),
  ('run',),
  ('evaluation',),
  ('modes',),
  ('main',),
)
"""The reading order: a room imports rooms of the floors before its own, and of its own floor none."""
ONLY_IN = {
  'fsspec': ('storage/buckets.py',),
  'nicegui': ('modes/explore_page.py', 'modes/explore_panel.py'),
  'orbax': ('run/checkpoint.py',),
  'flax.linen': ('models/', 'features/'),
  'flax': ('models/', 'features/', 'experiments/base.py'),
  'matplotlib': ('evaluation/plots.py',),
  'safetensors': ('weights/tensors.py',),
  'tensorflow_datasets': ('data/',),
  'grain': ('data/',),
  'sentencepiece': ('data/words.py',),
  'pyarrow': ('data/parquet.py',),
  'sklearn': ('conditions/prior.py', 'data/'),
  'tensorflow': (),
  'wandb': ('run/wandb_log.py',),
  'ml_collections': (
    'machine/', 'data/', 'optim.py', 'checks.py', 'reads.py', 'spaces/', 'conditions/', 'experiments/',
    'run/', 'evaluation/', 'modes/', 'main.py',
  ),
}  # fmt: skip


@functools.cache
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


@functools.cache
def modules() -> dict[str, pathlib.Path]:
  """Returns the file of every module of the package."""
  found = {}
  for path in ROOT.rglob('*.py'):
    parts = ('vaediff', *path.relative_to(ROOT).with_suffix('').parts)
    found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
  return found


def room(module: str) -> str:
  return module.split('.')[1] if '.' in module else ''


def test_rooms_import_in_reading_order():
  """An arrow goes from a later floor to an earlier one, or stays in its room."""
  floors = {name: floor for floor, names in enumerate(ROOMS) for name in names}
  for module, path in modules().items():
    here = room(module)
    for target in imports(path) & modules().keys():
      there = room(target)
      if there and here and there != here:
        assert floors[there] < floors[here], f'{module} imports {target}'


def test_every_room_has_a_floor():
  names = {path.stem for path in ROOT.glob('*.py')}
  names |= {path.parent.name for path in ROOT.glob('*/__init__.py')}
  assert names - {'__init__'} <= {name for floor in ROOMS for name in floor}


@pytest.mark.parametrize('package', ONLY_IN)
def test_package_stays_in_its_place(package):
  for path in ROOT.rglob('*.py'):
    where = path.relative_to(ROOT).as_posix()
    if not where.startswith(ONLY_IN[package]) if ONLY_IN[package] else True:
      assert not any(within(name, package) for name in imports(path)), f'{where} imports {package}'


def test_imports_run_one_way():
  """No cycle between the modules of the package."""
  known = modules()
  graph = {name: {m for m in imports(path) if m in known and m != name} for name, path in known.items()}
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


NAMES = (
  'x0_vae', 'z', 'label', 'latents', 'tokens', 'codes', 'low', 'control', 'embedding', 'degraded', 'known',
)  # fmt: skip
"""Of inputs and values that belong to one condition or one space."""
ABOUT_ONE_INPUT = ('modes/interpolate.py', 'modes/restore.py', 'evaluation/likelihoods.py')
"""Files that are about a code or an image that is given; they take its name from the condition's file."""
STUDENTS = (
  'student', 'grid_student', 'progressive', 'consistency', 'adversarial_distillation', 'distribution_matching'
)  # fmt: skip


def test_only_conditions_say_the_name_of_a_value():
  """No string in the mathematics, the students, the run, the evaluation and the modes is such a name."""
  rooms = ('diffusion', 'run', 'evaluation', 'modes')
  files = [path for room in rooms for path in (ROOT / room).glob('*.py')]
  files += [ROOT / 'experiments' / f'{name}.py' for name in (*STUDENTS, 'base', 'denoiser', 'diffusion')]
  files.remove(ROOT / 'run' / 'earlier.py')  # it reads words of configs that earlier versions stored
  for path in files:
    where = path.relative_to(ROOT).as_posix()
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Constant) and isinstance(node.value, str):
        assert node.value not in NAMES, f'{where}:{node.lineno} says {node.value!r}'
      if isinstance(node, ast.ImportFrom) and node.module == 'vaediff.conditions.vae':
        assert where in (*ABOUT_ONE_INPUT, 'experiments/diffusion.py'), f'{where} is about no input'


def test_no_config_defaults_outside_configs():
  """A default lives in configs/ alone: no `.get(key, default)` on a config anywhere in the package."""
  for path in ROOT.rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == 'get':
        owner = ast.unparse(node.func.value)
        assert not any(word in owner for word in ('config', 'settings', 'section')), f'{path}: {owner}.get'
