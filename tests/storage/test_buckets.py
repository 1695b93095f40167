"""Paths in buckets: read as any other, written whole; a store that does not answer is no damage."""

import ast
import datetime
import errno
import os
import pathlib
import pickle

import memory_bucket
import numpy as np
import pytest

from vaediff.errors import UserError
from vaediff.storage import buckets, files, places
from vaediff.storage.buckets import BucketPath


@pytest.fixture
def store(monkeypatch):
  store = memory_bucket.Store()
  monkeypatch.setattr(buckets, 'filesystem', lambda scheme: store)
  return store


@pytest.fixture
def run(store):
  return BucketPath('s3://bucket/run')


def test_a_path_stays_one_of_its_bucket(run):
  path = run / 'vae' / 'metrics.jsonl'
  assert str(path) == os.fspath(path) == f'{path}' == 's3://bucket/run/vae/metrics.jsonl'
  for other in (path.parent.parent, path.with_name('x').parent.parent, path.parents[1], BucketPath(run)):
    assert other == run and isinstance(other, BucketPath) and str(other) == 's3://bucket/run'
  assert path.absolute().resolve().relative_to(run).as_posix() == 'vae/metrics.jsonl'
  assert run in path.resolve().parents and str(pickle.loads(pickle.dumps(path))) == str(path)
  assert (path.scheme, path.suffix, path.with_suffix('').name) == ('s3', '.jsonl', 'metrics')


def test_what_is_written_is_read_as_from_any_folder(run, tmp_path):
  files.write_json(run / 'a' / 'x.json', {'a': 1})
  files.write_npz(run / 'b.npz', {'a': np.arange(3)})
  assert files.read_json(run / 'a' / 'x.json') == {'a': 1} and run.is_dir() and (run / 'b.npz').is_file()
  np.testing.assert_array_equal(files.read_npz(run / 'b.npz')['a'], [0, 1, 2])
  assert [path.name for path in run.iterdir()] == ['a', 'b.npz']
  assert list(run.glob('*/x.json')) == [run / 'a' / 'x.json'] == list(run.rglob('*.json'))
  assert (run / 'a' / 'x.json').stat().st_size == len('{\n  "a": 1\n}')
  with (run / 'a' / 'x.json').open() as file:
    assert file.readline() == '{\n'
  with pytest.raises(OSError, match='written whole'):
    (run / 'a' / 'x.json').open('a')
  assert not (run / 'none').exists() and not (run / 'none').is_dir()
  with pytest.raises(UserError, match='s3://bucket/run/none does not exist'), files.reading(run / 'none'):
    (run / 'none').read_text()


def test_what_fails_while_it_is_written_leaves_what_was_there(run):
  files.write_text(run / 'x.txt', 'before')
  with pytest.raises(KeyError), files.replacing(run / 'x.txt') as temporary:
    temporary.write_text('half')
    raise KeyError('bug')
  assert (run / 'x.txt').read_text() == 'before' and [path.name for path in run.iterdir()] == ['x.txt']


def test_a_store_that_does_not_answer_is_neither_damage_nor_absence(run, store):
  files.write_text(run / 'x.json', '{}')
  store.broken = True
  for ask in (run.exists, run.is_dir, run.objects, lambda: list(run.iterdir()), lambda: run.create(b'')):
    with pytest.raises(OSError, match='the store does not answer .*connection lost') as caught:
      ask()
    assert caught.value.errno == errno.EREMOTEIO and files.said_by_the_system(caught.value)
  with pytest.raises(
    UserError, match=r'x.json cannot be read: .*connection lost.*The file was left'
  ) as caught:
    files.read_json(run / 'x.json')
  assert not isinstance(caught.value, files.Damaged)
  with pytest.raises(UserError, match='x.json cannot be written: .*connection lost.*unchanged'):
    files.write_text(run / 'x.json', '')


def test_a_folder_is_moved_object_by_object(run):
  for name in ('5/state/a', '5/meta'):
    (run / name).put(name.encode())
  target = (run / '5').rename(run / 'damaged' / '5')
  assert (target / 'state' / 'a').read_bytes() == b'5/state/a' and not list((run / '5').objects())
  (run / 'damaged').remove(first=('meta',))
  assert not run.objects()


def test_of_several_who_create_an_object_one_does(run):
  assert (run / 'x').create(b'first') and not (run / 'x').create(b'second')
  assert (run / 'x').read_bytes() == b'first'


def test_a_folder_beside_sends_what_has_changed(run, tmp_path, monkeypatch):
  sent = []
  upload = BucketPath.upload
  monkeypatch.setattr(BucketPath, 'upload', lambda path, file: (sent.append(path.name), upload(path, file)))
  (run / 'kept').put(b'kept')
  beside = buckets.Beside(run)
  beside.pull('kept')
  for name in ('done', 'x', 'z'):
    (beside.here / name).write_text(name)
  beside.push(last='done')
  (beside.here / 'x').write_text('longer')
  beside.push()
  assert sent == ['x', 'z', 'done', 'x'] and (run / 'x').read_text() == 'longer'
  assert buckets.Beside(tmp_path).here == tmp_path


def test_a_copy_of_a_folder_follows_it(run, tmp_path):
  for name in ('a/x', 'y'):
    (run / name).put(b'1')
  assert buckets.mirror(run, tmp_path / 'here') == 2
  assert buckets.mirror(run, tmp_path / 'here') == 0
  (run / 'a' / 'x').put(b'2')  # as long as before
  assert buckets.mirror(run, tmp_path / 'here') == 1
  (run / 'a' / 'x').put(b'22')
  (run / 'y').unlink()
  assert buckets.mirror(run, tmp_path / 'here') == 1
  assert (tmp_path / 'here' / 'a' / 'x').read_text() == '22' and not (tmp_path / 'here' / 'y').exists()
  assert buckets.fetched(tmp_path) == tmp_path and (buckets.fetched(run) / 'a' / 'x').read_text() == '22'


def test_data_in_a_bucket_is_copied_to_the_caches(run, tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  (run / 'images.npz').put(b'bytes')
  file = places.fetched('s3://bucket/run/images.npz', 'data.path')
  assert file.read_bytes() == b'bytes' and tmp_path in file.parents and file.name == 'images.npz'
  assert (places.fetched('s3://bucket/run', 'data.path') / 'images.npz').read_bytes() == b'bytes'
  with pytest.raises(UserError, match="data.path is 's3://bucket/none', and there is nothing"):
    places.fetched('s3://bucket/none', 'data.path')


@pytest.mark.parametrize('text', ['ftp://bucket/run', 'memory://run', 's3://', 'S3://bucket'])
def test_other_stores_are_refused(store, text):
  with pytest.raises(UserError, match=r'--workdir is .*written as gs://bucket/folder or s3://bucket/folder'):
    places.anywhere(text, '--workdir')


def test_what_must_be_a_folder_of_this_machine_says_so(store):
  with pytest.raises(UserError, match='config.data.data_dir is .*must be a folder of this machine'):
    places.expanded('gs://bucket/data', 'config.data.data_dir')
  assert str(places.anywhere('s3://bucket/run/', '--workdir')) == 's3://bucket/run'


def test_a_missing_package_is_named(monkeypatch):
  import fsspec

  def missing(*args, **kwargs):
    raise ImportError('Install gcsfs')

  monkeypatch.setattr(fsspec, 'filesystem', missing)
  buckets.filesystem.cache_clear()
  with pytest.raises(
    UserError, match=r"gs://... takes packages .*pip install -e '\.\[cloud\]' \(Install gcsfs"
  ):
    places.anywhere('gs://bucket/run', '--workdir')


def test_no_run_folder_becomes_a_path_of_this_machine():
  """`pathlib.Path('s3://bucket/run')` would be a folder named 's3:': every workdir goes through `places`."""
  for file in pathlib.Path(buckets.__file__).parents[1].rglob('*.py'):
    for node in ast.walk(ast.parse(file.read_text())):
      if isinstance(node, ast.Call) and ast.unparse(node.func).split('.')[-1] == 'Path':
        assert 'workdir' not in ast.unparse(node), f'{file}: {ast.unparse(node)}'


AT = datetime.datetime(2026, 11, 26, 21, 0, tzinfo=datetime.UTC)


@pytest.mark.parametrize('value', ['2026-11-26T21:00:00Z', AT])
def test_the_time_of_an_object_is_read_in_every_form(value):
  seconds = buckets.changed({'updated': value})
  assert seconds == buckets.changed({'created': seconds}) == 1795726800
  assert buckets.changed({}) == 0
