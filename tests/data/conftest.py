"""The data section of a config, with every field, and a cache in the test's own folder; how it is refused."""


import ml_collections
import pytest


@pytest.fixture
def make_data(tmp_path):
  """Returns a function from changed fields to a complete data config."""

  def make(**changes):
    data = ml_collections.ConfigDict({
        'source': 'synthetic',
        'name': '',
        'path': '',
        'data_dir': str(tmp_path / 'data_dir'),
        'train_split': 'train',
        'eval_split': 'test',
        'image_size': 8,
        'channels': 3,
        'num_classes': 0,
        'caption_feature': '',
        'crop': 'none',
        'crop_size': 0,
        'resize': 'none',
        'materialize': True,
        'num_threads': 2,
        'prefetch': 2,
    })  # fmt: skip
    with data.unlocked():
      for name, value in changes.items():
        assert name in data
        data[name] = value
    return data

  return make


@pytest.fixture
def make_slices(make_data):
  """As `make_data`, of one list of images, three quarters of it to train."""
  return lambda **changes: make_data(
    **({'source': 'npz', 'train_split': 'train[:75%]', 'eval_split': 'train[75%:]'} | changes)
  )
