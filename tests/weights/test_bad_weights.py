# ruff: noqa: E501 (one case a line)
"""Files that are no weights: each is one message that names the file, whatever is in it."""

import io
import pickle
import struct
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from vaediff.errors import UserError
from vaediff.features import inception, mobilenet, vgg
from vaediff.weights import published, tensors, torch_file

NAN = float('nan')


class Storage:
  """Stands for a class of PyTorch, so that no PyTorch is needed to write a file of its kind."""

  def __init__(self, name):
    self.name = name


class Rebuild:
  """A tensor as torch.save pickles it: a function by name and its arguments."""

  def __init__(self, storage_type, shape, strides, numel=4, offset=0):
    self.storage = ('storage', Storage(storage_type), '0', 'cpu', numel)
    self.arguments = (offset, shape, strides, False, None)


class Pickler(pickle._Pickler):
  """Writes these as references to names, as PyTorch does."""

  def save(self, obj, *args, **kwargs):
    if isinstance(obj, Storage):
      self.write(f'ctorch\n{obj.name}\n'.encode())
    elif isinstance(obj, Rebuild):
      self.write(b'ctorch._utils\n_rebuild_tensor_v2\n(')
      self.save_pers(obj.storage)
      for argument in obj.arguments:
        super().save(argument)
      self.write(b'tR')
    else:
      super().save(obj, *args, **kwargs)

  def save_pers(self, pid):
    super().save(pid)
    self.write(b'Q')


def pth(tensor, storage=bytes(16), kind=zipfile.ZIP_STORED):
  body, file = io.BytesIO(), io.BytesIO()
  Pickler(body, 2).dump({'weight': tensor})
  with zipfile.ZipFile(file, 'w', kind) as archive:
    archive.writestr('net/data.pkl', body.getvalue())
    archive.writestr('net/data/0', storage)
  return file.getvalue()


def encrypted(content):
  """Sets the bit that says so in the headers of a zip archive's members."""
  changed = bytearray(content)
  for magic, at in ((b'PK\x03\x04', 6), (b'PK\x01\x02', 8)):
    place = changed.find(magic)
    while place >= 0:
      changed[place + at] |= 1
      place = changed.find(magic, place + 1)
  return bytes(changed)


def safetensors_of(header, body=bytes(16)):
  text = header if isinstance(header, bytes) else header.encode()
  return struct.pack('<Q', len(text)) + text + body


def one(dtype, shape, end=16):
  return f'{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,{end}]}}}}'


GOOD = Rebuild('FloatStorage', (2, 2), (2, 1))
WEIGHTS = {
  'pth: empty': ('w.pth', b'', 'w.pth .*damaged, or no file of torch.save'),
  'pth: a text': ('w.pth', b'not weights', 'w.pth .*damaged, or no file of torch.save'),
  'pth: truncated': ('w.pth', pth(GOOD)[:-30], 'w.pth is truncated or damaged'),
  'pth: encrypted': ('w.pth', encrypted(pth(GOOD)), 'w.pth is truncated or damaged .*(encrypted|password)'),
  'pth: a number type that is not known': ('w.pth', pth(Rebuild('QInt8Storage', (2, 2), (2, 1))), 'torch.QInt8Storage'),
  'pth: a shape beyond 2^63': ('w.pth', pth(Rebuild('FloatStorage', (2**64, 0), (1, 1))), 'w.pth'),
  'pth: terabytes of one number': (
    'w.pth', pth(Rebuild('FloatStorage', (2**40,), (0,))), 'weight has the shape .* more elements than its storage of 4'
  ),
  'pth: more axes than arrays have': ('w.pth', pth(Rebuild('FloatStorage', (1,) * 99, (1,) * 99)), 'w.pth'),
  'pth: past its end': ('w.pth', pth(Rebuild('FloatStorage', (2, 2), (2, 1), numel=40)), 'truncated or damaged'),
  'pth: negative sizes': ('w.pth', pth(Rebuild('FloatStorage', (-2, -2), (2, 1))), 'w.pth .*no sizes'),
  'pth: no sizes': ('w.pth', pth(Rebuild('FloatStorage', 7, 7)), 'w.pth is damaged'),
  'pth: a bomb': (
    'w.pth', pth(GOOD, bytes(10**7), zipfile.ZIP_DEFLATED), 'w.pth would grow from .* do not use it'
  ),
  'safetensors: empty': ('w.safetensors', b'', 'w.safetensors is not a readable safetensors file'),
  'safetensors: a text': ('w.safetensors', b'not weights at all', 'is not a readable safetensors file'),
  'safetensors: a header of terabytes': ('w.safetensors', struct.pack('<Q', 2**42), 'not a readable safetensors'),
  'safetensors: nested deeply': ('w.safetensors', safetensors_of('{"w":' * 99999), 'not a readable safetensors'),
  'safetensors: a type that is not known': ('w.safetensors', safetensors_of(one('Q7', '[4]')), 'w.safetensors'),
  'safetensors: a type that NumPy lacks': ('w.safetensors', safetensors_of(one('F8_E4M3', '[16]')), 'w.safetensors'),
  'safetensors: a shape beyond 2^63': (
    'w.safetensors', safetensors_of(one('F32', '[9223372036854775808, 4]')), 'not a readable safetensors'
  ),
  'safetensors: a negative shape': ('w.safetensors', safetensors_of(one('F32', '[-4]')), 'not a readable safetensors'),
  'safetensors: truncated': ('w.safetensors', safetensors_of(one('F32', '[40]', 160)), 'not a readable safetensors'),
}  # fmt: skip


@pytest.mark.parametrize('name', WEIGHTS)
def test_a_file_that_is_no_weights_is_named(tmp_path, name):
  file, content, message = WEIGHTS[name]
  path = tmp_path / file
  path.write_bytes(content)
  if name == 'safetensors: a type that NumPy lacks':
    try:
      tensors.load(path)  # which types there are depends on the library
    except UserError as error:
      assert message in str(error)
    return
  with pytest.raises(UserError, match=message):
    inception.load(str(path), 'pytorch')
  assert [entry.name for entry in tmp_path.iterdir()] == [file]


def test_the_file_that_the_bad_ones_are_made_of_is_read(tmp_path):
  (tmp_path / 'w.pth').write_bytes(pth(GOOD, np.arange(4, dtype=np.float32).tobytes()))
  np.testing.assert_array_equal(torch_file.read(tmp_path / 'w.pth')['weight'], [[0, 1], [2, 3]])


@pytest.mark.parametrize('file', ['w.pth', 'w.safetensors', 'w-6726825d.pth'])
def test_a_folder_is_no_file_of_weights(tmp_path, file):
  (tmp_path / file).mkdir()
  with pytest.raises(UserError, match=f'{file} is a folder'):
    inception.load(str(tmp_path / file), 'pytorch')


@pytest.mark.parametrize(
  ('load', 'name'),
  [(mobilenet.load, 'mobilenetv2'), (vgg.load, 'lpips_vgg16'), (lambda f: vgg.load_lpips('alexnet', f), 'lpips_alexnet')],
)  # fmt: skip
def test_weights_of_another_network_are_named(tmp_path, load, name):
  path = tmp_path / f'{name}.safetensors'
  path.write_bytes(safetensors.numpy.save({'other': np.zeros(3, np.float32)}))
  with pytest.raises(UserError, match='tensor .* is missing'):
    load(tmp_path)
  path.unlink()
  path.mkdir()
  with pytest.raises(UserError, match=f'{name}.safetensors is no file'):
    load(tmp_path)


def test_weights_that_are_not_finite_are_refused():
  with pytest.raises(UserError, match="weights of net: tensor 'a' holds values that are not finite"):
    published.check({'a': np.array([1, NAN], np.float32)}, {'a': (2,)}, 'net')
  with pytest.raises(UserError, match="tensor 'a' is int64"):
    published.check({'a': np.array([1, 2])}, {'a': (2,)}, 'net')
