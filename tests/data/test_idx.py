import gzip
import struct

import numpy as np
import pytest

from vaediff.data.sources import open_source
from vaediff.errors import UserError

COUNTS = {'train': 12, 't10k': 5}


def idx_bytes(array):
  header = struct.pack('>BBBB', 0, 0, 8, array.ndim) + struct.pack(f'>{array.ndim}i', *array.shape)
  return header + array.tobytes()


def write(file, content):
  if file.suffix == '.gz':
    content = gzip.compress(content)
  file.write_bytes(content)


@pytest.fixture(params=['', '.gz'])
def suffix(request):
  return request.param


@pytest.fixture
def folder(tmp_path, suffix):
  random = np.random.RandomState(0)
  for prefix, count in COUNTS.items():
    images = random.randint(256, size=(count, 6, 7)).astype(np.uint8)
    write(tmp_path / f'{prefix}-images-idx3-ubyte{suffix}', idx_bytes(images))
    labels = (np.arange(count) % 4).astype(np.uint8)
    write(tmp_path / f'{prefix}-labels-idx1-ubyte{suffix}', idx_bytes(labels))
  return tmp_path


@pytest.fixture
def data(make_data, folder):
  return make_data(source='idx', name='mini', path=str(folder), channels=1, resize='pad')


@pytest.mark.parametrize('materialize', [True, False])
def test_reads_pixels_and_labels(data, materialize):
  data.materialize = materialize
  source = open_source(data, 'train')
  assert len(source) == 12 and source.image_shape == (8, 8, 1) and source.num_classes == 4
  first = np.random.RandomState(0).randint(256, size=(12, 6, 7)).astype(np.uint8)
  batch = source.read(np.array([7, 2]))
  np.testing.assert_array_equal(batch['image'][:, 1:7, 0:7, 0], first[[7, 2]])
  np.testing.assert_array_equal(batch['label'], [3, 2])
  assert batch['label'].dtype == np.int32
  assert len(open_source(data, 'eval')) == 5


def test_slices_part_the_files(data):
  data.train_split, data.eval_split = 'train[:30%]', 'train[30%:]'
  train, held_out = open_source(data, 'train'), open_source(data, 'eval')
  assert (len(train), len(held_out)) == (4, 8)
  np.testing.assert_array_equal(held_out.labels, np.arange(4, 12) % 4)


def test_known_names(data):
  data.name = 'fashion_mnist'
  source = open_source(data, 'eval')
  assert source.num_classes == 10 and source.label_names[9] == 'Ankle boot'


def test_truncated_file_is_named(data, folder, suffix):
  file = folder / f'train-images-idx3-ubyte{suffix}'
  whole = gzip.decompress(file.read_bytes()) if suffix else file.read_bytes()
  write(file, whole[:-1])
  with pytest.raises(UserError, match=f'{file.name} holds 519 bytes.* announces 520'):
    open_source(data, 'train')
  file.write_bytes(file.read_bytes()[:-9])  # For .gz: the compressed stream itself ends early.
  with pytest.raises(UserError, match=file.name):
    open_source(data, 'train')
  file.write_bytes(b'')
  with pytest.raises(UserError, match=file.name):
    open_source(data, 'train')


def test_bad_magic_and_counts(data, folder, suffix):
  labels = folder / f't10k-labels-idx1-ubyte{suffix}'
  write(labels, idx_bytes(np.zeros((5, 1), np.uint8)))
  with pytest.raises(UserError, match=f'{labels.name} starts with 0x00000802'):
    open_source(data, 'eval')
  write(labels, idx_bytes(np.zeros(4, np.uint8)))
  with pytest.raises(UserError, match='5 images.* 4 labels'):
    open_source(data, 'eval')


def test_plain_bytes_called_gz(data, folder):
  for file in folder.glob('train-labels*'):
    file.unlink()
  file = folder / 'train-labels-idx1-ubyte.gz'
  file.write_bytes(b'<html>not found</html>')
  with pytest.raises(UserError, match=file.name):
    open_source(data, 'train')


def test_missing_file_and_split(data, folder, suffix):
  data.eval_split = 'validation'
  with pytest.raises(UserError, match="data.eval_split='validation'.*'train', 'test'"):
    open_source(data, 'train')
  data.eval_split = 'test'
  (folder / f't10k-images-idx3-ubyte{suffix}').unlink()
  with pytest.raises(UserError, match='apt-get install dataset-fashion-mnist'):
    open_source(data, 'train')
