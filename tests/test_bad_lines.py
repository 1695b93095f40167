# ruff: noqa: E501 (one case a line)
"""Command lines, config files and edited `config.json` that cannot be: one message, status 2, nothing written.

The package is imported once; each line is a process forked from there, see `command_lines`.
"""

import contextlib
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from command_lines import run_all
from some_slow import some_slow

from vaediff.errors import UserError
from vaediff.run import config as configs
from vaediff.run import values

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
pytestmark = pytest.mark.xdist_group('bad_lines')  # one worker runs all of them at once
DEBUG = '--config=configs/digits.py:debug'
MAKE = 'from configs import digits\nimport ml_collections\ndef get_config(variant=""):\n  '
FILES = {
  'raises': ('def get_config():\n  raise RuntimeError("no luck")\n', 'raises.py, line 2: RuntimeError: no luck'),
  'raises_outside': ('1 / 0\n', 'raises_outside.py, line 1: ZeroDivisionError'),
  'refuses': ('def get_config():\n  raise ValueError("not like this")\n', 'refuses.py: not like this'),
  'asks_a_dict': ('def get_config():\n  return {}["size"]\n', "line 2: KeyError: 'size'"),
  'asks_an_object': ('def get_config():\n  return None.size\n', "AttributeError: 'NoneType' object has no"),
  'mistyped': ('def get_config():\n  return 1 + "1"\n', 'mistyped.py, line 2: TypeError'),
  'leaves': ('raise SystemExit(0)\n', 'leaves.py, line 1: SystemExit: 0'),
  'syntax': ('def get_config(:\n', 'syntax.py is no Python program: invalid syntax, line 1'),
  'indented': (' x = 1\n', 'is no Python program: unexpected indent, line 1'),
  'imports': ('import nothing_like_it\n', "ModuleNotFoundError: No module named 'nothing_like_it'"),
  'reads': ('open("/no/such/file")\n', "cannot be loaded: [Errno 2] No such file or directory: '/no/such/file'"),
  'nothing': ('x = 1\n', 'nothing.py has no function get_config'),
  'returns_none': ('def get_config():\n  pass\n', 'get_config of the config file returns None'),
  'returns_dict': ('def get_config():\n  return {"stages": ()}\n', 'returns a dict; it must return a ConfigDict'),
  'returns_text': ('def get_config():\n  return "vae"\n', 'returns a str; it must return a ConfigDict'),
  'returns_empty': (MAKE + 'return ml_collections.ConfigDict()\n', 'the config names no stages'),
  'deep': ('def get_config():\n  return get_config()\n', 'RecursionError'),
  'half': (
    MAKE + 'c = digits.get_config("debug").unlock(); del c["restore"]; return c\n', "the config has no key 'restore'"
  ),
  'arrays': (
    MAKE + 'import numpy; c = digits.get_config("debug").unlock(); c.vae.x = numpy.ones(2); return c\n',
    'config.vae.x is a ndarray; a config holds numbers',
  ),
}  # fmt: skip
LINES = [
  ([DEBUG, 'vae'], "unexpected argument 'vae'"),
  ([DEBUG, '--nothing=1'], "Unknown command line flag 'nothing'"),
  ([DEBUG, '--mode='], 'value should be one of'),
  ([DEBUG, '--sweep'], '--sweep goes with --mode=evaluate, not with --mode=train'),
  ([DEBUG, '--stages=vae,,refiner'], "--stages names ''"),
  ([DEBUG, '--distributed=maybe'], 'value should be one of'),
  ([DEBUG, '--mode=compile', '--topology=v9:2x2'], '--topology=v9:2x2: write <chip>:<shape>'),
  ([DEBUG, '--workdir=LICENSE'], '--workdir is LICENSE, which is a file; give a folder'),
  ([DEBUG, '--workdir=~nobody_here/x'], "--workdir is '~nobody_here/x', and the home folder"),
  ([DEBUG, '--config.name=../../x'], "config.name is '../../x'; it names files"),
  ([DEBUG, '--config.vae=1'], 'vae'),
  ([DEBUG, '--config.vae.optim.clip_norm=nan'], 'config.vae.optim.clip_norm is nan'),
  ([DEBUG, '--config.evaluate.name=../../x', '--mode=evaluate'], "config.evaluate.name is '../../x'"),
  ([DEBUG, '--config.vae.train.batch_size=1e400'], 'batch_size=1e400'),
  ([DEBUG, '--config.vae.train.batch_size=inf'], 'batch_size=inf'),
  ([DEBUG, '--config.stages=data'], "names 'data', which is no stage"),
  ([DEBUG, '--flagfile=no_such_file'], 'no_such_file'),
  (['--config='], 'Path to config file is an empty string'),
  (['--config=configs'], 'the config file cannot be loaded'),
  (['--config=LICENSE'], 'LICENSE is no Python program'),
  (['--config=configs/digits.py:debug:z'], 'has no variant'),
  (['--config=configs/digits.py:debug,nope'], "config 'digits' has no variant 'nope'; valid:"),
  (['--workdir='], 'give --config=configs/<name>.py, or --workdir=<folder>'),
  ([], 'give --config=configs/<name>.py, or --workdir=<folder>'),
]


@pytest.fixture(scope='module')
def said(tmp_path_factory):
  """Exit status and messages by name of a config file, number of a line, or 'binary' and 'variant'."""
  folder = tmp_path_factory.mktemp('lines')
  for name, (text, _) in FILES.items():
    (folder / f'{name}.py').write_text(text)
  (folder / 'binary.py').write_bytes(bytes(range(256)))
  (folder / 'plain.py').write_text('def get_config():\n  return None\n')
  (folder / 'needs.py').write_text('def get_config(variant):\n  return None\n')
  lines = {name: [f'--config={folder / name}.py'] for name in (*FILES, 'binary', 'needs')}
  lines['plain'] = [f'--config={folder / "plain"}.py:z']
  lines['overridden'] = [f'--config={folder / "returns_none"}.py', '--config.seed=1']
  lines |= {index: arguments for index, (arguments, _) in enumerate(LINES)}
  with_workdir = [
    arguments if any(arg.startswith('--workdir') for arg in arguments) or not arguments
    else [*arguments, f'--workdir={folder / "run"}'] for arguments in lines.values()
  ]  # fmt: skip
  results = dict(zip(lines, run_all(folder, with_workdir), strict=True))
  assert not (folder / 'run').exists()
  return results


def check(result, message):
  status, text = result
  assert status == 2, text
  assert message in text and 'Traceback' not in text, text
  assert text.count('error: ') == 1, text


@pytest.mark.parametrize('name', FILES)
def test_a_config_file_that_cannot_be(said, name):
  check(said[name], FILES[name][1])


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('binary', 'binary.py is no Python program'),
    ('plain', "its get_config takes no variant, got 'z'"),
    ('needs', 'its get_config needs a variant'),
    ('overridden', 'get_config of the config file returns None'),
  ],
)
def test_a_config_file_that_does_not_fit_the_line(said, name, message):
  check(said[name], message)


@pytest.mark.parametrize('index', range(len(LINES)))
def test_a_line_that_cannot_be(said, index):
  check(said[index], LINES[index][1])


# Edited config.json --------------------------------------------------------------------------------


def stored():
  config = importlib.import_module('configs.digits').get_config('distill,debug')
  importlib.import_module('vaediff.run.students').resolve(config)
  return json.loads(configs.to_json(config))


def test_what_a_run_stores_is_of_the_types_of_this_version():
  values.check_types(stored(), pathlib.Path('config.json'))
  before = ROOT / 'tests' / 'run' / 'earlier'
  for path in before.glob('*.json'):
    values.check_types(json.loads(path.read_text()), path)


def deep(levels):
  value = 1
  for _ in range(levels):
    value = {'x': value}
  return value


EDITS = [
  (lambda c: [c], 'it holds a list, not sections by name'),
  (lambda c: None, 'it holds null, not sections'),
  (lambda c: 'text', 'it holds a text, not sections'),
  (lambda c: {}, 'stages is null; a list of names is needed'),
  (lambda c: c | {'stages': 'vae'}, "stages is 'vae'; a list of names is needed"),
  (lambda c: c | {'stages': [['vae']]}, r'stages is \[.*; a list of names is needed'),
  (lambda c: c | {'stages': ['gan']}, 'the section gan is missing'),
  (lambda c: c | {'data': None}, 'the section data is null'),
  (lambda c: c | {'data': []}, r'the section data is \[\]'),
  (lambda c: c | {'vae': 7}, 'the section vae is 7'),
  (lambda c: c | {'seed': '0'}, "config.json: seed is '0'; a whole number is needed"),
  (lambda c: c | {'seed': True}, 'config.json: seed is True; a whole number is needed'),
  (lambda c: c | {'seed': None}, 'config.json: seed is null; a whole number is needed'),
  (lambda c: c | {'mesh': 3}, 'config.json: mesh is 3; a section is needed'),
  (lambda c: c | {'vae': c['vae'] | {'train': []}}, r'vae.train is \[\]; a section is needed'),
  (lambda c: c | {'vae': c['vae'] | {'experiment': 5}}, 'vae.experiment is 5; a text is needed'),
  (
    lambda c: c | {'refiner': edited(c['refiner'], 'train', 'num_steps', 1.5)},
    'train.num_steps is 1.5; a whole',
  ),
  (
    lambda c: c | {'refiner': edited(c['refiner'], 'optim', 'b1', 'x')},
    "refiner.optim.b1 is 'x'; a number is needed",
  ),
  (
    lambda c: c | {'refiner': edited(c['refiner'], 'model', 'remat', 1)},
    'model.remat is 1; true or false is needed',
  ),
  (lambda c: c | {'distill_1': edited(c['distill_1'], 'sample', 'eta', [])}, r'distill_1.sample.eta is \[\]'),
  (
    lambda c: c | {'distill_1': edited(c['distill_1'], 'teacher', 'stage', 1)},
    'distill_1.teacher.stage is 1',
  ),
  (
    lambda c: c | {'refiner': edited(c['refiner'], 'model', 'channel_multipliers', 2)},
    'is 2; a list is needed',
  ),
  (lambda c: c | {'vae': c['vae'] | {'more': deep(500)}}, 'nested deeper than any config'),
]


def edited(section, name, field, value):
  return section | {name: section[name] | {field: value}}


@pytest.mark.parametrize(('edit', 'message'), EDITS, ids=range(len(EDITS)))
def test_an_edited_config_is_named_by_its_key(tmp_path, edit, message):
  path = tmp_path / 'config.json'
  with pytest.raises(UserError, match=message) as error:
    values.check_types(edit(stored()), path)
  assert str(path) in str(error.value)


def test_a_key_that_stands_twice_is_named():
  with pytest.raises(ValueError, match="the key 'seed' twice"):
    configs.parse('{"seed": 1, "data": {}, "seed": 2}')


# Whole programs ------------------------------------------------------------------------------------


def start(*arguments, **options):
  environment = {**os.environ, **options.pop('env', {})}
  return subprocess.Popen(
    [sys.executable, '-m', 'vaediff.main', *arguments], cwd=ROOT, env=environment, text=True, **options
  )


def test_a_device_that_is_not_there(tmp_path):
  process = start(
    DEBUG, f'--workdir={tmp_path / "run"}', env={'JAX_PLATFORMS': 'tpux'}, stderr=subprocess.PIPE
  )
  said = process.communicate(timeout=200)[1]
  assert process.returncode == 2 and "JAX_PLATFORMS is 'tpux'" in said and 'Traceback' not in said, said
  assert not (tmp_path / 'run').exists()


def test_a_variable_that_changes_results_ends_the_program_before_jax_starts(tmp_path):
  process = start(DEBUG, env={'JAX_ENABLE_X64': '1'}, stderr=subprocess.PIPE)
  said = process.communicate(timeout=100)[1]
  assert process.returncode == 2 and 'JAX_ENABLE_X64' in said and 'Traceback' not in said, said


@pytest.mark.slow
def test_a_coordinator_that_is_not_there_is_a_lost_process(tmp_path):
  others = {'JAX_COORDINATOR_ADDRESS': 'nobody.invalid:7', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '1'}
  process = start(
    DEBUG, f'--workdir={tmp_path / "run"}', '--config.processes.join_timeout_seconds=1', env=others,
    stderr=subprocess.PIPE,
  )  # fmt: skip
  said = process.communicate(timeout=200)[1]
  assert process.returncode == 76 and 'did not find each other at nobody.invalid:7' in said, said


@pytest.mark.parametrize('output', some_slow(['closed', 'full', 'none'], 'full'))
def test_an_output_that_cannot_be_written_is_said(output):
  """To a pipe whose reader is gone, as of `| head`; to a full disk; with none at all there is nothing to say."""
  read, write = os.pipe()
  os.close(read)
  target = {'closed': write, 'full': os.open('/dev/full', os.O_WRONLY), 'none': write}[output]
  close = (lambda: os.close(1)) if output == 'none' else None
  process = start(DEBUG, '--mode=describe', stdout=target, stderr=subprocess.PIPE, preexec_fn=close)
  said = process.communicate(timeout=200)[1]
  assert 'Traceback' not in said and 'Exception ignored' not in said, said
  if output == 'none':
    assert process.returncode == 0, said
  else:
    assert process.returncode == 2 and said.count('error: the standard output cannot be written') == 1, said


@pytest.mark.slow
@pytest.mark.parametrize('seconds', [0.6, 4.0])
def test_an_interruption_is_one_word(tmp_path, seconds):
  """During the imports, and after them."""
  process = start(DEBUG, '--mode=describe', stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
  time.sleep(seconds)
  with contextlib.suppress(ProcessLookupError):
    process.send_signal(signal.SIGINT)
  said = process.communicate(timeout=100)[1]
  assert 'Traceback' not in said, said
  assert (process.returncode, said.strip()) in ((130, 'interrupted'), (0, '')), said


IN_A_COLLECTION = """
import gc, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
from vaediff.machine import runtime
runtime.start('vaediff.main')
from vaediff import main

def interrupt(phase, info, kill=os.kill, process=os.getpid()):
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    gc.callbacks.remove(interrupt)
    kill(process, signal.SIGINT)
    for _ in range(10 ** 9):  # it is raised here, where Python prints it and goes on
      pass

gc.callbacks.append(interrupt)
sys.argv = ['vaediff.main', '--config=configs/digits.py:debug', '--mode=describe']
main.cli()
"""


def test_an_interruption_while_garbage_is_collected_is_not_lost():
  process = subprocess.run(
    [sys.executable, '-c', IN_A_COLLECTION], capture_output=True, text=True, check=False
  )
  assert (process.returncode, process.stderr.strip()) == (130, 'interrupted')


AT_THE_END = """
import atexit, os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
from vaediff.machine import runtime
runtime.start('vaediff.main')

class Late:
  def __del__(self, kill=os.kill, process=os.getpid(), number=signal.SIGINT):
    kill(process, number)  # Python has taken its handlers away by now

if sys.argv.pop() == 'handlers are gone':
  kept = Late()
else:
  def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(200):  # another thread may get it first
      time.sleep(0.05)

  atexit.register(interrupt)
sys.argv = ['vaediff.main', '--help']
from vaediff.main import cli
cli()
"""


@pytest.mark.parametrize(
  'moment, status, said', [('the end begins', 130, 'interrupted'), ('handlers are gone', 1, '')]
)
def test_an_interruption_at_the_end_leaves_the_status_and_no_trace(moment, status, said):
  """absl ends with 1 after its help."""
  process = subprocess.run(
    [sys.executable, '-c', AT_THE_END, moment], capture_output=True, text=True, check=False
  )
  assert (process.returncode, process.stderr.strip()) == (status, said)
