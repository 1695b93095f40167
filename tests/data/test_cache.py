import json
import multiprocessing
import os

import numpy as np
import pytest

from vaediff.data import cache
from vaediff.data.sources import describe, open_source, prepare
from vaediff.errors import UserError

IMAGES = np.random.RandomState(0).randint(256, size=(40, 8, 8, 3)).astype(np.uint8)


@pytest.fixture
def data(make_data, tmp_path):
  path = tmp_path / 'images.npz'
  np.savez(path, images=IMAGES, labels=np.arange(40) % 3)
  return make_data(
    source='npz', name='a/b', path=str(path), train_split='train[:30]', eval_split='train[30:]'
  )


def folders(data):
  return sorted((cache.data_root(data) / 'vaediff').iterdir())


def test_files_and_names(data):
  source = open_source(data, 'train')
  (folder,) = folders(data)
  assert folder.name.startswith('a_b-8px-none-none-') and len(folder.name.split('-')[-1]) == 12
  assert sorted(file.name for file in folder.iterdir()) == [
      'eval-images.npy', 'eval-labels.npy', 'meta.json', 'train-images.npy', 'train-labels.npy'
  ]  # fmt: skip
  assert isinstance(source.images, np.memmap) and source.images.dtype == np.uint8
  splits = json.loads((folder / 'meta.json').read_text())['splits']
  assert {name: facts['shape'] for name, facts in splits.items()} == {
    'train': [30, 8, 8, 3], 'eval': [10, 8, 8, 3]
  }  # fmt: skip
  assert splits['train']['fingerprint'] == source.fingerprint and splits['train']['dtype'] == 'uint8'
  assert type(source.read(np.array([1]))['image']) is np.ndarray


def test_second_opening_writes_nothing(data, monkeypatch):
  first = open_source(data, 'train').images[:]
  monkeypatch.setattr(cache, '_build', lambda *args: pytest.fail('built again'))
  np.testing.assert_array_equal(open_source(data, 'train').images, first)


@pytest.mark.parametrize(
  'changes',
  [
    {'image_size': 4, 'resize': 'box'},
    {'image_size': 4, 'resize': 'bilinear'},
    {'image_size': 4, 'crop': 'center', 'crop_size': 4},
    {'train_split': 'train[:20]'},
  ],
)
def test_another_setting_is_another_folder(data, changes):
  open_source(data, 'train')
  data.update(changes)
  source = open_source(data, 'train')
  assert len(folders(data)) == 2
  assert source.image_shape == (data.image_size, data.image_size, 3)


def test_changed_file_is_another_folder(data):
  before = open_source(data, 'train').images[:]
  np.savez(data.path, images=255 - IMAGES, labels=np.arange(40) % 3)
  status = os.stat(data.path)  # Of the same size; clocks may be too coarse to tell the times apart.
  os.utime(data.path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
  np.testing.assert_array_equal(open_source(data, 'train').images, 255 - before)
  assert len(folders(data)) == 2


def test_threads_do_not_matter_for_bytes_or_name(data):
  first = open_source(data, 'train').images[:]
  data.num_threads, data.prefetch = 0, 0
  np.testing.assert_array_equal(open_source(data, 'train').images, first)
  assert len(folders(data)) == 1


def test_interrupted_build_leaves_no_folder(data, monkeypatch):
  def interrupt(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr(cache.arrays, 'digest_of', interrupt)  # After the first images were written.
  with pytest.raises(KeyboardInterrupt):
    open_source(data, 'train')
  assert folders(data) == []


def _build_and_die(data):
  cache.arrays.digest_of = lambda *args: os._exit(9)
  open_source(data, 'train')


def _build_and_report(data, barrier, results):
  build = cache._build

  def build_together(*args):
    build(*args)
    barrier.wait(30)  # Both have a complete folder to rename.

  cache._build = build_together
  results.put(open_source(data, 'train').images.tobytes())


def test_killed_build_is_not_taken_for_a_cache(data):
  process = multiprocessing.get_context('fork').Process(target=_build_and_die, args=(data,))
  process.start()
  process.join(60)
  assert process.exitcode == 9
  (left,) = folders(data)
  assert '.incomplete-' in left.name
  assert 'not made yet' in describe(data)
  assert len(open_source(data, 'train')) == 30


def test_two_processes_build_one_folder(data):
  context = multiprocessing.get_context('fork')
  barrier, results = context.Barrier(2), context.Queue()
  processes = [context.Process(target=_build_and_report, args=(data, barrier, results)) for _ in range(2)]
  for process in processes:
    process.start()
  contents = [results.get(timeout=60) for _ in processes]
  for process in processes:
    process.join(60)
    assert process.exitcode == 0
  assert contents[0] == contents[1] and len(contents[0]) == 30 * 8 * 8 * 3
  assert len(folders(data)) == 1


def test_damaged_folder_says_delete(data):
  open_source(data, 'train')
  (folder,) = folders(data)
  with open(folder / 'train-images.npy', 'rb+') as file:
    file.truncate(500)
  with pytest.raises(UserError, match='train-images.npy.*delete its folder'):
    open_source(data, 'train')


def test_unwritable_folder_is_named(data, tmp_path):
  (tmp_path / 'file').touch()
  data.data_dir = str(tmp_path / 'file')
  with pytest.raises(UserError, match='data.data_dir'):
    open_source(data, 'train')


def test_root_is_that_of_tfds(make_data, monkeypatch, tmp_path):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  assert cache.data_root(make_data(data_dir='')) == tmp_path
  monkeypatch.delenv('TFDS_DATA_DIR')
  monkeypatch.setenv('HOME', '/home/someone')
  assert str(cache.data_root(make_data(data_dir=''))) == '/home/someone/tensorflow_datasets'


def test_prepare_and_describe(data):
  assert 'images.npz' in describe(data) and 'not made yet' in describe(data)
  lines = []
  prepare(data, lines.append)
  assert lines[-2] == 'train: 30 images of 8x8x3, 3 classes'
  assert lines[-1] == 'eval: 10 images of 8x8x3, 3 classes'
  assert 'not' not in describe(data)
  data.eval_split = 'train[35:]'
  assert 'not made yet' in describe(data)
  os.remove(data.path)
  assert 'not there yet' in describe(data)


def test_describe_leaves_out_a_changed_folder(data):
  """It is named when it is opened; another one with the same settings may be whole."""
  open_source(data, 'train')
  (folder,) = folders(data)
  assert 'not made yet' not in describe(data)
  for content in ('', '[]', '{}'):
    (folder / 'meta.json').write_text(content)
    assert 'not made yet' in describe(data)


def test_more_classes_than_the_config_says_writes_nothing(data):
  data.num_classes = 2
  with pytest.raises(UserError, match='data.num_classes is 2, but the labels of these images are of 3'):
    open_source(data, 'train')
  assert not (cache.data_root(data) / 'vaediff').exists()
