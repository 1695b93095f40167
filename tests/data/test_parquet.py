import io
import json
import sys

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from vaediff.data.sources import open_source
from vaediff.errors import UserError


def encoded(value):
  content = io.BytesIO()
  Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(content, 'PNG')
  return content.getvalue()


def write(file, values, schema=True, **changes):
  """Writes rows as `datasets` does: an image in a struct, names of classes in the metadata."""
  columns = {
    'image': [{'bytes': encoded(value), 'path': f'{value}.png'} for value in values],
    'label': [value % 2 for value in values],
    'text': [f'a picture of {value}' for value in values],
  }
  table = pa.table({name: column for name, column in (columns | changes).items() if column is not None})
  if schema:
    features = {'image': {'_type': 'Image'}, 'label': {'names': ['even', 'odd'], '_type': 'ClassLabel'},
                'text': {'dtype': 'string', '_type': 'Value'}}  # fmt: skip
    table = table.replace_schema_metadata({'huggingface': json.dumps({'info': {'features': features}})})
  file.parent.mkdir(parents=True, exist_ok=True)
  parquet.write_table(table, file, row_group_size=4)


@pytest.fixture
def root(tmp_path):
  write(tmp_path / 'set' / 'data' / 'train-00000-of-00002.parquet', range(10))
  write(tmp_path / 'set' / 'data' / 'train-00001-of-00002.parquet', range(10, 17))
  write(tmp_path / 'set' / 'data' / 'test-00000-of-00001.parquet', range(20, 25))
  return tmp_path / 'set'


@pytest.fixture
def data(make_data, root):
  return make_data(source='parquet', path=str(root), caption_feature='text')


@pytest.mark.parametrize('materialize', [True, False])
def test_rows_are_read_in_order_with_label_and_caption(data, materialize):
  data.materialize = materialize
  for split, values in (('train', range(17)), ('eval', range(20, 25))):
    source = open_source(data, split)
    batch = source.read(np.arange(len(source)))
    assert batch['image'][:, 3, 3, 1].tolist() == list(values)
    assert batch['label'].tolist() == [value % 2 for value in values]
    assert source.captions == tuple(f'a picture of {value}' for value in values)
    assert source.label_names == ('even', 'odd') and source.num_classes == 2
  np.testing.assert_array_equal(
    open_source(data, 'train').read(np.array([16, 2]))['image'][:, 0, 0, 0], [16, 2]
  )


def test_slices_of_one_file(data, root):
  data.update({'path': str(root / 'data' / 'train-00000-of-00002.parquet'), 'caption_feature': ''})
  data.update({'train_split': 'train[:70%]', 'eval_split': 'train[70%:]'})
  assert open_source(data, 'eval').images[:, 0, 0, 0].tolist() == [7, 8, 9]
  assert open_source(data, 'eval').captions == ()
  data.eval_split = 'train[60%:]'
  with pytest.raises(UserError, match='share 1 images'):
    open_source(data, 'train')


def test_without_the_metadata_of_datasets(data, tmp_path):
  for split in ('train', 'test'):
    start = 40 if split == 'test' else 0
    write(tmp_path / 'plain' / f'{split}.parquet', range(start, start + 6), schema=False)
  data.path = str(tmp_path / 'plain')
  source = open_source(data, 'train')
  assert source.num_classes == 2 and source.label_names == () and len(source.captions) == 6
  for split in ('train', 'test'):
    start = 40 if split == 'test' else 0
    images = [encoded(value) for value in range(start, start + 6)]
    write(
      tmp_path / 'bytes' / f'{split}.parquet', range(start, start + 6), schema=False, image=images, label=None
    )
  data.path = str(tmp_path / 'bytes')
  source = open_source(data, 'train')
  assert source.num_classes == 0 and source.images[:, 0, 0, 0].tolist() == list(range(6))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'caption_feature': 'caption'}, "caption_feature='caption' is no text column of .*those are text"),
    ({'caption_feature': 'label'}, "caption_feature='label' is no text column"),
    ({'eval_split': 'validation'}, "data.eval_split is of 'validation', but .* has files of test, train"),
    ({'path': ''}, "data.path='' is no .parquet file"),
    ({'path': '/nowhere'}, "data.path='/nowhere' is no .parquet file"),
  ],
)
def test_what_is_not_there_is_named(data, changes, message):
  data.update(changes)
  with pytest.raises(UserError, match=message):
    open_source(data, 'train')


def test_rows_without_a_value_are_named(data, root):
  write(root / 'data' / 'test-00000-of-00001.parquet', range(20, 25), text=['a', None, 'b', 'c', 'd'])
  with pytest.raises(UserError, match="image 1 of test has None in 'text'"):
    open_source(data, 'train')
  broken = [{'bytes': b'no image', 'path': ''}] + [{'bytes': encoded(1), 'path': ''}] * 4
  write(root / 'data' / 'test-00000-of-00001.parquet', range(20, 25), image=broken)
  with pytest.raises(UserError, match='image 0 of test cannot be read: it is none of PNG'):
    open_source(data, 'train')


def test_a_damaged_file_is_named(data, root):
  file = root / 'data' / 'train-00001-of-00002.parquet'
  file.write_bytes(file.read_bytes()[:200])
  with pytest.raises(UserError, match='train-00001-of-00002.parquet is damaged'):
    open_source(data, 'train')


def test_without_images_or_the_library(data, root, monkeypatch):
  for file in (root / 'data').glob('*.parquet'):
    write(file, range(4), schema=False, image=None)
  with pytest.raises(UserError, match='has the columns label, text, and none of images'):
    open_source(data, 'train')
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  with pytest.raises(UserError, match="data.source='parquet' needs the package pyarrow"):
    open_source(data, 'train')
