"""TFDS data sets with TFDS's own mock data, and the errors when they are not there."""

import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from vaediff.data.loader import train_batches
from vaediff.data.sources import describe, open_source
from vaediff.errors import UserError

MOCKED = [
  ('cifar10', {'image_size': 32}, 10),
  ('celeb_a', {'image_size': 16, 'crop': 'center', 'crop_size': 140, 'resize': 'bicubic'}, 0),
  ('celeb_a_hq/256', {'image_size': 256, 'eval_split': 'train[90%:]'}, 0),
  ('lsun/church_outdoor', {'image_size': 16, 'crop': 'center', 'resize': 'lanczos'}, 0),
]


@pytest.mark.parametrize('materialize', [True, False])
@pytest.mark.parametrize(('name', 'changes', 'num_classes'), MOCKED)
def test_mocked(make_data, name, changes, num_classes, materialize):
  data = make_data(source='tfds', name=name, materialize=materialize, **changes)
  with tfds.testing.mock_data(num_examples=5):
    source = open_source(data, 'train')
    assert len(source) == 5 and source.num_classes == num_classes
    batches = train_batches(source, batch_size=4, seed=0, start_step=0, num_threads=2, prefetch=2)
    batch = next(batches)
  size = data.image_size
  assert batch['image'].shape == (4, size, size, 3) and batch['image'].dtype == np.uint8
  assert batch['image'].std() > 0
  assert set(batch['label']) <= set(range(max(1, num_classes)))
  assert len(source.label_names) == num_classes


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('cifar10', r'tfds build cifar10 --data_dir=\S+ --file_format=array_record'),
    ('celeb_a_hq/256', 'data256x256.tar.*--manual_dir'),
    ('fashion_mnist', "apt-get install dataset-fashion-mnist.*data.source='idx'"),
    ('lsun/church_outdoor', "tensorflow_io.*data.source='image_folder'"),
    ('celebahq', "'celeb_a_hq/256'"),
    ('celeb_a_hq/257', "'celeb_a_hq/256'"),
    ('', 'data.name'),
  ],
)
def test_missing_says_how_to_get_it(make_data, name, message):
  data = make_data(source='tfds', name=name)
  with pytest.raises(UserError, match=message):
    open_source(data, 'train')
  assert 'not there' in describe(data)


def test_importing_the_data_imports_no_tensorflow():
  code = """
import sys
import tensorflow_datasets
from vaediff.data import builders, loader, pixels, sources
found = {name.split('.')[0] for name in sys.modules} & {'tensorflow', 'flax', 'torch'}
assert not found, found
"""
  subprocess.run([sys.executable, '-c', code], check=True, timeout=120)


@pytest.mark.slow
def test_tensorflow_is_never_imported(tmp_path):
  code = f"""
import sys
import ml_collections
from vaediff.data import builders, loader, pixels, sources
data = ml_collections.ConfigDict(dict(
    source='tfds', name='digits', path='', data_dir={str(tmp_path)!r}, train_split='train',
    eval_split='test', image_size=8, channels=1, num_classes=0, caption_feature='',
    crop='none', crop_size=0, resize='none',
    materialize=False, num_threads=1, prefetch=1))
source = sources.open_source(data, 'train')
next(loader.train_batches(
    source, batch_size=4, seed=0, start_step=0, num_threads=1, prefetch=1))
found = {{name.split('.')[0] for name in sys.modules}} & {{'tensorflow', 'flax', 'torch'}}
assert not found, found
"""
  subprocess.run([sys.executable, '-c', code], check=True, timeout=120)
