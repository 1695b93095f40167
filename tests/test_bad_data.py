"""Data that cannot be used: each ends with a message that names file or field and what to do.

No JAX program is needed. `main` prints a UserError and ends with status 2.
"""

import gzip
import io
import json
import os
import pathlib
import shutil
import struct
import zipfile

import ml_collections
import numpy as np
import pytest
from PIL import Image
from refusals import refused

from vaediff.data.sources import open_source
from vaediff.errors import UserError

IMAGES = np.random.RandomState(0).randint(256, size=(20, 8, 8, 3)).astype(np.uint8)
SPLITS = {'train_split': 'train[:75%]', 'eval_split': 'train[75%:]'}


@pytest.fixture
def make(tmp_path):
  """Returns a function from changed fields to a complete data section."""

  def make(**changes):
    data = {
      'source': 'npz', 'name': '', 'path': '', 'data_dir': str(tmp_path / 'data_dir'), 'image_size': 8,
      'channels': 3, 'num_classes': 0, 'caption_feature': '',
      'crop': 'none', 'crop_size': 0, 'resize': 'none', 'materialize': True,
      'num_threads': 2, 'prefetch': 2, **SPLITS,
    }  # fmt: skip
    return ml_collections.ConfigDict(data | changes)

  return make


# npz ----------------------------------------------------------------------------------------------------


def npz_with(header, content=b'', method=zipfile.ZIP_STORED):
  """Returns an npz file whose images have a header as written here."""
  text = repr(header).encode() if isinstance(header, dict) else header
  text = text.ljust(117) + b'\n'
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w', method) as archive:
    archive.writestr('images.npy', b'\x93NUMPY\1\0' + struct.pack('<H', len(text)) + text + content)
  return file.getvalue()


def header_of(shape, kind='|u1'):
  return {'descr': kind, 'fortran_order': False, 'shape': shape}


def npz(**arrays):
  file = io.BytesIO()
  np.savez(file, **arrays)
  return file.getvalue()


def patched(content, at, value):
  """Returns a zip with a field of its first local and central header changed; `at`: in the local one."""
  content, central = bytearray(content), content.index(b'PK\1\2')
  content[at : at + 2] = content[central + at + 2 : central + at + 4] = struct.pack('<H', value)
  return bytes(content)


def flipped(content):
  content = bytearray(content)
  content[len(content) // 2] ^= 1
  return bytes(content)


LABELS = np.arange(20)
BAD_NPZ = {
  'empty': (b'', 'is damaged .*numpy.savez'),
  'a text': (b'hello', 'is damaged .*numpy.savez'),
  'bytes': (IMAGES.tobytes(), 'is damaged'),
  'truncated': (npz(images=IMAGES)[:2000], 'is damaged'),
  'a flipped bit': (flipped(npz(images=IMAGES)), r'is damaged \(Bad CRC-32'),
  'encrypted': (patched(npz(images=IMAGES), 6, 1), 'is damaged .*encrypted'),
  'unknown compression': (patched(npz(images=IMAGES), 8, 99), 'is damaged .*compression'),
  'a header of terabytes': (
    npz_with(header_of((2**40, 8, 8, 3)), b'123'),
    r'is damaged \(the header of images',
  ),
  'a header beyond 64 bits': (
    npz_with(header_of((2**62, 2**62, 8, 3))),
    r'is damaged \(the header of images',
  ),
  'a negative size': (npz_with(header_of((-1, -8, 8, 3)), bytes(192)), r'is damaged \(the header of images'),
  'too few pixels': (npz_with(header_of((20, 8, 8, 3)), bytes(100)), r'is damaged \(the header of images'),
  'too many pixels': (npz_with(header_of((20, 8, 8, 3)), bytes(20 * 192 + 1)), r'is damaged \(the header'),
  'a header that is no python': (npz_with(b'{(['), 'is damaged'),
  'a header that calls': (npz_with(b"__import__('os').system('true')"), 'is damaged'),
  'no npy inside': (npz_with(b'').replace(b'\x93NUMPY', b'\x93NUMPX'), 'is damaged'),
  'objects': (npz(images=np.array([{}], object)), r"'images' is object\[1\], but must be uint8"),
  'objects as labels': (npz(images=IMAGES, labels=np.array([{}] * 20)), r"'labels' is object\[20\]"),
  'text as labels': (npz(images=IMAGES, labels=np.array(['a'] * 20)), r"'labels' is <U1\[20\]"),
  'no images': (npz(images=IMAGES[:0]), r'holds no image: .images. is uint8\[0, 8, 8, 3\]'),
  'images without pixels': (npz(images=IMAGES[:, :0]), 'holds no image'),
  'nothing in it': (npz(), r'holds \[\], but images are looked for'),
  'other names': (npz(pictures=IMAGES), "'pictures'.*'x_train'"),
  'one image': (npz(images=IMAGES[0]), r'the image is|channels'),
  'labels of 2^31 - 2': (npz(images=IMAGES, labels=LABELS * 0 + 2**31 - 2), '2147483647 classes.* 32768'),
  'labels beyond int32': (npz(images=IMAGES, labels=LABELS + 2**40), 'classes, and may be of 32768'),
  'labels beyond int64': (npz(images=IMAGES, labels=LABELS.astype(np.uint64) + 2**63), 'may be of 32768'),
  'negative labels': (npz(images=IMAGES, labels=LABELS - 1), "smallest of 'labels' is -1"),
  'labels for others': (npz(images=IMAGES, labels=LABELS[1:]), r"'labels' is int64\[19\].*\[20\]"),
  'labels with nan': (npz(images=IMAGES, labels=LABELS * np.nan), "'labels' is float64"),
}


@pytest.mark.parametrize('case', BAD_NPZ)
def test_npz(make, tmp_path, case):
  content, message = BAD_NPZ[case]
  (tmp_path / 'a.npz').write_bytes(content)
  message = refused(make(path=str(tmp_path / 'a.npz')), message)
  assert 'a.npz' in message


@pytest.mark.parametrize(
  ('images', 'message', 'advice'),
  [
    (IMAGES.transpose(0, 3, 1, 2), 'channels from the front', lambda x: x.transpose(0, 2, 3, 1)),
    (IMAGES[..., :1].transpose(0, 3, 1, 2), 'channels from the front', lambda x: x.transpose(0, 2, 3, 1)),
    (IMAGES[..., [0, 1, 2, 2]], r'x\[\.\.\., :3\]', lambda x: x[..., :3]),
    (IMAGES[..., [0, 1]], r'x\[\.\.\., :1\]', lambda x: x[..., :1]),
    (
      IMAGES[..., [0, 1, 2, 2]].transpose(0, 3, 1, 2),
      r'x\[:, :3\]\.transpose\(0, 2, 3, 1\)',
      lambda x: x[:, :3].transpose(0, 2, 3, 1),
    ),
    (IMAGES[..., [0, 1, 2, 2, 1]], r'x\[\.\.\., :3\]', lambda x: x[..., :3]),
    (IMAGES / 255, r'round\(255 \* x\)', lambda x: np.round(255 * x).astype(np.uint8)),
    (IMAGES.astype(int), r'round\(x\)', lambda x: np.round(x).astype(np.uint8)),
  ],
)
def test_the_advice_about_npz_is_accepted(make, tmp_path, images, message, advice):
  path = tmp_path / 'a.npz'
  np.savez(path, images=images)
  refused(make(path=str(path)), f"a.npz: 'images' is .*{message}")
  followed = advice(images)
  np.savez(path, images=followed)
  source = open_source(make(path=str(path), channels=followed.shape[-1]), 'train')
  assert source.image_shape == (8, 8, followed.shape[-1])


@pytest.mark.parametrize(
  ('labels', 'advice'),
  [(LABELS[:, None], lambda y: y[:, 0]), (np.eye(20), lambda y: y.argmax(-1)), (LABELS > 3, np.int32)],
)
def test_the_advice_about_labels_is_accepted(make, tmp_path, labels, advice):
  path = tmp_path / 'a.npz'
  np.savez(path, images=IMAGES, labels=labels)
  refused(make(path=str(path)), "a.npz: 'labels' is .*argmax")
  np.savez(path, images=IMAGES, labels=advice(labels))
  assert len(open_source(make(path=str(path)), 'train')) == 15


def test_images_larger_than_the_memory(make, tmp_path, monkeypatch):
  np.savez(tmp_path / 'a.npz', images=IMAGES)
  monkeypatch.setattr(os, 'sysconf', lambda name: 1)
  refused(make(path=str(tmp_path / 'a.npz')), 'needs 3840 bytes of memory, and this machine has 1')


# idx ----------------------------------------------------------------------------------------------------


def idx(*shape, content=None, kind=8):
  content = bytes(int(np.prod(shape))) if content is None else content
  return bytes([0, 0, kind, len(shape)]) + struct.pack(f'>{len(shape)}i', *shape) + content


BAD_IDX = {
  'empty': (b'', 'starts with 0x,'),
  'only a magic number': (bytes([0, 0, 8, 3]), 'ends within its header, after 4 bytes'),
  'half a header': (idx(12, 8, 8)[:13], 'ends within its header, after 13 bytes'),
  'negative sizes': (idx(-12, -8, 8, content=bytes(768)), r'announces the shape \[-12, -8, 8\]'),
  'one negative size': (idx(12, 8, -8, content=bytes(768)), r'announces the shape'),
  'no images': (idx(0, 8, 8), r'announces the shape \[0, 8, 8\]'),
  'terabytes': (idx(2**31 - 1, 2**31 - 1, 2**31 - 1, content=b'1'), 'announces the shape'),
  'truncated': (idx(12, 8, 8)[:-1], 'holds 783 bytes, but its header announces 784'),
  'too long': (idx(12, 8, 8) + b'1', 'holds 785 bytes, but its header announces 784'),
  'numbers of 32 bits': (idx(12, 8, 8, kind=13), 'starts with 0x00000d03'),
  'a page of the web': (b'<!DOCTYPE html>', 'another kind of file'),
}


@pytest.fixture
def digits(tmp_path):
  for name, count in (('train', 12), ('t10k', 5)):
    (tmp_path / f'{name}-images-idx3-ubyte').write_bytes(idx(count, 8, 8))
    (tmp_path / f'{name}-labels-idx1-ubyte').write_bytes(idx(count, content=bytes(range(count))))
  return tmp_path


def idx_data(make, digits, **changes):
  splits = {'train_split': 'train', 'eval_split': 'test'}
  return make(source='idx', channels=1, **({'path': str(digits)} | splits | changes))


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('case', BAD_IDX)
def test_idx(make, digits, case, packed):
  content, message = BAD_IDX[case]
  file = digits / 'train-images-idx3-ubyte'
  file.unlink()
  file = file.with_name(f'{file.name}.gz') if packed else file
  file.write_bytes(gzip.compress(content) if packed else content)
  assert 'fetch it again' in refused(idx_data(make, digits), f'{file.name}.*{message}')


@pytest.mark.parametrize(
  'damage',
  [lambda x: x[:-9], lambda x: x[:20], flipped, lambda x: b'', lambda x: b'\x1f\x8b\x08' + bytes(20)],
)
def test_damaged_gz(make, digits, damage):
  (digits / 'train-images-idx3-ubyte').unlink()
  packed = gzip.compress(idx(12, 8, 8, content=np.random.RandomState(0).bytes(768)))
  (digits / 'train-images-idx3-ubyte.gz').write_bytes(damage(packed))
  refused(idx_data(make, digits), 'train-images-idx3-ubyte.gz.*fetch it again')


def test_other_faults_of_idx(make, digits):
  (digits / 't10k-labels-idx1-ubyte').write_bytes(idx(5, content=bytes([0, 1, 2, 3, 12])))
  refused(idx_data(make, digits), 't10k-images.*: its label is 12, but this data set has 12 classes, 0 to 11')
  refused(idx_data(make, digits, path=''), "data.path='' is no folder")
  (digits / 'train-labels-idx1-ubyte').unlink()
  os.mkfifo(digits / 'train-labels-idx1-ubyte')
  refused(idx_data(make, digits), 'no train-labels-idx1-ubyte')


# Splits -------------------------------------------------------------------------------------------------

BAD_SPLITS = [
  ('train', 'train', 'share 20 images'),
  ('train', 'train[90%:]', "data.train_split='train' and data.eval_split='train.90%:.' share 2 images"),
  ('train[:11]', 'train[10:]', 'share 1 images'),
  ('train[5:10]', 'train[-12:-11]', 'share 1 images'),
  ('train[:200%]', 'train[:1]', r"data.train_split='train\[:200%\]': 200% lies outside of the 20 images"),
  ('train[:-101%]', 'train[:1]', '-101% lies outside'),
  ('train[:21]', 'train[:1]', '21 lies outside of the 20 images; write numbers from -20 to 20'),
  ('train[:10]', 'train[-21:]', 'data.eval_split.*-21 lies outside'),
  ('train[:10]', 'train[20:]', 'selects none of the 20 images'),
  ('train[:10]', 'train[15:12]', 'selects none'),
  ('train[:10]', 'train[:1%]', 'selects none'),
  ('train[:10', 'train[10:]', 'is no split'),
  ('train[:10]', f'train[{"9" * 5000}:]', 'is no split'),
  ('train[:10]', 'train[١٠:]', 'is no split'),
  ('train[:10]', 'test', 'one list of images'),
  ('', 'train', 'is no split'),
]


@pytest.mark.parametrize(('train', 'held_out', 'message'), BAD_SPLITS)
@pytest.mark.parametrize('source', ['npz', 'image_folder'])
def test_splits(make, tmp_path, source, train, held_out, message):
  if source == 'npz':
    np.savez(tmp_path / 'a.npz', images=IMAGES)
  else:
    (tmp_path / 'a.npz').mkdir()
    for i, image in enumerate(IMAGES):
      Image.fromarray(image).save(tmp_path / 'a.npz' / f'{i}.png')
  data = make(source=source, path=str(tmp_path / 'a.npz'), train_split=train, eval_split=held_out)
  refused(data, message)
  refused(data, message, 'eval')


@pytest.mark.parametrize(
  ('train', 'held_out', 'message'),
  [
    ('train', 'train', 'share 12 images'),
    ('train[:8]', 'train[50%:]', 'share 2 images'),
    ('train[:200%]', 'test', '200% lies outside of the 12 images'),
    ('train', 'test[:6]', '6 lies outside of the 5 images'),
    ('train', 'validation', "the splits .'train', 'test'"),
  ],
)
def test_splits_of_idx(make, digits, train, held_out, message):
  refused(idx_data(make, digits, train_split=train, eval_split=held_out), message)


# TFDS ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def built(tmp_path_factory):
  """The digits as TFDS stores them."""
  root = tmp_path_factory.mktemp('built')
  changes = {'source': 'tfds', 'name': 'digits', 'path': '', 'data_dir': str(root), 'channels': 1}
  data = dict(
    changes, train_split='train', eval_split='test', image_size=8, num_classes=0, caption_feature='',
    crop='none', crop_size=0, resize='none', materialize=True, num_threads=1, prefetch=1,
  )  # fmt: skip
  open_source(ml_collections.ConfigDict(data), 'train')
  shutil.rmtree(root / 'vaediff')
  return root, data


@pytest.fixture
def stored(built, tmp_path):
  """Returns the data section of a copy, and its folder."""
  root, data = built
  shutil.copytree(root, tmp_path / 'data_dir')
  data = ml_collections.ConfigDict(data | {'data_dir': str(tmp_path / 'data_dir')})
  return data, tmp_path / 'data_dir' / 'digits' / '1.1.0'


@pytest.mark.parametrize(
  ('train', 'held_out', 'message'),
  [
    ('train', 'train', 'share 1500 images'),
    ('train', 'train[90%:]', 'share 150 images'),
    ('train[:100]+test[:10]', 'test', 'share 10 images'),
    ('all', 'test', 'share 297 images'),
    ('train[:200%]', 'test', r"data.train_split='train\[:200%\]' is no split"),
    ('train[:2000]', 'test', r'is no split .*1500'),
    ('train[100:50]', 'test', 'is no split|selects no image'),
    ('train[100:50]+test[:60]', 'train[:50]', 'selects no image of digits, or a part without one'),
    ('validation', 'test', "it has .'test', 'train'"),
    ('', 'test', 'is no split'),
    ('train[:50', 'test', 'is no split'),
  ],
)
def test_splits_of_tfds(stored, train, held_out, message):
  data, _ = stored
  data.train_split, data.eval_split = train, held_out
  refused(data, message)


def cut(file):
  file.write_bytes(file.read_bytes()[:200_000])


def flip(file):
  content = bytearray(file.read_bytes())
  content[100_000] ^= 255
  file.write_bytes(content)


def other(file):
  shutil.copy(next(file.parent.glob('*test.array_record*')), file)


@pytest.mark.parametrize(
  'damage',
  [cut, flip, other, lambda f: f.write_bytes(b''), lambda f: f.write_text('text'), pathlib.Path.unlink],
)
def test_records_of_tfds(stored, damage):
  data, folder = stored
  file = next(folder.glob('*train.array_record*'))
  damage(file)
  refused(data, f"(?s){file}.*(damaged|missing).*delete its folder '{folder}': it is built again")


def test_records_that_the_system_refuses(stored, monkeypatch):
  data, folder = stored
  file = next(folder.glob('*train.array_record*'))
  source = open_source(data, 'train')
  assert len(source) == 1500
  data.materialize = False
  reader = open_source(data, 'train').reader
  file.unlink()
  file.mkdir()
  reader._records.data_source.__dict__.clear()
  with pytest.raises(UserError, match=f'{file} cannot be read: Is a directory'):
    reader.read(0)


@pytest.mark.parametrize('content', [b'', b'{"a":', b'[]', b'{}', b'\xff\xfe', b'3', b'{"splits": 3}'])
def test_info_of_tfds(stored, content):
  data, folder = stored
  (folder / 'dataset_info.json').write_bytes(content)
  refused(data, f'{folder / "dataset_info.json"} is damaged.*delete its folder')


@pytest.mark.parametrize('name', ['', 'no_such_set', 'celeb_a_hq/257', '../digits', 'a b', 'cifar10:9.9.9'])
def test_names_of_tfds(make, name):
  refused(make(source='tfds', name=name), 'data.name')


def test_full_disk_while_the_digits_are_built(built, tmp_path, monkeypatch):
  from vaediff.data import builders

  def full(*args, **kwargs):
    raise OSError(28, 'No space left on device', '/some/file')

  monkeypatch.setattr(builders.Digits, 'download_and_prepare', full)
  data = ml_collections.ConfigDict(built[1] | {'data_dir': str(tmp_path / 'new')})
  with pytest.raises(UserError, match="data.data_dir: '/some/file' cannot be written: No space left"):
    open_source(data, 'train')


@pytest.mark.parametrize('train', [str(2**40), str(2**60), '1501', '-5', ''])
def test_counts_of_tfds_that_are_wrong(stored, train):
  """No room is made for images that are not there."""
  data, folder = stored
  info = json.loads((folder / 'dataset_info.json').read_text())
  (split,) = (split for split in info['splits'] if split['name'] == 'train')
  split['shardLengths'] = [train] if train else []
  (folder / 'dataset_info.json').write_text(json.dumps(info))
  refused(data, f"{folder}.*delete its folder '{folder}': it is built again")


def test_tfds_without_its_info(stored):
  data, folder = stored
  (folder / 'dataset_info.json').unlink()
  refused(
    data, f"'{folder}' has no dataset_info.json with splits that hold images; delete its folder '{folder}'"
  )
