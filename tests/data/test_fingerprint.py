"""The fingerprint of a split: of all its bytes and labels, in order, whatever they come from."""

import os
import shutil
import struct

import numpy as np
import pytest
from PIL import Image

from vaediff.data import cache, sources
from vaediff.data.sources import ArraySource, DecodedSource, Source, open_source

IMAGES = np.random.RandomState(0).randint(256, size=(150, 8, 8, 1)).astype(np.uint8)
LABELS = (np.arange(150) % 7).astype(np.int32)
TRAIN = {'train_split': 'train', 'eval_split': 'test', 'channels': 1}


def in_memory(images=IMAGES, labels=LABELS):
  return ArraySource(images=images, labels=labels, label_names=(), num_classes=7).fingerprint


@pytest.fixture
def files(tmp_path):
  """The same images as idx files."""
  for name, part in (('train', slice(150)), ('t10k', slice(7))):
    images, labels = IMAGES[part], LABELS[part].astype(np.uint8)
    header = bytes([0, 0, 8, 3]) + struct.pack('>3i', *images.shape[:3])
    (tmp_path / f'{name}-images-idx3-ubyte').write_bytes(header + images.tobytes())
    header = bytes([0, 0, 8, 1]) + struct.pack('>i', len(labels))
    (tmp_path / f'{name}-labels-idx1-ubyte').write_bytes(header + labels.tobytes())
  return tmp_path


@pytest.mark.parametrize('materialize', [True, False])
def test_it_is_that_of_the_arrays(make_data, files, materialize):
  data = make_data(source='idx', path=str(files), materialize=materialize, **TRAIN)
  assert open_source(data, 'train').fingerprint == in_memory()
  assert open_source(data, 'eval').fingerprint == in_memory(IMAGES[:7], LABELS[:7])
  assert len(in_memory()) == 16
  assert isinstance(open_source(data, 'train'), Source)


@pytest.mark.parametrize('materialize', [True, False])
def test_same_pixels_of_folders_and_npz(make_data, tmp_path, materialize):
  """Both are one shuffled list; names and labels are those of the classes' folders, in their order."""
  order = np.argsort(LABELS, kind='stable')
  np.savez(tmp_path / 'a.npz', images=IMAGES[order], labels=LABELS[order])
  for i in range(150):
    folder = tmp_path / 'pictures' / f'class {LABELS[i]}'
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(IMAGES[i, ..., 0]).save(folder / f'{i:03}.png')
  splits = {'train_split': 'train[:90%]', 'eval_split': 'train[90%:]', 'channels': 1}
  npz = make_data(source='npz', path=str(tmp_path / 'a.npz'), **splits)
  folder = make_data(
    source='image_folder', name='x', path=str(tmp_path / 'pictures'), materialize=materialize, **splits
  )
  found = {split: open_source(npz, split).fingerprint for split in ('train', 'eval')}
  assert found == {split: open_source(folder, split).fingerprint for split in ('train', 'eval')}
  assert found['train'] != found['eval']
  shutil.move(tmp_path / 'pictures', tmp_path / 'elsewhere')
  folder.path, folder.name = str(tmp_path / 'elsewhere'), 'other'
  assert open_source(folder, 'train').fingerprint == found['train']


def test_every_bit_label_and_place_counts():
  found = {in_memory()}
  for at in (0, IMAGES.size // 3, IMAGES.size - 1):
    images = IMAGES.copy()
    images.flat[at] ^= 128
    found.add(in_memory(images))
  for at in (0, 77, 149):
    labels = LABELS.copy()
    labels[at] += 1
    found.add(in_memory(labels=labels))
  found |= {in_memory(IMAGES[:-1], LABELS[:-1]), in_memory(IMAGES[::-1].copy(), LABELS)}
  found.add(in_memory(IMAGES.reshape(150, 4, 16, 1)))
  assert len(found) == 10


def test_other_settings_are_other_images(make_data, files):
  data = make_data(source='idx', path=str(files), **TRAIN)
  found = {open_source(data, 'train').fingerprint}
  for image_size, resize in ((16, 'pad'), (4, 'box'), (4, 'lanczos')):
    data.image_size, data.resize = image_size, resize
    found.add(open_source(data, 'train').fingerprint)
  assert len(found) == 4


def test_swapped_file_is_noticed_whatever_its_time(make_data, tmp_path):
  """A file of the same size and time holds other images: 64 evenly spaced ones are the same."""
  path, splits = tmp_path / 'a.npz', {'train_split': 'train[:140]', 'eval_split': 'train[140:]'}
  data = make_data(source='npz', path=str(path), channels=1, **splits)
  np.savez(path, images=IMAGES, labels=LABELS)
  times = path.stat()
  before = open_source(data, 'train')
  changed = IMAGES.copy()
  changed[1::2] ^= 1
  np.savez(path, images=changed, labels=LABELS)

  os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
  assert path.stat().st_size == times.st_size and path.stat().st_mtime_ns == times.st_mtime_ns
  assert open_source(data, 'train').fingerprint != before.fingerprint


def test_synthetic_and_tfds(make_data, tmp_path):
  synthetic = make_data()
  found = {split: open_source(synthetic, split).fingerprint for split in ('train', 'eval')}
  assert found == {split: open_source(synthetic, split).fingerprint for split in ('train', 'eval')}
  digits = make_data(source='tfds', name='digits', channels=1)
  stored = open_source(digits, 'train')
  labels = np.asarray(stored.labels)
  assert stored.fingerprint == in_memory(np.array(stored.images), labels)
  digits.materialize = False
  decoded = open_source(digits, 'train')
  assert isinstance(decoded, DecodedSource) and decoded.fingerprint == stored.fingerprint
  assert len({*found.values(), stored.fingerprint}) == 3


def test_it_is_found_once(make_data, files, monkeypatch):
  """All images are decoded in one pass, and never again to know what they are."""
  data = make_data(source='idx', path=str(files), materialize=False, **TRAIN)
  first = open_source(data, 'train').fingerprint
  monkeypatch.setattr(cache, '_build', lambda *args: pytest.fail('built again'))
  monkeypatch.setattr(sources, 'read_fitted', lambda *args: pytest.fail('decoded again'))
  assert open_source(data, 'train').fingerprint == first


def test_number_of_threads_does_not_matter(make_data, files):
  found = set()
  for threads in (0, 1, 7):
    data = make_data(source='idx', path=str(files), num_threads=threads, **TRAIN)
    data.data_dir = f'{data.data_dir}{threads}'
    found.add(open_source(data, 'train').fingerprint)
  assert len(found) == 1
