"""Data that cannot be used: each ends with a message that names file or field and what to do, and nothing written.

No JAX program is needed. `main` prints a UserError and ends with status 2.
"""

import gzip
import io
import json
import os
import pathlib
import shutil
import socket
import struct
import zipfile
import zlib

import ml_collections
import numpy as np
import pytest
from PIL import Image

from vaediff.data import cache, folder
from vaediff.data.sources import describe, open_source, prepare
from vaediff.errors import UserError

IMAGES = np.random.RandomState(0).randint(256, size=(20, 8, 8, 3)).astype(np.uint8)
SPLITS = {'train_split': 'train[:75%]', 'eval_split': 'train[75%:]'}


@pytest.fixture
def make(tmp_path):
  """Returns a function from changed fields to a complete data section."""

  def make(**changes):
    data = {
      'source': 'npz', 'name': '', 'path': '', 'data_dir': str(tmp_path / 'data_dir'), 'image_size': 8,
      'channels': 3, 'num_classes': 0, 'crop': 'none', 'crop_size': 0, 'resize': 'none', 'materialize': True,
      'num_threads': 2, 'prefetch': 2, **SPLITS,
    }  # fmt: skip
    return ml_collections.ConfigDict(data | changes)

  return make


def refused(data, message, split='train'):
  """Opens the data in both ways; asserts the message, and that nothing is left; returns it."""
  for materialize in (True, False):
    data.materialize = materialize
    with pytest.raises(UserError, match=message) as raised:
      open_source(data, split)
    left = pathlib.Path(data.data_dir) / 'vaediff'
    assert not left.is_dir() or not list(left.iterdir()), list(left.iterdir())
  return str(raised.value)


# Folders of images --------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
  """Eight pictures in each of two classes."""
  root = tmp_path / 'pictures'
  for k, name in enumerate(('cat', 'dog')):
    (root / name).mkdir(parents=True)
    for i in range(8):
      Image.fromarray(IMAGES[8 * k + i]).save(root / name / f'{i}.png')
  return root


def no_folder(root):
  shutil.rmtree(root)
  root.touch()


def unlisted(root):
  shutil.rmtree(root)
  root.mkdir()


def listen(path):
  with socket.socket(socket.AF_UNIX) as server:
    os.chdir(path.parent)  # The path of a socket is short.
    server.bind(path.name)


def chunk(kind, content):
  return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))


def png(depth, kind, rows, clear=None, width=8, height=8):
  """Returns a PNG, whose rows are bytes as stored, with a transparent grey or colour."""
  header = struct.pack('>IIBBBBB', width, height, depth, kind, 0, 0, 0)
  chunks = [chunk(b'IHDR', header)] + ([] if clear is None else [chunk(b'tRNS', clear)])
  chunks += [chunk(b'IDAT', zlib.compress(b''.join(b'\0' + row for row in rows))), chunk(b'IEND', b'')]
  return b'\x89PNG\r\n\x1a\n' + b''.join(chunks)


def saved(image, form, **options):
  file = io.BytesIO()
  image.save(file, form, **options)
  return file.getvalue()


FOLDERS = {
  'a file': (no_folder, "data.path='.*pictures' is no folder"),
  'empty': (unlisted, 'holds no image .*.png'),
  'link to the parent': (
    lambda root: (root / 'cat' / 'up').symlink_to('..'),
    r"cat/up is the same folder as '\.' there, by a link",
  ),
  'link to the root by its whole name': (
    lambda root: (root / 'again').symlink_to(root),
    'again is the same folder',
  ),
  'link to a folder beside': (
    lambda root: (root / 'wolf').symlink_to('dog'),
    "wolf is the same folder as 'dog'",
  ),
  'link above the root': (
    lambda root: (root / 'cat' / 'top').symlink_to(root.parent),
    'pictures is the same folder as',
  ),
  'two links to one folder elsewhere': (
    lambda root: [elsewhere(root).rename(root.parent / 'other')]
    + [(root / name).symlink_to(root.parent / 'other') for name in ('a', 'b')],
    "b is the same folder as 'a'",
  ),
  'link to an image': (
    lambda root: (root / 'cat' / 'twin.png').symlink_to('0.png'),
    "cat/twin.png is the same file as 'cat/0.png'",
  ),
  'broken links': (
    lambda root: [(root / 'cat' / f'gone{i}.png').symlink_to(f'/nowhere/{i}') for i in range(3)],
    "(?s)3 files or folders.*gone0.png is a link to '/nowhere/0'.*gone1.png.*gone2.png",
  ),
  'many broken links': (
    lambda root: [(root / 'cat' / f'gone{i:02}.png').symlink_to('nowhere') for i in range(14)],
    '(?s)14 files or folders.*gone09.*and 4 more',
  ),
  'a class that is a broken link': (
    lambda root: (root / 'bird').symlink_to('nowhere'),
    "bird is a link to 'nowhere', which is not there",
  ),
  'a link to itself': (lambda root: (root / 'cat' / 'a.png').symlink_to('a.png'), 'cat/a.png: Too many levels'),
  'a pipe': (lambda root: os.mkfifo(root / 'cat' / 'pipe.png'), 'cat/pipe.png is no file but a pipe'),
  'a link to a pipe': (
    lambda root: [os.mkfifo(root / '.pipe'), (root / 'cat' / 'p.jpg').symlink_to('../.pipe')],
    'cat/p.jpg is no file but a pipe',
  ),
  'a socket': (lambda root: listen(root / 'cat' / 's.png'), 'cat/s.png is no file but a pipe, socket or device'),
  'a link to a device': (
    lambda root: (root / 'dog' / 'zero.bmp').symlink_to('/dev/zero'),
    'dog/zero.bmp is no file but a pipe, socket or device',
  ),
  'images beside classes': (
    lambda root: shutil.copy(root / 'cat' / '0.png', root / 'stray.png'),
    '1 images lie in the folder itself and 16 in subfolders',
  ),
}


def elsewhere(root):
  made = root.parent / 'making'
  made.mkdir()
  Image.fromarray(IMAGES[-1]).save(made / 'x.png')
  return made


@pytest.mark.parametrize('case', FOLDERS)
def test_folder(make, pictures, monkeypatch, case):
  monkeypatch.chdir(pictures.parent)
  damage, message = FOLDERS[case]
  damage(pictures)
  refused(make(source='image_folder', path=str(pictures)), message)


@pytest.mark.parametrize('which', ['', 'cat', 'dog/deep'])
def test_folder_that_cannot_be_listed(make, pictures, monkeypatch, which):
  """As root everything can be read: the system's answer is made up."""
  (pictures / 'dog' / 'deep').mkdir()
  scandir = os.scandir

  def scan(path='.'):
    if pathlib.Path(path) == pictures / which:
      raise PermissionError(13, 'Permission denied', str(path))
    return scandir(path)

  monkeypatch.setattr(os, 'scandir', scan)
  data = make(source='image_folder', path=str(pictures))
  refused(data, f"the folder '{pictures / which}' of data.path cannot be read: Permission denied.*make it readable")


@pytest.mark.parametrize('source', ['image_folder', 'npz', 'idx'])
def test_path_that_cannot_be_looked_at(make, monkeypatch, source):
  stat = os.stat

  def look(path, *args, **kwargs):
    if str(path).startswith('/secret'):
      raise PermissionError(13, 'Permission denied', str(path))
    return stat(path, *args, **kwargs)

  monkeypatch.setattr(os, 'stat', look)
  splits = {'train_split': 'train', 'eval_split': 'test'} if source == 'idx' else {}
  refused(make(source=source, path='/secret/place', **splits), "'/secret/place.*Permission denied")


COLOUR_16 = png(16, 2, [bytes([1, 0, 2, 0, 3, 0] * 8)] * 8, struct.pack('>HHH', 256, 512, 768))
BAD_IMAGES = {
  'empty': (b'', 'it is empty'),
  'a text': (b'<html>not found</html>', 'it is none of PNG, JPEG, WEBP, BMP, whatever its name says'),
  'half a jpeg': (saved(Image.fromarray(IMAGES[0]).resize((64, 64)), 'JPEG')[:500], 'truncated'),
  'half a png': (saved(Image.fromarray(IMAGES[0]).resize((64, 64)), 'PNG')[:900], 'cannot be read: .'),
  'a png with a flipped bit': (bytes([*png(8, 0, [bytes(8)] * 8)[:45], 7, *png(8, 0, [bytes(8)] * 8)[46:]]), '.'),
  'a TIFF of mode F': (saved(Image.new('F', (8, 8), 0.5), 'TIFF'), 'it is none of PNG'),
  'a TIFF of mode I': (saved(Image.new('I', (8, 8), 70000), 'TIFF'), 'it is none of PNG'),
  'a TIFF of mode I;16B': (saved(Image.new('I;16B', (8, 8), 700), 'TIFF'), 'it is none of PNG'),
  'a GIF': (saved(Image.fromarray(IMAGES[0]), 'GIF'), 'it is none of PNG'),
  'a PDF': (b'%PDF-1.4\n%' + bytes(500), 'it is none of PNG'),
  'a PostScript': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n', 'it is none of PNG'),
  'absurd sides': (png(1, 0, [bytes(8)] * 2, width=400_000, height=400_000), 'exceeds limit'),
  'no pixel': (png(8, 0, [], width=0, height=0), '.'),
  '16-bit colour, one transparent': (COLOUR_16, '16-bit colours is transparent, of which 8 bits are read'),
  'another size': (saved(Image.new('RGB', (9, 7)), 'PNG'), 'the image is 9x7'),
}


@pytest.mark.parametrize('case', BAD_IMAGES)
def test_image(make, pictures, case):
  content, message = BAD_IMAGES[case]
  (pictures / 'dog' / 'odd.png').write_bytes(content)
  message = refused(make(source='image_folder', path=str(pictures)), f'(?s)1 images.*dog/odd.png.*{message}')
  assert 'mend or remove' in message


def test_image_that_the_system_refuses(make, pictures, monkeypatch):
  opened = Image.open

  def open_image(file, *args, **kwargs):
    if pathlib.Path(file).name == '3.png':
      raise PermissionError(13, 'Permission denied', str(file))
    return opened(file, *args, **kwargs)

  monkeypatch.setattr(folder.Image, 'open', open_image)
  refused(make(source='image_folder', path=str(pictures)), '(?s)2 images.*3.png cannot be read: Permission denied')


GREY_LEFT = bytes([10, 20] * 4 + [10, 30] * 4)  # 16 bits: 0x0a14 and 0x0a1e.
GOOD_IMAGES = {
  '16-bit grey, one transparent': (png(16, 0, [GREY_LEFT] * 8, struct.pack('>H', 0x0A1E)), 10, 255),
  '16-bit grey, none transparent': (png(16, 0, [GREY_LEFT] * 8), 10, 10),
  '8-bit grey, one transparent': (png(8, 0, [b'\x05' * 4 + b'\x09' * 4] * 8, struct.pack('>H', 9)), 5, 255),
  '4-bit grey, one transparent': (png(4, 0, [b'\x33\x33\x55\x55'] * 8, struct.pack('>H', 5)), 51, 255),
  '2-bit grey, one transparent': (png(2, 0, [b'\x55\xaa'] * 8, struct.pack('>H', 2)), 85, 255),
  '1-bit, black transparent': (png(1, 0, [b'\x0f'] * 8, struct.pack('>H', 0)), 255, 255),
  '1-bit': (png(1, 0, [b'\x0f'] * 8), 0, 255),
  '8-bit colour, one transparent': (
    png(8, 2, [bytes([7, 7, 7] * 4 + [1, 2, 3] * 4)] * 8, struct.pack('>HHH', 1, 2, 3)), 7, 255,
  ),
  '16-bit grey with alpha': (png(16, 4, [bytes([9, 0, 255, 255] * 4 + [9, 0, 0, 0] * 4)] * 8), 9, 255),
  '8-bit grey with alpha': (png(8, 4, [bytes([9, 255] * 4 + [9, 0] * 4)] * 8), 9, 255),
  '16-bit colour': (png(16, 2, [bytes([6, 1] * 12 + [5, 2] * 12)] * 8), 6, 5),
  'jpeg of four inks': (saved(Image.new('CMYK', (8, 8), (0, 0, 0, 155)), 'JPEG', quality=100), 100, 100),
  'grey jpeg named png': (saved(Image.new('L', (8, 8), 77), 'JPEG', quality=100), 77, 77),
}  # fmt: skip


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('case', GOOD_IMAGES)
def test_odd_image_is_right(tmp_path, case, channels):
  content, left, right = GOOD_IMAGES[case]
  (tmp_path / 'a.png').write_bytes(content)
  pixels = folder.decode(tmp_path / 'a.png', channels)
  assert pixels.shape == (8, 8, channels) and pixels.dtype == np.uint8
  assert (np.abs(pixels[:, :4].astype(int) - left) <= 1).all(), pixels[0, :, 0]
  assert (np.abs(pixels[:, 4:].astype(int) - right) <= 1).all(), pixels[0, :, 0]


@pytest.mark.parametrize('mode', ['PA', 'LA', 'P', 'RGBA'])
def test_transparency_of_every_mode_is_white(mode):
  image = Image.new('RGBA', (8, 8), (0, 0, 0, 0))
  image.paste((40, 40, 40, 255), (0, 0, 4, 8))
  image = image.convert('P').convert('PA') if mode == 'PA' else image.convert(mode)
  if mode == 'PA':
    image.putalpha(Image.fromarray(np.repeat(np.uint8([[255] * 4 + [0] * 4]), 8, 0)))
  if mode == 'P':
    image.info['transparency'] = image.getpixel((7, 0))
  pixels = np.asarray(folder._to_mode(image, '', 'RGB'))
  assert (pixels[:, :4] == 40).all() and (pixels[:, 4:] == 255).all()


@pytest.mark.parametrize(('mode', 'value'), [('F', 0.5), ('I', 70000), ('I', -1), ('HSV', 0), ('LAB', 0)])
def test_mode_that_no_byte_can_hold(mode, value):
  with pytest.raises(ValueError, match='its (pixels are of the kind|grey values are from)'):
    folder._to_mode(Image.new(mode, (8, 8), value), '', 'RGB')


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
  """Returns a zip with a field of its first local and central header changed; `at` is that of the local one."""
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
  'a header of terabytes': (npz_with(header_of((2**40, 8, 8, 3)), b'123'), r'is damaged \(the header of images'),
  'a header beyond 64 bits': (npz_with(header_of((2**62, 2**62, 8, 3))), r'is damaged \(the header of images'),
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
  return make(source='idx', path=str(digits), channels=1, **(splits | changes))


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
  'damage', [lambda x: x[:-9], lambda x: x[:20], flipped, lambda x: b'', lambda x: b'\x1f\x8b\x08' + bytes(20)]
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
  ('train[:10]', 'train[-21:]', "data.eval_split.*-21 lies outside"),
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
    changes, train_split='train', eval_split='test', image_size=8, num_classes=0, crop='none', crop_size=0,
    resize='none', materialize=True, num_threads=1, prefetch=1,
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
  return data, tmp_path / 'data_dir' / 'digits' / '1.0.0'


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
  'damage', [cut, flip, other, lambda f: f.write_bytes(b''), lambda f: f.write_text('text'), pathlib.Path.unlink]
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
  refused(data, f"{folder / 'dataset_info.json'} is damaged.*delete its folder")


@pytest.mark.parametrize('name', ['', 'no_such_set', 'celeb_a_hq/257', '../digits', 'a b', 'cifar10:9.9.9'])
def test_names_of_tfds(make, name):
  refused(make(source='tfds', name=name), 'data.name')


# Places -------------------------------------------------------------------------------------------------


def test_home_is_put_in(make, tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  np.savez(tmp_path / 'a.npz', images=IMAGES)
  data = make(path='~/a.npz', data_dir='~/kept')
  assert len(open_source(data, 'train')) == 15 and 'a.npz' in describe(data)
  assert len(list((tmp_path / 'kept' / 'vaediff').iterdir())) == 1
  monkeypatch.chdir(tmp_path)
  assert not (tmp_path / '~').exists()


@pytest.mark.parametrize('source', ['npz', 'image_folder', 'idx'])
def test_home_of_nobody(make, source):
  splits = {'train_split': 'train', 'eval_split': 'test'} if source == 'idx' else {}
  data = make(source=source, path='~no_such_user/a', **splits)
  for use in (open_source, lambda data, _: describe(data), lambda data, _: prepare(data)):
    with pytest.raises(UserError, match="data.path='~no_such_user/a'.*write the whole path"):
      use(data, 'train')


def test_no_home(make, tmp_path, monkeypatch):
  np.savez(tmp_path / 'a.npz', images=IMAGES)
  monkeypatch.setattr(pathlib.Path, 'expanduser', lambda path: (_ for _ in ()).throw(RuntimeError('no home')))
  with pytest.raises(UserError, match='data.path.*the home folder is not known'):
    open_source(make(path='~/a.npz'), 'train')


@pytest.mark.parametrize('value', ['', None])
def test_empty_variable_is_none(make, monkeypatch, value):
  monkeypatch.setenv('HOME', '/home/someone')
  monkeypatch.delenv('TFDS_DATA_DIR', raising=False)
  if value is not None:
    monkeypatch.setenv('TFDS_DATA_DIR', value)
  assert str(cache.data_root(make(data_dir=''))) == '/home/someone/tensorflow_datasets'


@pytest.mark.parametrize('field', ['path', 'data_dir', 'name'])
def test_zero_byte(make, tmp_path, field):
  np.savez(tmp_path / 'a.npz', images=IMAGES)
  data = make(path=str(tmp_path / 'a.npz'))
  data[field] = 'a\0b'
  with pytest.raises(UserError, match=f'data.{field}=.*zero byte'):
    open_source(data, 'train')


@pytest.mark.parametrize('place', ['file', '/proc/no_such_place', '/dev/full'])
def test_data_dir_that_cannot_be_written(make, tmp_path, place):
  (tmp_path / 'file').touch()
  np.savez(tmp_path / 'a.npz', images=IMAGES)
  data = make(path=str(tmp_path / 'a.npz'), data_dir=str(tmp_path / place))
  with pytest.raises(UserError, match="data.data_dir: '.*' cannot be written: (Not a|No such).*another folder"):
    open_source(data, 'train')


@pytest.mark.parametrize('which', ['images', 'labels'])
def test_full_disk(make, tmp_path, monkeypatch, which):
  np.savez(tmp_path / 'a.npz', images=IMAGES, labels=LABELS)
  pwrite = os.pwrite

  def write(file, content, offset):
    if which in os.readlink(f'/proc/self/fd/{file}'):
      raise OSError(28, 'No space left on device')
    return pwrite(file, content, offset)

  monkeypatch.setattr(os, 'pwrite', write)
  data = make(path=str(tmp_path / 'a.npz'))
  with pytest.raises(UserError, match=f'data.data_dir: .*train-{which}.npy. cannot be written: No space left'):
    open_source(data, 'train')
  assert not list((tmp_path / 'data_dir' / 'vaediff').iterdir())


def test_full_disk_while_the_digits_are_built(built, tmp_path, monkeypatch):
  from vaediff.data import builders

  def full(*args, **kwargs):
    raise OSError(28, 'No space left on device', '/some/file')

  monkeypatch.setattr(builders.Digits, 'download_and_prepare', full)
  data = ml_collections.ConfigDict(built[1] | {'data_dir': str(tmp_path / 'new')})
  with pytest.raises(UserError, match="data.data_dir: '/some/file' cannot be written: No space left"):
    open_source(data, 'train')


# Fields -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('source', 'web'), ('source', ''), ('channels', 0), ('channels', 2), ('channels', 4), ('crop', 'left'),
    ('resize', 'squash'), ('resize', 'squash_pad'), ('resize', 'squash_none'), ('image_size', 0),
    ('image_size', -8), ('image_size', 10**9), ('image_size', float('nan')), ('crop_size', -1),
    ('num_threads', -1), ('num_threads', 10**6), ('prefetch', -1), ('num_classes', -1), ('num_classes', 2**31),
  ],
)  # fmt: skip
def test_fields(make, field, value):
  data = make(source='synthetic')
  data.update({}), data.unlock()
  data = ml_collections.ConfigDict(dict(data) | {field: value})
  for use in (lambda: open_source(data, 'train'), lambda: describe(data)):
    with pytest.raises(UserError, match=rf'data\.{field} .*{value!r}'):
      use()


# The array cache ----------------------------------------------------------------------------------------


@pytest.fixture
def cached(make, tmp_path):
  """Returns the data section and the cache's folder."""
  np.savez(tmp_path / 'a.npz', images=IMAGES, labels=LABELS % 3)
  data = make(path=str(tmp_path / 'a.npz'))
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
  'an npz': lambda f: f.write_bytes(npz(images=IMAGES)),
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
