"""Any file of torch.save is opened, whatever it names, and nothing of it is run."""

import os
import pathlib
import pickle
import tempfile

import numpy as np
import pytest
import torch_files

from vaediff.errors import UserError
from vaediff.weights import state_dicts, torch_container
from vaediff.weights.torch_container import Broken, Opaque

FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures'
CONTAINERS = FIXTURES / 'containers'


def test_a_state_dict_beside_everything():
  file = state_dicts.opened(CONTAINERS / 'everything.pt')
  assert (file.layout, file.step) == ('lightning', 0)  # of a step that only NumPy could read
  with np.load(CONTAINERS / 'everything.npz') as wanted:
    found = file.read(file.shapes)
    assert set(found) == set(wanted.files)
    for name in wanted.files:
      np.testing.assert_array_equal(found[name], wanted[name])
  assert {'callbacks', 'loops', 'hyper_parameters'} <= set(file.unread)


def test_a_file_that_would_run_code_runs_none():
  made = pathlib.Path(tempfile.gettempdir()) / 'vaediff_import_ran_code'
  assert not made.exists()
  assert len(state_dicts.opened(CONTAINERS / 'runs_code_if_unsafe.pt').shapes) == 8
  assert not made.exists()


class Runs:
  """Runs a command when it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_protocol_runs_anything(tmp_path, protocol):
  made, path = tmp_path / 'made', tmp_path / 'x.pt'
  torch_files.write_zip(path, pickle.dumps({'state_dict': {}, 'x': Runs(made)}, protocol))
  content = torch_container.opened(path).content
  assert isinstance(content['x'], Opaque) and not made.exists()
  assert content['x'].arguments == (str(made),)


NASTY = (
  b'c__builtin__\neval\n(S\'open("made", "w")\'\ntR.',
  b'(S\'open("made", "w")\'\ni__builtin__\nexec\n.',
  b'(c__builtin__\nexec\nS\'open("made", "w")\'\no.',
  b"c__builtin__\ngetattr\n(cos\nsystem\nS'__call__'\ntR(S'touch made'\ntR.",
  b'\x80\x02cbuiltins\ndict\nN}X\x01\x00\x00\x00aK\x01s\x86b.',  # attributes for a class
  b'\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsX\x01\x00\x00\x00xsb.',  # for a dict
)


@pytest.mark.parametrize('body', NASTY, ids=range(len(NASTY)))
def test_hand_made_pickles_run_nothing(tmp_path, monkeypatch, body):
  monkeypatch.chdir(tmp_path)
  path = tmp_path / 'x.pt'
  torch_files.write_zip(path, body)
  try:
    content = torch_container.opened(path).content
    assert isinstance(content, Opaque | dict) or issubclass(content, Opaque)
  except UserError as error:
    assert 'is damaged, or no file of torch.save' in str(error)
  assert [file.name for file in tmp_path.iterdir()] == ['x.pt']
  assert dict(a=1).items() and not hasattr(Opaque, 'a')


@pytest.mark.parametrize('legacy', [False, True])
def test_storages_are_read_when_they_are_asked_for(tmp_path, legacy):
  path, rng = tmp_path / 'x.pt', np.random.default_rng(0)
  arrays = {'a': rng.normal(size=(3, 2)).astype(np.float32), 'b': np.arange(4), 'c': rng.normal(size=5)}
  torch_files.write(path, {'state_dict': arrays, 'global_step': 7}, legacy=legacy)
  container = torch_container.opened(path)
  tensors = container.content['state_dict']
  for names in (['c'], ['b', 'a']):
    found = container.read({name: tensors[name] for name in names})
    assert list(found) == names
    for name in names:
      np.testing.assert_array_equal(found[name], arrays[name])
  assert state_dicts.opened(path).step == 7


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('kept', [0, 10, 0.4, 0.99])
def test_truncated_files_are_said_to_be(tmp_path, legacy, kept):
  path = tmp_path / 'x.pt'
  torch_files.write(path, {'a': np.ones((50, 50), np.float32)}, legacy=legacy)
  whole = path.read_bytes()
  path.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else kept])
  with pytest.raises(UserError, match=r'x.pt .*(damaged|truncated)'):
    state_dicts.opened(path)


def test_a_broken_tensor_matters_where_it_is_wanted(tmp_path):
  path = tmp_path / 'x.pt'
  rebuild = b'ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02K\x03tR'
  body = b'\x80\x02}(X\x01\x00\x00\x00a' + rebuild + b'X\x01\x00\x00\x00bK\x01u.'
  torch_files.write_zip(path, body)
  assert isinstance(torch_container.opened(path).content['a'], Broken)
  with pytest.raises(UserError, match=r'x.pt: the tensor a cannot be read: a tensor without storage'):
    state_dicts.opened(path)


def test_missing_files_and_folders(tmp_path):
  with pytest.raises(UserError, match='does not exist'):
    torch_container.opened(tmp_path / 'no.pt')
  with pytest.raises(UserError, match='is a folder'):
    torch_container.opened(tmp_path)
