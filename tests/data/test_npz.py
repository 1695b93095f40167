import numpy as np
import pytest

from vaediff.data.sources import open_source
from vaediff.errors import UserError

IMAGES = np.random.RandomState(0).randint(256, size=(20, 8, 8, 3)).astype(np.uint8)


@pytest.fixture
def data(make_data, tmp_path):
  return make_data(
    source='npz',
    path=str(tmp_path / 'images.npz'),
    train_split='train[:75%]',
    eval_split='train[75%:]',
  )


@pytest.mark.parametrize('key', ['images', 'image', 'x_train', 'arr_0'])
def test_slices_part_the_shuffled_images(data, key):
  np.savez(data.path, **{key: IMAGES, 'labels': np.arange(20)})
  train, held_out = open_source(data, 'train'), open_source(data, 'eval')
  assert (len(train), len(held_out), train.num_classes) == (15, 5, 20)
  labels = np.concatenate([train.labels, held_out.labels])
  assert sorted(labels) == list(range(20)) and labels.tolist() != list(range(20))
  both = np.concatenate([train.images, held_out.images])
  np.testing.assert_array_equal(both, IMAGES[labels])


def test_grey_without_labels_on_the_fly(data):
  np.savez_compressed(data.path, images=IMAGES[..., 0])
  data.channels, data.materialize = 1, False
  source = open_source(data, 'train')
  batch = source.read(np.arange(15))
  assert source.num_classes == 0 and batch['image'].shape == (15, 8, 8, 1)
  assert not batch['label'].any()


@pytest.mark.parametrize(
  ('arrays', 'message'),
  [
    ({'images': IMAGES / 255.0}, r'float64.*np.round\(255'),
    ({'images': IMAGES[0, 0]}, r'uint8\[8, 3\]'),
    ({'pictures': IMAGES}, "'pictures'.*'x_train'"),
    ({'images': IMAGES, 'labels': np.zeros(19, int)}, r"'labels' is int64\[19\]"),
    ({'images': IMAGES, 'labels': np.zeros(20)}, "'labels' is float64"),
    ({'images': np.array([{}], object)}, r"'images' is object\[1\], but must be uint8"),
  ],
)
def test_unusable_arrays(data, arrays, message):
  np.savez(data.path, **arrays)
  with pytest.raises(UserError, match=message):
    open_source(data, 'train')


def test_damaged_and_missing_file(data):
  with pytest.raises(UserError, match='data.path'):
    open_source(data, 'train')
  np.savez(data.path, images=IMAGES)
  with open(data.path, 'rb+') as file:
    file.truncate(1000)
  with pytest.raises(UserError, match='images.npz is damaged.*numpy.savez'):
    open_source(data, 'train')


def test_malformed_splits(data):
  np.savez(data.path, images=IMAGES)
  for split, message in [
    ('train[:5', 'is no split'),
    ('test', 'one list'),
    ('train[20:]', 'none of'),
  ]:
    data.eval_split = split
    with pytest.raises(UserError, match=f'data.eval_split.*{message}'):
      open_source(data, 'train')


def test_more_classes_than_the_config_knows_of(tmp_path, make_data):
  image = np.zeros((8, 8, 8, 3), np.uint8)
  np.savez(tmp_path / 'a.npz', images=image, labels=np.arange(8) % 4)
  splits = {'train_split': 'train[:6]', 'eval_split': 'train[6:]'}
  data = make_data(source='npz', path=str(tmp_path / 'a.npz'), **splits)
  assert open_source(data, 'train').num_classes == 4
  data.num_classes = 4
  open_source(data, 'train')
  data.num_classes = 3
  with pytest.raises(UserError, match='num_classes is 3, but the labels of these images are of 4 classes'):
    open_source(data, 'train')
