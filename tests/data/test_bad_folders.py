"""Folders and images that cannot be used are refused by name; odd ones are read right."""

import io
import os
import pathlib
import shutil
import socket
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from refusals import refused

from vaediff.data import folder

IMAGES = np.random.RandomState(0).randint(256, size=(20, 8, 8, 3)).astype(np.uint8)


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
    lambda root: (
      [elsewhere(root).rename(root.parent / 'other')]
      + [(root / name).symlink_to(root.parent / 'other') for name in ('a', 'b')]
    ),
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
  'a link to itself': (
    lambda root: (root / 'cat' / 'a.png').symlink_to('a.png'),
    'cat/a.png: Too many levels',
  ),
  'a pipe': (lambda root: os.mkfifo(root / 'cat' / 'pipe.png'), 'cat/pipe.png is no file but a pipe'),
  'a link to a pipe': (
    lambda root: [os.mkfifo(root / '.pipe'), (root / 'cat' / 'p.jpg').symlink_to('../.pipe')],
    'cat/p.jpg is no file but a pipe',
  ),
  'a socket': (
    lambda root: listen(root / 'cat' / 's.png'),
    'cat/s.png is no file but a pipe, socket or device',
  ),
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
def test_folder(make_slices, pictures, monkeypatch, case):
  monkeypatch.chdir(pictures.parent)
  damage, message = FOLDERS[case]
  damage(pictures)
  refused(make_slices(source='image_folder', path=str(pictures)), message)


@pytest.mark.parametrize('which', ['', 'cat', 'dog/deep'])
def test_folder_that_cannot_be_listed(make_slices, pictures, monkeypatch, which):
  """As root everything can be read: the system's answer is made up."""
  (pictures / 'dog' / 'deep').mkdir()
  scandir = os.scandir

  def scan(path='.'):
    if pathlib.Path(path) == pictures / which:
      raise PermissionError(13, 'Permission denied', str(path))
    return scandir(path)

  monkeypatch.setattr(os, 'scandir', scan)
  data = make_slices(source='image_folder', path=str(pictures))
  refused(
    data, f"the folder '{pictures / which}' of data.path cannot be read: Permission denied.*make it readable"
  )


@pytest.mark.parametrize('source', ['image_folder', 'npz', 'idx'])
def test_path_that_cannot_be_looked_at(make_slices, monkeypatch, source):
  stat = os.stat

  def look(path, *args, **kwargs):
    if str(path).startswith('/secret'):
      raise PermissionError(13, 'Permission denied', str(path))
    return stat(path, *args, **kwargs)

  monkeypatch.setattr(os, 'stat', look)
  splits = {'train_split': 'train', 'eval_split': 'test'} if source == 'idx' else {}
  refused(make_slices(source=source, path='/secret/place', **splits), "'/secret/place.*Permission denied")


COLOUR_16 = png(16, 2, [bytes([1, 0, 2, 0, 3, 0] * 8)] * 8, struct.pack('>HHH', 256, 512, 768))
GREY_PNG = png(8, 0, [bytes(8)] * 8)
BAD_IMAGES = {
  'empty': (b'', 'it is empty'),
  'a text': (b'<html>not found</html>', 'it is none of PNG, JPEG, WEBP, BMP, whatever its name says'),
  'half a jpeg': (saved(Image.fromarray(IMAGES[0]).resize((64, 64)), 'JPEG')[:500], '[Tt]runcated'),
  'half a png': (saved(Image.fromarray(IMAGES[0]).resize((64, 64)), 'PNG')[:900], 'cannot be read: .'),
  'a png with a flipped bit': (
    bytes([*png(8, 0, [bytes(8)] * 8)[:45], 7, *png(8, 0, [bytes(8)] * 8)[46:]]),
    '.',
  ),
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
def test_image(make_slices, pictures, case):
  content, message = BAD_IMAGES[case]
  (pictures / 'dog' / 'odd.png').write_bytes(content)
  message = refused(
    make_slices(source='image_folder', path=str(pictures)), f'(?s)1 images.*dog/odd.png.*{message}'
  )
  assert 'mend or remove' in message


def test_image_that_the_system_refuses(make_slices, pictures, monkeypatch):
  opened = Image.open

  def open_image(file, *args, **kwargs):
    if pathlib.Path(file).name == '3.png':
      raise PermissionError(13, 'Permission denied', str(file))
    return opened(file, *args, **kwargs)

  monkeypatch.setattr(folder.Image, 'open', open_image)
  refused(
    make_slices(source='image_folder', path=str(pictures)),
    '(?s)2 images.*3.png cannot be read: Permission denied',
  )


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
