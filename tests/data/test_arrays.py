"""Arrays on disk are compared with what is known of them, and written without a memory map."""

import json
import os
import resource
import time

import numpy as np
import pytest

from vaediff.data import arrays
from vaediff.errors import UserError

ROWS = np.random.RandomState(0).randint(256, size=(200, 3, 4)).astype(np.uint8)
MEND = 'make it again'


@pytest.fixture
def path(tmp_path):
  np.save(tmp_path / 'a.npy', ROWS)
  return tmp_path / 'a.npy'


@pytest.fixture
def large(path, monkeypatch):
  """A file that counts as large, and written long ago; returns it and the list of its readings."""
  readings, read = [], arrays._read_digest
  monkeypatch.setattr(arrays, 'ALWAYS_READ', 1000)
  monkeypatch.setattr(arrays, '_read_digest', lambda *args: readings.append(1) or read(*args))
  os.utime(path, ns=(1, time.time_ns() - 10**10))
  return path, readings


def opened(path, digest=None):
  return arrays.open_array(path, ROWS.shape, np.uint8, digest or arrays.digest_of(ROWS), MEND)


def test_digest_in_memory_is_that_on_disk(path):
  assert arrays.digest_of_file(path) == arrays.digest_of(ROWS) == arrays.digest_of(ROWS.copy(order='F'))
  assert len(arrays.digest_of(ROWS)) == 16
  np.testing.assert_array_equal(opened(path), ROWS)
  assert isinstance(opened(path), np.memmap)


def test_every_bit_type_and_shape_counts():
  digests = {arrays.digest_of(ROWS), arrays.digest_of(ROWS[:-1]), arrays.digest_of(ROWS[::-1])}
  digests |= {arrays.digest_of(ROWS.view(np.int8)), arrays.digest_of(ROWS.reshape(200, 4, 3))}
  for at in (0, 1, ROWS.size // 2, ROWS.size - 1):
    other = ROWS.copy()
    other.flat[at] ^= 1
    digests.add(arrays.digest_of(other))
  assert len(digests) == 9


def test_another_shape_type_or_content_is_named(path):
  for shape, dtype, digest, message in (
    ((199, 3, 4), np.uint8, arrays.digest_of(ROWS), r'holds uint8\[200, 3, 4\] and not uint8\[199, 3, 4\]'),
    (ROWS.shape, np.int8, arrays.digest_of(ROWS), 'and not int8'),
    (ROWS.shape, np.uint8, '0' * 16, 'it was changed after it was made'),
  ):
    with pytest.raises(UserError, match=f'{path} is damaged .*{message}.*{MEND}'):
      arrays.open_array(path, shape, dtype, digest, MEND)


def test_a_large_file_is_read_again_only_when_it_changed(large):
  path, readings = large
  opened(path), opened(path)
  assert len(readings) == 1
  stamp = path.with_name('a.npy.compared.json')
  assert json.loads(stamp.read_text())['digest'] == arrays.digest_of(ROWS)
  os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
  opened(path)
  assert len(readings) == 2
  for content in ('', '[]', '{"size": 1}', stamp.read_text().replace(arrays.digest_of(ROWS), '0' * 16)):
    stamp.write_text(content)
    opened(path)
  assert len(readings) == 6
  opened(path)
  assert len(readings) == 6


def test_a_large_file_that_was_edited_is_refused(large):
  path, _ = large
  opened(path)
  array = np.load(path, mmap_mode='r+')
  array[100, 0, 0] ^= 1
  array.flush()
  os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))  # Some file systems do not tell the time of a map.
  with pytest.raises(UserError, match='it was changed after it was made'):
    opened(path)
  with pytest.raises(UserError, match='it was changed after it was made'):
    opened(path)


def test_a_file_written_just_now_is_read_again(large):
  """It may be written again within the same tick of the clock."""
  path, readings = large
  os.utime(path)
  opened(path), opened(path)
  assert len(readings) == 2


def test_a_folder_that_is_only_read(large, monkeypatch):
  path, readings = large

  def refuse(*args):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr(os, 'replace', refuse)
  for _ in range(2):
    np.testing.assert_array_equal(opened(path), ROWS)
  assert len(readings) == 2 and [file.name for file in path.parent.iterdir()] == ['a.npy']


@pytest.mark.parametrize('dtype', [np.uint8, np.int32, np.float32])
def test_writer_writes_rows_in_any_order(tmp_path, dtype):
  rows = ROWS.astype(dtype)
  with arrays.Writer(tmp_path / 'b.npy', rows.shape, dtype) as writer:
    for first in (150, 0, 50, 100):
      writer.write(first, rows[first : first + 50])
  np.testing.assert_array_equal(np.load(tmp_path / 'b.npy'), rows)
  assert arrays.digest_of_file(tmp_path / 'b.npy') == arrays.digest_of(rows)


def test_writer_keeps_to_its_array(tmp_path):
  with arrays.Writer(tmp_path / 'b.npy', (10, 3, 4), np.uint8) as writer:
    for first, rows in ((8, ROWS[:3]), (0, ROWS[:1].astype(int)), (0, ROWS[:1, :2])):
      with pytest.raises(ValueError, match='at row'):
        writer.write(first, rows)


def test_writer_says_that_the_disk_is_full(tmp_path):
  """A limit of the file's size stands for the disk; a memory map would end this process."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:
    with arrays.Writer(tmp_path / 'b.npy', ROWS.shape, np.uint8) as writer:
      resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
      writer.write(0, ROWS[:20])
      with pytest.raises(OSError, match='too large.*b.npy'):
        writer.write(20, ROWS[20:])
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_writer_on_a_full_disk(small_disk):
  with (
    arrays.Writer(small_disk('64k') / 'b.npy', (100, 10_000), np.uint8) as writer,
    pytest.raises(OSError, match='No space left on device.*b.npy'),
  ):
    writer.write(0, np.zeros((100, 10_000), np.uint8))
