"""Places and fields that cannot be used, and a cache that was changed after it was made."""

import io
import json
import os
import pathlib
import shutil

import ml_collections
import numpy as np
import pytest

from vaediff.data import cache
from vaediff.data.sources import describe, open_source, prepare
from vaediff.errors import UserError

IMAGES = np.random.RandomState(0).randint(256, size=(20, 8, 8, 3)).astype(np.uint8)
LABELS = np.arange(20)


def test_home_is_put_in(make_slices, tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  np.savez(tmp_path / 'a.npz', images=IMAGES)
  data = make_slices(path='~/a.npz', data_dir='~/kept')
  assert len(open_source(data, 'train')) == 15 and 'a.npz' in describe(data)
  assert len(list((tmp_path / 'kept' / 'vaediff').iterdir())) == 1
  monkeypatch.chdir(tmp_path)
  assert not (tmp_path / '~').exists()


@pytest.mark.parametrize('source', ['npz', 'image_folder', 'idx'])
def test_home_of_nobody(make_slices, source):
  splits = {'train_split': 'train', 'eval_split': 'test'} if source == 'idx' else {}
  data = make_slices(source=source, path='~no_such_user/a', **splits)
  for use in (open_source, lambda data, _: describe(data), lambda data, _: prepare(data)):
    with pytest.raises(UserError, match="data.path is '~no_such_user/a'.*give the whole path"):
      use(data, 'train')


def test_no_home(make_slices, tmp_path, monkeypatch):
  np.savez(tmp_path / 'a.npz', images=IMAGES)
  monkeypatch.setattr(pathlib.Path, 'expanduser', lambda path: (_ for _ in ()).throw(RuntimeError('no home')))
  with pytest.raises(UserError, match='data.path.*the home folder of this user is not known'):
    open_source(make_slices(path='~/a.npz'), 'train')


@pytest.mark.parametrize('value', ['', None])
def test_empty_variable_is_none(make_slices, monkeypatch, value):
  monkeypatch.setenv('HOME', '/home/someone')
  monkeypatch.delenv('TFDS_DATA_DIR', raising=False)
  if value is not None:
    monkeypatch.setenv('TFDS_DATA_DIR', value)
  assert str(cache.data_root(make_slices(data_dir=''))) == '/home/someone/tensorflow_datasets'


@pytest.mark.parametrize('field', ['path', 'data_dir', 'name'])
def test_zero_byte(make_slices, tmp_path, field):
  np.savez(tmp_path / 'a.npz', images=IMAGES)
  data = make_slices(path=str(tmp_path / 'a.npz'))
  data[field] = 'a\0b'
  with pytest.raises(UserError, match=f'data.{field}=.*zero byte'):
    open_source(data, 'train')


@pytest.mark.parametrize('place', ['file', '/proc/no_such_place', '/dev/full'])
def test_data_dir_that_cannot_be_written(make_slices, tmp_path, place):
  (tmp_path / 'file').touch()
  np.savez(tmp_path / 'a.npz', images=IMAGES)
  data = make_slices(path=str(tmp_path / 'a.npz'), data_dir=str(tmp_path / place))
  with pytest.raises(
    UserError, match="data.data_dir: '.*' cannot be written: (Not a|No such).*another folder"
  ):
    open_source(data, 'train')


@pytest.mark.parametrize('which', ['images', 'labels'])
def test_full_disk(make_slices, tmp_path, monkeypatch, which):
  np.savez(tmp_path / 'a.npz', images=IMAGES, labels=LABELS)
  pwrite = os.pwrite

  def write(file, content, offset):
    if f'train-{which}' in os.readlink(f'/proc/self/fd/{file}'):
      raise OSError(28, 'No space left on device')
    return pwrite(file, content, offset)

  monkeypatch.setattr(os, 'pwrite', write)
  data = make_slices(path=str(tmp_path / 'a.npz'))
  with pytest.raises(
    UserError, match=f'data.data_dir: .*train-{which}.npy. cannot be written: No space left'
  ):
    open_source(data, 'train')
  assert not list((tmp_path / 'data_dir' / 'vaediff').iterdir())


# Fields -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('source', 'web'), ('source', ''), ('channels', 0), ('channels', 2), ('channels', 4), ('crop', 'left'),
    ('resize', 'squash'), ('resize', 'squash_pad'), ('resize', 'squash_none'), ('image_size', 0),
    ('image_size', -8), ('image_size', 10**9), ('image_size', float('nan')), ('crop_size', -1),
    ('num_threads', -1), ('num_threads', 10**6), ('prefetch', -1), ('num_classes', -1),
    ('num_classes', 2**31),
  ],
)  # fmt: skip
def test_fields(make_slices, field, value):
  data = make_slices(source='synthetic')
  data = ml_collections.ConfigDict(dict(data) | {field: value})
  for use in (lambda: open_source(data, 'train'), lambda: describe(data)):
    with pytest.raises(UserError, match=rf'data\.{field} .*{value!r}'):
      use()


# The array cache ----------------------------------------------------------------------------------------


@pytest.fixture
def cached(make_slices, tmp_path):
  """Returns the data section and the cache's folder."""
  np.savez(tmp_path / 'a.npz', images=IMAGES, labels=LABELS % 3)
  data = make_slices(path=str(tmp_path / 'a.npz'))
  open_source(data, 'train')
  (folder,) = (tmp_path / 'data_dir' / 'vaediff').iterdir()
  return data, folder


def change_pixel(file):
  array = np.load(file, mmap_mode='r+')
  array.flat[-1] ^= 1
  array.flush()


def keep_time(damage):
  def damage_and_keep(file):
    times = os.stat(file)
    damage(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))

  return damage_and_keep


def zipped():
  file = io.BytesIO()
  np.savez(file, images=IMAGES)
  return file.getvalue()


def rewrite(change):
  def write(file):
    np.save(file, change(np.load(file)))

  return write


CHANGES = {
  'one bit': change_pixel,
  'one bit, at the same time': keep_time(change_pixel),
  'other rows': rewrite(lambda x: x[::-1]),
  'fewer rows': rewrite(lambda x: x[:-1]),
  'more rows': rewrite(lambda x: np.concatenate([x, x])),
  'another type': rewrite(lambda x: x.astype(np.float32)),
  'another axis': rewrite(lambda x: x[..., None]),
  'columns first': rewrite(lambda x: np.asfortranarray(np.stack([x, x]).T)),
  'a number': rewrite(lambda x: x.sum()),
  'truncated': lambda f: f.write_bytes(f.read_bytes()[:-1]),
  'cut in its header': lambda f: f.write_bytes(f.read_bytes()[:20]),
  'empty': lambda f: f.write_bytes(b''),
  'a text': lambda f: f.write_text('hello'),
  'an npz': lambda f: f.write_bytes(zipped()),
  'objects': lambda f: np.save(f, np.array([{}]), allow_pickle=True),
  'gone': pathlib.Path.unlink,
}


@pytest.mark.parametrize('which', ['images', 'labels'])
@pytest.mark.parametrize('case', CHANGES)
def test_cached_array(cached, case, which):
  data, folder = cached
  file = folder / f'train-{which}.npy'
  CHANGES[case](file)
  with pytest.raises(UserError, match=f"{file} is .*delete its folder '{folder}': it is made again"):
    open_source(data, 'train')
  shutil.rmtree(folder)
  assert len(open_source(data, 'train')) == 15


def edited(change):
  def edit(file):
    meta = json.loads(file.read_text())
    change(meta)
    file.write_text(json.dumps(meta))

  return edit


META = {
  'empty': lambda f: f.write_bytes(b''),
  'half': lambda f: f.write_bytes(f.read_bytes()[:100]),
  'a list': lambda f: f.write_text('[]'),
  'nothing': lambda f: f.write_text('{}'),
  'null': lambda f: f.write_text('null'),
  'no text': lambda f: f.write_bytes(b'\xff\xfe\x00'),
  'nested deeply': lambda f: f.write_text('[' * 100_000),
  'more classes': edited(lambda meta: meta.update(num_classes=10)),
  'other names': edited(lambda meta: meta.update(label_names=['a'])),
  'another shape': edited(lambda meta: meta['splits']['train'].update(shape=[3, 8, 8, 3])),
  'another fingerprint': edited(lambda meta: meta['splits']['train'].update(fingerprint='0' * 16)),
  'no splits': edited(lambda meta: meta.pop('splits')),
  'no digest': edited(lambda meta: meta.pop('digest')),
}


@pytest.mark.parametrize('materialize', [True, False])
@pytest.mark.parametrize('case', META)
def test_cached_meta(cached, case, materialize):
  data, folder = cached
  data.materialize = materialize
  if not materialize:
    shutil.rmtree(folder)
    open_source(data, 'train')
    (folder,) = folder.parent.iterdir()
  META[case](folder / 'meta.json')
  with pytest.raises(UserError, match=f"{folder / 'meta.json'} is damaged .*delete its folder '{folder}'"):
    open_source(data, 'train')


def test_cache_without_meta(cached):
  data, folder = cached
  (folder / 'meta.json').unlink()
  with pytest.raises(UserError, match=f"{folder / 'meta.json'} is missing; delete its folder '{folder}'"):
    open_source(data, 'train')
