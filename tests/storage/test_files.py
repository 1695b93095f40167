"""Side files: written whole or not at all, read with a message by cause; locks end with their process."""

import errno
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from vaediff.errors import UserError
from vaediff.storage import files, identity


def test_what_fails_while_it_is_written_leaves_what_was_there(tmp_path):
  path = tmp_path / 'a' / 'x.txt'
  files.write_text(path, 'before')
  with pytest.raises(KeyError), files.replacing(path) as temporary:
    temporary.write_text('half')
    raise KeyError('bug')
  assert path.read_text() == 'before' and os.listdir(path.parent) == ['x.txt']
  with pytest.raises(UserError, match=f'{path} cannot be written: No space left on device; what was there'):
    with files.replacing(path):
      raise OSError(errno.ENOSPC, 'No space left on device')
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='file/x.txt cannot be written: '):
    files.write_text(tmp_path / 'file' / 'x.txt', '')


BROKEN = (b'', b'{', b'[1, 2', b'\xff\xfe\x00', b'[' * 100_000, b'{"a": 1}garbage')


@pytest.mark.parametrize('content', BROKEN, ids=range(len(BROKEN)))
def test_json_that_is_none_is_damaged(tmp_path, content):
  path = tmp_path / 'x.json'
  path.write_bytes(content)
  with pytest.raises(files.Damaged, match=f'{path} is damaged .*; remove it and run the same command again'):
    files.read_json(path)


@pytest.mark.parametrize('change', ['half', 'flip', 'empty', 'pickle', 'text'])
def test_npz_that_is_none_is_damaged(tmp_path, change):
  path = tmp_path / 'x.npz'
  files.write_npz(path, {'a': np.arange(100), 'b': np.ones(3)})
  assert set(files.read_npz(path)) == {'a', 'b'}
  whole = path.read_bytes()
  flipped = bytearray(whole)
  flipped[len(whole) // 2] ^= 4
  path.write_bytes(
    {'half': whole[:300], 'flip': bytes(flipped), 'empty': b'', 'pickle': b'\x80\x04N.', 'text': b'abc'}[
      change
    ]
  )
  with pytest.raises(files.Damaged, match=f'{path} is damaged'):
    files.read_npz(path)


@pytest.mark.parametrize(
  ('cause', 'message'),
  [
    (
      PermissionError(errno.EACCES, 'Permission denied'),
      'cannot be read: Permission denied. The file was left',
    ),
    (OSError(errno.EIO, 'Input/output error'), 'cannot be read: Input/output error. The file was left'),
    (MemoryError(), 'cannot be read: MemoryError. The file was left'),
    (FileNotFoundError(errno.ENOENT, 'No such file'), 'x does not exist'),
  ],
)
def test_what_the_system_refuses_is_no_damage(tmp_path, cause, message):
  with pytest.raises(UserError, match=message) as caught, files.reading(tmp_path / 'x'):
    raise cause
  assert not isinstance(caught.value, files.Damaged)


def test_of_a_long_reason_the_words_of_the_system_are_kept():
  text = 'RESOURCE_EXHAUSTED: ' + 'x' * 400 + ' No space left on device [os_error_code=28]'
  assert files.reason(ValueError(text)).startswith('No space left on device (RESOURCE_EXHAUSTED: xxx')
  assert len(files.reason(ValueError('y' * 900))) == files.LONGEST


def test_an_object_that_was_changed_is_noticed():
  content = {'a': [1, 2.5, None], 'b': {'c': 'text'}}
  stored = json.loads(json.dumps(identity.sealed(content)))
  assert identity.unsealed(stored) == content
  for changed in ({**stored, 'a': [1, 2.5000001, None]}, {**stored, 'd': 1}, content, [], None, 'x'):
    with pytest.raises(ValueError, match='it (was changed|does not hold)'):
      identity.unsealed(changed)


HOLDS = """
import pathlib, sys, time
from vaediff.storage import files
with files.lock(pathlib.Path(sys.argv[1]), 'a test'):
  print('held', flush=True)
  time.sleep(60)
"""


@pytest.fixture
def held(tmp_path):
  process = subprocess.Popen([sys.executable, '-c', HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == 'held\n'
  yield process
  process.kill()
  process.wait()


def test_a_lock_names_who_holds_it_and_ends_with_its_process(tmp_path, held):
  message = rf'{tmp_path} is in use by process {held.pid} on host \S+ \(a test\). Wait until it ends'
  with pytest.raises(UserError, match=message), files.lock(tmp_path, 'another'):
    pass
  held.kill()
  held.wait()
  with files.lock(tmp_path, 'another') as waited:
    assert not waited


def test_who_waits_for_a_lock_gets_it(tmp_path, held):
  begun = time.monotonic()
  killer = subprocess.Popen(
    [sys.executable, '-c', f'import os, time; time.sleep(.5); os.kill({held.pid}, 9)']
  )
  with files.lock(tmp_path, 'another', wait=True) as waited:
    assert waited and time.monotonic() - begun > 0.2
  killer.wait()
