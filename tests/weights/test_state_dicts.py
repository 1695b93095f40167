"""The layouts in which networks were published."""

import numpy as np
import pytest
import torch_files

from vaediff.errors import UserError
from vaediff.weights import state_dicts, tensors


def one(value):
  return np.full(2, value, np.float32)


def test_module_is_cut_off_where_every_name_has_it(tmp_path):
  path = tmp_path / 'x.pth'
  torch_files.write(path, {'module.a': one(1), 'module.b': one(2)})
  assert set(state_dicts.opened(path).shapes) == {'a', 'b'}
  torch_files.write(path, {'module.a': one(1), 'b': one(2)})
  assert set(state_dicts.opened(path).shapes) == {'module.a', 'b'}


def test_the_average_is_in_the_optimizer_by_position(tmp_path):
  path = tmp_path / 'content.pth'
  states = {0: {'ema': one(10), 'exp_avg': one(0)}, 1: {'ema': one(20), 'exp_avg': one(0)}}
  torch_files.write(
    path,
    {
      'netG_dict': {'module.b': one(1), 'module.a': one(2)},
      'netD_dict': {'module.d': one(3)},
      'optimizerG': {'state': states, 'param_groups': []},
      'global_step': 5,
    },
  )
  file = state_dicts.opened(path)
  assert (file.layout, file.step) == ('content', 5)
  found = {name: float(value[0]) for name, value in file.read(file.shapes).items()}
  assert found == {'netG_dict.b': 1, 'netG_dict.a': 2, 'ema.b': 10, 'ema.a': 20, 'netD_dict.d': 3}


def test_settings_are_plain_ones(tmp_path):
  path = tmp_path / 'x.ckpt'
  settings = {'lr': 0.1, 'name': 'x', 'sizes': [1, 2], 'nested': {'a': 1}, 'none': None}
  torch_files.write(path, {'state_dict': {'a': one(1)}, 'hyper_parameters': settings, 'epoch': 3})
  file = state_dicts.opened(path)
  assert file.settings == {'lr': 0.1, 'name': 'x', 'sizes': (1, 2)}
  assert (file.layout, file.step, file.unread) == ('lightning', 0, ('hyper_parameters', 'epoch'))


def test_safetensors(tmp_path):
  path = tmp_path / 'x.safetensors'
  tensors.save(path, {'a': one(1), 'b': one(2)}, {'family': 'none'})
  file = state_dicts.opened(path)
  assert file.settings == {'family': 'none'} and file.shapes == {'a': (2,), 'b': (2,)}
  np.testing.assert_array_equal(file.read(['b'])['b'], one(2))


def test_what_holds_no_numbers_is_refused(tmp_path):
  path = tmp_path / 'x.pt'
  torch_files.write(path, {'state_dict': {'a': 1}, 'other': one(1)})
  with pytest.raises(
    UserError, match=r'holds no tensors .*lightning.*, but state_dict, other; is it another'
  ):
    state_dicts.opened(path)
  torch_files.write(path, {'a': one(np.nan)})
  with pytest.raises(UserError, match='a holds numbers that are not finite'):
    state_dicts.opened(path).read(['a'])
  assert state_dicts.opened(path).shapes == {'a': (2,)}
