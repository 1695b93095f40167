"""Values of a config, whatever field they are in: what none may be, where `~` is meant, and stored types."""

import importlib
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from vaediff.errors import UserError
from vaediff.storage import places

PATHS = (
  'data.data_dir',
  'data.path',
  'evaluate.weights_dir',
  'evaluate.inception_weights',
  'edit.image',
  'vary.image',
  'text_diff.image',
)
"""Fields that are paths; so are those called `workdir`, anywhere, and `evaluate.sweep.workdirs`."""
LARGEST = 2**63
PLAIN = (bool, int, float, str, type(None))
"""Types that a config can hold and a run can store."""
DEEPEST = 16
"""Sections within sections; those of this version reach 5."""
WORDS = {bool: 'true or false', int: 'a whole number', float: 'a number', str: 'a text', tuple: 'a list'}
OPEN = ('.diffusion.z_conditioning',)
"""Fields whose values are of several types: which, their experiment says."""
ROOT = pathlib.Path(__file__).parents[2]
"""The folder of `configs`, where the project is installed from its source."""


def leaves(section: Mapping[str, Any] | ConfigDict, prefix: str = 'config') -> Iterator[tuple[str, Any]]:
  """Yields the full name and the value of every field; elements of tuples by their number, as `config.x[0]`.

  Raises:
    UserError: for a config that is nested deeper than any is.
  """
  waiting = [(prefix, section)]
  while waiting:
    name, value = waiting.pop()
    if name.count('.') + name.count('[') > DEEPEST:
      raise UserError(f'{name[:100]}... is nested deeper than any config ({DEEPEST} sections)')
    if isinstance(value, Mapping | ConfigDict):
      waiting += [(f'{name}.{key}', item) for key, item in value.items()][::-1]
    elif isinstance(value, tuple | list):
      waiting += [(f'{name}[{index}]', item) for index, item in enumerate(value)][::-1]
    else:
      yield name, value


def check(config: ConfigDict) -> None:
  """Raises UserError for the first value that no field may have: names it in full."""
  for name, value in leaves(config):
    if not isinstance(value, PLAIN):
      raise UserError(
        f'{name} is a {type(value).__name__}; a config holds numbers, texts, true, false, None and tuples '
        'of them'
      )
    if isinstance(value, float) and not abs(value) < float('inf'):
      raise UserError(f'{name} is {value}; a finite number is needed')
    if isinstance(value, int) and abs(value) >= LARGEST:
      raise UserError(f'{name} is {_short(value)}; whole numbers must be below 2^63')
    if isinstance(value, str) and '\0' in value:
      raise UserError(f'{name} is {value!r}, which holds a NUL byte; remove it')


def _short(value: int) -> str:
  return str(value) if abs(value) < 10**40 else f'a number of {value.bit_length()} bits'


def expand(config: ConfigDict) -> None:
  """Puts the home folder in place of `~` in every field that is a path, in place.

  Raises:
    UserError: when no home folder is known and one is asked for.
  """
  for section, field, name in _paths(config, 'config'):
    value = section[field]
    if isinstance(value, str) and value.startswith('~'):
      section[field] = str(places.expanded(value, name))
  sweep = config.evaluate.sweep
  if any(isinstance(path, str) and path.startswith('~') for path in sweep.workdirs):
    name = 'config.evaluate.sweep.workdirs'
    sweep.workdirs = tuple(str(places.expanded(path, name)) for path in sweep.workdirs)


def _paths(section: ConfigDict, prefix: str) -> Iterator[tuple[ConfigDict, str, str]]:
  """Yields section, field and full name of every field that is a path."""
  for field, value in section.items():
    name = f'{prefix}.{field}'
    if isinstance(value, ConfigDict):
      yield from _paths(value, name)
    elif field == 'workdir' or name.removeprefix('config.') in PATHS:
      yield section, field, name


def check_types(stored: Any, path: pathlib.Path) -> None:
  """Raises UserError for the first key of a stored config whose type is not that of this version's default.

  Keys that are missing or that this version does not know are left to those who read them. Where the folder
  `configs` is not beside the package, only the shape is looked at: sections, stages, depth.

  Args:
    stored: what the file holds, as JSON has it: dicts, lists, numbers, texts.
    path: of the file, for the message.
  """
  mend = 'Mend the file, or move it away and pass --config=configs/<name>.py'
  if not isinstance(stored, dict):
    raise UserError(f'{path} is not a stored config: it holds {_kind(stored)}, not sections by name. {mend}')
  try:
    for _ in leaves(stored):
      pass
  except UserError as error:
    raise UserError(f'{path} is not a stored config: {error}. {mend}') from error
  stages = stored['stages'] if 'stages' in stored else None
  if not isinstance(stages, list | tuple) or not all(isinstance(name, str) for name in stages):
    raise UserError(
      f'{path} is not a stored config: stages is {_shown(stages)}; a list of names is needed. {mend}'
    )
  for name in ('data', *stages):
    if name not in stored or not isinstance(stored[name], dict):
      what = 'missing' if name not in stored else _shown(stored[name])
      raise UserError(f'{path} is not a stored config: the section {name} is {what}. {mend}')
  for name, default in _defaults(stored).items():
    found = _first_wrong(stored[name], default, name)
    if found:
      key, value, wanted = found
      raise UserError(f'{path}: {key} is {_shown(value)}; {wanted} is needed. {mend}')


def _defaults(stored: dict[str, Any]) -> dict[str, Any]:
  """Returns this version's defaults of what the stored config has, by its top keys, if they are known."""
  if not (ROOT / 'configs' / 'base.py').is_file():
    return {}
  if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))
  try:
    base = importlib.import_module('configs.base')
    known, default = base.known.BY_NAME, base.default().to_dict()
  except (ImportError, AttributeError):  # another package of that name
    return {}
  by_experiment = {}
  for module in (*known.values(), base.classifier):
    section = module.section().to_dict()
    by_experiment.setdefault(section['experiment'], section)
  found = {name: default[name] for name in stored if name in default}
  for name, section in stored.items():
    if isinstance(section, dict) and 'experiment' in section:
      kind = section['experiment'] if isinstance(section['experiment'], str) else ''
      own = by_experiment[kind] if kind in by_experiment else {'experiment': ''}
      laid_over = {'teacher', 'base'} & section.keys()  # a student's section, or a control's
      found[name] = _over(by_experiment['diffusion'] if laid_over else {}, own)
  return found


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
  """Returns sections laid over others, as a student's over its teacher's."""
  both = {
    key: _over(below[key], value) if isinstance(value, dict) and isinstance(below.get(key), dict) else value
    for key, value in above.items()
  }
  return {**below, **both}


def _first_wrong(value: Any, default: Any, name: str) -> tuple[str, Any, str] | None:
  """Returns the key, the value and what is needed of the first value of another type than its default."""
  if name.endswith(OPEN):
    return None
  if isinstance(default, dict):
    if not isinstance(value, dict):
      return name, value, 'a section'
    for key in default:
      found = key in value and _first_wrong(value[key], default[key], f'{name}.{key}')
      if found:
        return found
    return None
  allowed = {float: (int, float), tuple: (tuple, list)}
  for kind, words in WORDS.items():
    if type(default) is kind:
      fits = isinstance(value, allowed[kind] if kind in allowed else kind)
      is_switch = isinstance(value, bool) and kind is not bool
      return None if fits and not is_switch else (name, value, words)
  return None


def _kind(value: Any) -> str:
  return {list: 'a list', str: 'a text', type(None): 'null'}.get(type(value), f'a {type(value).__name__}')


def _shown(value: Any) -> str:
  if value is None:
    return 'null'
  return 'a section' if isinstance(value, dict) else repr(value)[:80]
