"""State dicts without PyTorch: files built here opcode by opcode, and files of PyTorch if installed."""

import hashlib
import io
import pathlib
import pickle
import struct
import zipfile
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.errors import UserError
from vaediff.weights import torch_file

TYPES = {
  'FloatStorage': 'float32',
  'HalfStorage': 'float16',
  'DoubleStorage': 'float64',
  'BFloat16Storage': 'bfloat16',
  'LongStorage': 'int64',
  'IntStorage': 'int32',
  'ShortStorage': 'int16',
  'CharStorage': 'int8',
  'ByteStorage': 'uint8',
  'BoolStorage': 'bool',
}
STORAGE_TYPES = {dtype: name for name, dtype in TYPES.items()}


class Global(NamedTuple):
  module: str
  name: str


class Call(NamedTuple):
  function: Global
  arguments: tuple


class Persistent(NamedTuple):
  pid: tuple


def opcodes(value):
  """The value in the pickle machine's language: protocol 2, no memo."""
  match value:
    case Global(module, name):
      return f'c{module}\n{name}\n'.encode()
    case Call(function, arguments):
      return opcodes(function) + opcodes(arguments) + b'R'
    case Persistent(pid):
      return opcodes(pid) + b'Q'
    case bool() | None:
      return {True: b'\x88', False: b'\x89', None: b'N'}[value]
    case int():
      size = value.bit_length() // 8 + 1
      return b'\x8a' + bytes([size]) + value.to_bytes(size, 'little', signed=True)
    case float():
      return b'G' + struct.pack('>d', value)
    case str():
      return b'X' + struct.pack('<I', len(value.encode())) + value.encode()
    case tuple():
      return b'(' + b''.join(map(opcodes, value)) + b't'
    case list():
      return b'](' + b''.join(map(opcodes, value)) + b'e'
    case dict():
      return b'}(' + b''.join(opcodes(item) for pair in value.items() for item in pair) + b'u'
  raise TypeError(value)


def dump(value):
  return b'\x80\x02' + opcodes(value) + b'.'


def tensor(key, dtype, numel, offset=0, shape=None, strides=(1,), view=(), version='_v2'):
  storage = ('storage', Global('torch', STORAGE_TYPES[dtype]), key, 'cpu', numel, *view)
  arguments = (Persistent(storage), offset, (numel,) if shape is None else shape, strides)
  if version:
    arguments += (False, Call(Global('collections', 'OrderedDict'), ()))
  return Call(Global('torch._utils', f'_rebuild_tensor{version}'), arguments)


def whole(key, value):
  strides = tuple(stride // value.itemsize for stride in np.empty(value.shape, value.dtype).strides)
  return tensor(key, value.dtype.name, value.size, 0, value.shape, strides)


def zip_bytes(state, storages, byteorder=b'little'):
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w') as archive:
    archive.writestr('archive/data.pkl', dump(state))
    archive.writestr('archive/byteorder', byteorder)
    for key, value in storages.items():
      archive.writestr(f'archive/data/{key}', value.tobytes())
    archive.writestr('archive/version', '3\n')
  return file.getvalue()


def legacy_bytes(state, storages):
  info = {'protocol_version': 1001, 'little_endian': True, 'type_sizes': {'short': 2, 'int': 4, 'long': 4}}
  parts = [0x1950A86A20F9469CFC6C, 1001, info, state, list(storages)]
  stored = [struct.pack('<q', value.size) + value.tobytes() for value in storages.values()]
  return b''.join(map(dump, parts)) + b''.join(stored)


def write_state(path, state):
  """Writes plain arrays as a zip file; for the tests of networks."""
  keys = {name: str(index) for index, name in enumerate(state)}
  tensors = {name: whole(keys[name], value) for name, value in state.items()}
  path.write_bytes(zip_bytes(tensors, {keys[name]: value for name, value in state.items()}))


@pytest.fixture
def write(tmp_path):
  def to_file(content):
    path = tmp_path / 'net.pth'
    path.write_bytes(content)
    return path

  return to_file


def same(actual, expected):
  assert list(actual) == list(expected)
  for name, value in expected.items():
    assert isinstance(actual[name], np.ndarray), name
    assert (actual[name].dtype, actual[name].shape) == (value.dtype, value.shape), name
    assert actual[name].tobytes() == value.tobytes(), name
    assert actual[name].flags.c_contiguous and actual[name].flags.owndata, name


BYTES = pytest.mark.parametrize('pack', [zip_bytes, legacy_bytes])


@BYTES
@pytest.mark.parametrize('dtype', TYPES.values())
def test_types(pack, dtype, write):
  value = np.array([[0, 1, 3], [7, 100, 1]], np.dtype(jnp.bfloat16) if dtype == 'bfloat16' else dtype)
  same(torch_file.read(write(pack({'w': whole('0', value)}, {'0': value}))), {'w': value})


@BYTES
def test_views_share_a_storage(pack, write):
  flat = np.arange(24, dtype=np.float32)
  state = {
    'matrix': tensor('7', 'float32', 24, 0, (4, 6), (6, 1)),
    'transposed': tensor('7', 'float32', 24, 0, (6, 4), (1, 6)),
    'part': tensor('7', 'float32', 24, 10, (2, 3), (7, 2)),
    'expanded': tensor('7', 'float32', 24, 5, (3, 2), (0, 1)),
    'scalar': tensor('7', 'float32', 24, 23, (), ()),
    'empty': tensor('7', 'float32', 24, 0, (0, 3), (3, 1)),
    'old': tensor('7', 'float32', 24, 2, (5,), (4,), version=''),
    'parameter': Call(
      Global('torch._utils', '_rebuild_parameter'),
      (tensor('7', 'float32', 24, 1, (2,), (1,)), True, Call(Global('collections', 'OrderedDict'), ())),
    ),
  }
  same(
    torch_file.read(write(pack(state, {'7': flat}))),
    {
      'matrix': flat.reshape(4, 6),
      'transposed': flat.reshape(4, 6).T.copy(),
      'part': np.float32([[10, 12, 14], [17, 19, 21]]),
      'expanded': np.float32([[5, 6]] * 3),
      'scalar': np.float32(23).reshape(()),
      'empty': np.zeros((0, 3), np.float32),
      'old': np.float32([2, 6, 10, 14, 18]),
      'parameter': np.float32([1, 2]),
    },
  )


def test_legacy_storage_that_is_a_view_of_another(write):
  flat = np.arange(10, dtype=np.int32)
  state = {
    'whole': tensor('a', 'int32', 10, 0, (10,), view=(None,)),
    'view': tensor('a', 'int32', 10, 1, (2,), view=(('b', 4, 3),)),
  }
  same(torch_file.read(write(legacy_bytes(state, {'a': flat}))), {'whole': flat, 'view': np.int32([5, 6])})
  beyond = {'view': tensor('a', 'int32', 10, 2, (2,), view=(('b', 4, 3),))}
  with pytest.raises(UserError, match='view reaches past the end'):
    torch_file.read(write(legacy_bytes(beyond, {'a': flat})))


@BYTES
def test_what_is_no_tensor_is_left_out(pack, write):
  value = np.ones(3, np.float32)
  state = {
    'w': whole('0', value),
    'epoch': 3,
    'lr': 0.5,
    'size': Call(Global('torch', 'Size'), ((1, 2),)),
    'x': [1],
  }
  same(torch_file.read(write(pack(state, {'0': value}))), {'w': value})


EVIL = {
  'os.system': ('os', 'system', 'touch {path}'),
  'builtins.eval': ('builtins', 'eval', "open('{path}', 'w')"),
  'builtins.getattr': ('builtins', 'getattr', '{path}'),
  'torch.storage._load_from_bytes': ('torch.storage', '_load_from_bytes', '{path}'),
  'torch.load': ('torch', 'load', '{path}'),
  'torch.ComplexFloatStorage': ('torch', 'ComplexFloatStorage', '{path}'),
  'numpy.dtype': ('numpy', 'dtype', '{path}'),
}


@BYTES
@pytest.mark.parametrize('name', EVIL)
def test_other_names_are_refused_and_not_run(pack, name, write, tmp_path):
  module, function, argument = EVIL[name]
  touched = tmp_path / 'touched'
  state = {'w': Call(Global(module, function), (argument.format(path=touched),))}
  with pytest.raises(UserError, match=f'net.pth asks for {name}, which is refused'):
    torch_file.read(write(pack(state, {})))
  assert not touched.exists()


def test_a_plain_pickle_is_refused_and_not_run(write, tmp_path):
  touched = tmp_path / 'touched'

  class Evil:
    def __reduce__(self):
      return pathlib.Path.touch, (touched,)

  for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
    with pytest.raises(UserError, match='which is refused'):
      torch_file.read(write(pickle.dumps(Evil(), protocol)))
    assert not touched.exists()


@BYTES
def test_truncated_files(pack, write):
  value = np.arange(100, dtype=np.float64)
  content = pack({'w': whole('0', value)}, {'0': value})
  for length in [1, 3, 10, 100, len(content) // 2, len(content) - 400, len(content) - 1]:
    with pytest.raises(UserError, match='net.pth is (truncated|damaged)'):
      torch_file.read(write(content[:length]))


def test_damaged_zip(write):
  value = np.arange(100, dtype=np.float64)
  content = zip_bytes({'w': whole('0', value)}, {'0': value})
  flipped = bytearray(content)
  flipped[content.index(value.tobytes()) + 40] ^= 1
  with pytest.raises(UserError, match='damaged .*CRC'):
    torch_file.read(write(bytes(flipped)))
  with pytest.raises(UserError, match="'archive/data/0'"):
    torch_file.read(write(zip_bytes({'w': whole('0', value)}, {})))
  with pytest.raises(UserError, match='big-endian'):
    torch_file.read(write(zip_bytes({'w': whole('0', value)}, {'0': value}, b'big')))


@BYTES
def test_tensors_stay_within_their_storage(pack, write):
  value = np.arange(6, dtype=np.float32)
  for offset, shape, strides in [(1, (6,), (1,)), (0, (2, 3), (4, 1)), (6, (), ()), (2**62, (1,), (1,))]:
    state = {'w': tensor('0', 'float32', 6, offset, shape, strides)}
    with pytest.raises(UserError, match='w reaches past the end of its storage'):
      torch_file.read(write(pack(state, {'0': value})))
  for offset, shape, strides in [
    (-1, (2,), (1,)),
    (5, (2,), (-1,)),
    (0, (-1,), (1,)),
    (0, (2,), ()),
    (0, 'ab', 'cd'),
  ]:
    state = {'w': tensor('0', 'float32', 6, offset, shape, strides)}
    with pytest.raises(UserError, match='damaged'):
      torch_file.read(write(pack(state, {'0': value})))
  with pytest.raises(UserError, match='w reaches past the end of its storage'):
    torch_file.read(write(pack({'w': tensor('0', 'float32', 7)}, {'0': value})))


def test_other_files(write, tmp_path):
  cases = {
    b'': 'no file of torch.save',
    b'hello, this is text\n': 'no file of torch.save',
    np.random.default_rng(0).bytes(1000): 'no file of torch.save',
    pickle.dumps({'a': 1}): 'lacks the magic number',
    zip_bytes([1, 2], {}): 'holds a list, not a state dict',
    zip_bytes({'model': {}, 'epoch': 2}, {}): r"holds no tensors, only \['epoch', 'model'\]",
  }
  for content, message in cases.items():
    with pytest.raises(UserError, match=f'net.pth .*{message}'):
      torch_file.read(write(content))
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w') as archive:
    archive.writestr('picture.png', b'')
  with pytest.raises(UserError, match='without data.pkl'):
    torch_file.read(write(file.getvalue()))
  for path, message in ((tmp_path / 'absent.pth', 'does not exist'), (tmp_path, 'is a folder')):
    with pytest.raises(UserError, match=message):
      torch_file.read(path)
    with pytest.raises(UserError, match=message):
      torch_file.sha256_of(path)


def test_hash_in_the_name(tmp_path):
  digest = hashlib.sha256(b'content').hexdigest()
  for name in ['net.pth', 'net-1234567.pth', 'net-12345678.safetensors', 'net-large.pth']:
    torch_file.check_named_hash(tmp_path / name)  # no hash in the name: not even opened
  for name in [f'net-{digest[:8]}.pth', f'net-2015-12-05-{digest[:12].upper()}.pth', f'net-{digest}.pth']:
    (tmp_path / name).write_bytes(b'content')
    torch_file.check_named_hash(tmp_path / name)
    (tmp_path / name).write_bytes(b'Content')
    with pytest.raises(UserError, match=f'{name} is damaged, or another file'):
      torch_file.check_named_hash(tmp_path / name)
  assert torch_file.sha256_of(tmp_path / name) == hashlib.sha256(b'Content').hexdigest()


@pytest.mark.parametrize('zipped', [False, True])
def test_files_of_pytorch(zipped, tmp_path):
  torch = pytest.importorskip('torch', reason='PyTorch is not installed: pip install torch')
  base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5).sin()
  module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
  state = module.state_dict()  # an OrderedDict with _metadata, and a 0-d int64 num_batches_tracked
  state |= {
    'transposed': base.permute(2, 0, 1),
    'offset': base[1:, 2:, ::2],
    'again': base.flatten()[7:9],
    'expanded': base[0, 0, :2].expand(3, 2),
    'scalar': torch.tensor(-5),
    'empty': torch.zeros(0, 3),
    'parameter': torch.nn.Parameter(torch.randn(2, 3)),
  }
  for dtype in TYPES.values():
    state[dtype] = (torch.arange(6) % 3).to(getattr(torch, dtype)).reshape(2, 3)
  path = tmp_path / 'net.pth'
  torch.save(state | {'shape': base.shape, 'steps': 10}, path, _use_new_zipfile_serialization=zipped)

  def to_numpy(value):
    value = value.detach().contiguous()
    if value.dtype == torch.bfloat16:
      return value.view(torch.int16).numpy().view(jnp.bfloat16)
    return value.numpy()

  same(torch_file.read(path), {name: to_numpy(value) for name, value in state.items()})
