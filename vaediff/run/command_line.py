"""The command line and the config file that it names: filled in, loaded; a mistake in them is one message."""

import inspect
import pathlib
import re
import runpy
import sys
import traceback
from collections.abc import Iterator

from absl import flags
from ml_collections import ConfigDict, config_flags

from vaediff.errors import UserError
from vaediff.run import config as configs
from vaediff.storage import places

STORED = pathlib.Path(__file__).with_name('stored_config.py')
"""The config file that stands for the config of a run."""
LOADS = config_flags.config_flags.ConfigFileFlagParser.parse.__code__
OVERRIDES = config_flags.config_flags._ConfigFlag._parse.__code__
"""What of ml_collections runs a config file, and what applies `--config.x=...` to what it returns."""
EXAMPLE = (
  'Give the path of a file, as --config=configs/digits.py, or with variants '
  '--config=configs/digits.py:z,debug'
)


def complete_argv(argv: list[str]) -> list[str]:
  """Returns the arguments with `--config` filled in from `--workdir` where it is not given.

  Also lets config files import their neighbours (`from configs import base`) from any working directory.
  """
  given = _given(argv, 'config')
  if given:
    root = str(pathlib.Path(given[-1].split(':')[0].replace('\0', '')).resolve().parent.parent)
    if root not in sys.path:
      sys.path.insert(0, root)
    return argv
  workdirs = _given(argv, 'workdir')
  if not workdirs or not workdirs[-1]:
    return argv
  return [argv[0], f'--config={STORED}:{places.anywhere(workdirs[-1], "--workdir")}', *argv[1:]]


def _given(argv: list[str], flag: str) -> list[str]:
  """Returns the values of `--flag=value` and of `--flag value`."""
  after = [value for arg, value in zip(argv, argv[1:], strict=False) if arg == f'--{flag}']
  return [arg.split('=', 1)[1] for arg in argv if arg.startswith(f'--{flag}=')] + after


def stored_file(argv: list[str]) -> pathlib.Path | None:
  """Returns the `config.json` that arguments of `complete_argv` stand for; None where they name a config."""
  workdirs = [arg.partition(f'{STORED}:')[2] for arg in argv if arg.startswith(f'--config={STORED}:')]
  return places.anywhere(workdirs[0], '--workdir') / configs.FILE if workdirs else None


def missing_key(error: AttributeError | KeyError, argv: list[str]) -> UserError | None:
  """Returns the error for a key that this version reads and the user's config does not have, or None.

  None where no config raised the error, or the config is one of this version's own making.
  """
  stored, frames = stored_file(argv), traceback.extract_tb(error.__traceback__)
  if frames[-1].filename != inspect.getfile(ConfigDict):
    return None
  if stored is None:
    if not any(frame.name in ('validate', 'resolve') for frame in frames):
      return None
    return UserError(
      f'the config has no key {_key_of(error)!r}, which every run has. A config file makes a whole config '
      'with '
      'configs.base.make'
    )
  return UserError(
    f'the stored config {stored} has no key {_key_of(error)!r}: the run is of an earlier version. Add the '
    'key to that file, in the section and with the default that it has in configs, or pass '
    '--config=configs/<name>.py'
  )


def _key_of(error: AttributeError | KeyError) -> str:
  """Returns the first word of what ml_collections says: the name of the key."""
  words = re.search(r'\w+', str(error.args[0])) if error.args else None
  return words.group() if words else str(error)


def parse_flags(argv: list[str]) -> list[str]:
  """Parses absl flags and config overrides; returns what is left.

  Raises:
    UserError: for an unknown flag or config key (says which comes near), a value of the wrong type, or a
      config file that cannot be loaded.
  """
  try:
    rest = flags.FLAGS(argv)
    value = flags.FLAGS['config'].value
    if value is None and not _given(argv, 'config'):
      return rest
    if not isinstance(value, config_flags.config_flags._ErrorConfig):
      _need_config(value)
    value.keys()  # a file that could not be loaded fails at its first use
    return rest
  except (KeyboardInterrupt, GeneratorExit):
    raise
  except BaseException as error:  # a config file is a program: it can raise anything, SystemExit too
    raise (_of_file(error, argv) or _of_flags(error, argv)) from error


def _need_config(value: object) -> None:
  if not isinstance(value, ConfigDict):
    what = 'None' if value is None else f'a {type(value).__name__}'
    raise UserError(
      f'get_config of the config file returns {what}; it must return a ConfigDict, as configs.base.make does'
    )


def _of_file(error: BaseException, argv: list[str]) -> UserError | None:
  """Returns the error for what running the config file raised; None where it was something else."""
  argument = (_given(argv, 'config') or [''])[-1]
  stored = stored_file(argv)
  for raised in _chain(error):
    codes = [frame.f_code for frame, _ in traceback.walk_tb(raised.__traceback__)]
    if LOADS not in codes or str(raised).startswith('Error whilst parsing config file'):
      continue
    last = codes[-1].co_filename
    if isinstance(raised, UserError) and stored:
      return raised
    if isinstance(raised, OSError) and (last == LOADS.co_filename or 'importlib' in last):
      return None  # of the file itself
    return UserError(f'--config={argument}: {_why(raised, last, argument)}')
  return None


def _chain(error: BaseException) -> Iterator[BaseException]:
  """Yields an error and those that it was raised from, the first to come last."""
  seen = []
  while error is not None and error not in seen:
    yield error
    seen.append(error)
    error = error.__cause__ or error.__context__


def _why(raised: BaseException, last_file: str, argument: str) -> str:
  """Returns in words what running a config file raised."""
  path, _, variant = argument.partition(':')
  text = str(raised).strip() or 'no message'
  if isinstance(raised, SyntaxError):
    return f'{raised.filename or path} is no Python program: {raised.msg}, line {raised.lineno or 1}'
  if isinstance(raised, AttributeError) and "no attribute 'get_config'" in text:
    return f'{path} has no function get_config. {EXAMPLE}'
  if isinstance(raised, TypeError) and re.match(r'get_config\(\) (takes|missing)', text):
    if variant or ':' in argument:
      return f'its get_config takes no variant, got {variant!r}: {text}'
    return f'its get_config needs a variant: {text}. Write --config={path}:<variant>'
  if isinstance(raised, UserError) or type(raised) is ValueError and 'null bytes' not in text:
    return text  # raised on purpose: it says what to do
  if last_file.endswith('config_flags.py') or 'importlib' in last_file:
    return f'{path} is no Python program: {text.splitlines()[0]}'
  frames = traceback.extract_tb(raised.__traceback__)
  where = f'{frames[-1].filename}, line {frames[-1].lineno}'
  return f'it fails at {where}: {type(raised).__name__}: {text.splitlines()[0]}'


def _of_flags(error: BaseException, argv: list[str]) -> BaseException:
  """Returns the error for what reading the flags raised; the same where it is none of the user's."""
  if isinstance(error, UserError):
    return error
  for raised in _chain(error):
    for frame, _ in traceback.walk_tb(raised.__traceback__):
      if frame.f_code is OVERRIDES and not isinstance(frame.f_locals.get('config'), ConfigDict):
        return _cannot_load(frame.f_locals.get('config'), raised)
  if isinstance(error, OSError):
    return _cannot_load(None, error)
  if isinstance(error, AttributeError | KeyError):
    return _no_key(error, argv)
  if isinstance(
    error, flags.Error | ValueError | TypeError | config_flags.config_flags.UnsupportedOperationError
  ):
    return UserError(str(error).replace('flag --', '--', 1))
  return error


def _cannot_load(value: object, error: BaseException) -> UserError:
  if isinstance(error, OSError):
    why = str(error).splitlines()[-1].strip().rstrip('.')
    return UserError(f'the config file cannot be loaded: {why}. {EXAMPLE}')
  try:
    _need_config(value)
  except UserError as wrong:
    return wrong
  return UserError(str(error))


def _no_key(error: AttributeError | KeyError, argv: list[str]) -> UserError:
  """Returns the error for an override of a key that the config does not have."""
  name = _key_of(error)
  argument = next((arg for arg in argv if name in arg), name)
  near = re.search(r'Did you mean "\w+"', str(error.args[0]) if error.args else '')
  hint = f'{near.group()}? ' if near else ''
  hint = (argument.startswith(f'--config.{name}.') and _no_such_stage(name, argv)) or hint
  stored = stored_file(argv)
  newer = f'. A run of an earlier version lacks newer keys: add them to {stored}' if stored else ''
  return UserError(
    f'{argument}: the config has no key {name!r}. {hint}Keys are declared in configs/base.py and, by '
    f'experiment, in configs/stages{newer}'
  )


def _no_such_stage(name: str, argv: list[str]) -> str:
  """Returns what to do about a stage that runs can have and this one has not; '' for what is no stage."""
  files = sys.modules.get('configs.base')  # imported by the config file that is asked for, never from here
  if files is None or name not in files.known.BY_NAME:
    return ''
  variants = files.variants_with(name)
  others = f' Variants with it: {", ".join(variants)}.' if variants else ''
  path, _, variant = _given(argv, 'config')[-1].partition(':')
  stages = ', '.join(runpy.run_path(path)['get_config'](variant).stages)
  return f'This run has no stage {name!r}; its stages are {stages}.{others} '
