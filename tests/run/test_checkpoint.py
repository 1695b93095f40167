"""Checkpoints: save, restore, partial loads, and what is said when one is damaged or does not fit."""

import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vaediff.errors import UserError
from vaediff.experiments.base import Network, TrainState
from vaediff.run import checkpoint


def state(width=3, average=True, step=5):
  params = {'dense': {'kernel': jnp.arange(2.0 * width).reshape(2, width)}}
  optimizer = optax.adam(1e-3)
  network = Network(
    params=params,
    opt_state=optimizer.init(params),
    ema_params=jax.tree.map(lambda x: x + 100, params) if average else None,
  )
  return TrainState(step=jnp.int32(step), networks={'vae': network}, extra={})


def abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def saved(folder, keep=2, **options):
  checkpointer = checkpoint.Checkpointer(folder, keep)
  value = state(**options)
  checkpointer.save(int(value.step), value, {'data_position': int(value.step), 'stage': 'vae'})
  checkpointer.close()
  return value


def test_restore_gives_the_state_back(tmp_path):
  before = saved(tmp_path)
  after, meta = checkpoint.Checkpointer(tmp_path, 2).restore(abstract(before))
  assert meta == checkpoint.load_meta(tmp_path)
  assert (meta['data_position'], meta['stage']) == (5, 'vae') and len(meta['id']) == 16
  assert jax.tree.structure(after) == jax.tree.structure(before)
  jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.parametrize('average', [True, False])
def test_load_frozen_takes_the_average_where_there_is_one(tmp_path, average):
  before = saved(tmp_path, average=average)
  network = before.networks['vae']
  loaded = checkpoint.load_frozen(tmp_path, 'vae', abstract(network.params))
  jax.tree.map(np.testing.assert_array_equal, loaded, network.eval_params)


def test_only_the_latest_are_kept(tmp_path):
  for step in (1, 2, 3):
    saved(tmp_path, step=step)
  assert checkpoint.finished_steps(tmp_path / checkpoint.FOLDER) == [2, 3]


def test_no_checkpoint(tmp_path):
  assert checkpoint.latest_step(tmp_path) is None
  with pytest.raises(UserError, match=f'no checkpoint in {tmp_path}.*train that stage first'):
    checkpoint.load_frozen(tmp_path, 'vae', {})


@pytest.mark.parametrize('other', [{'width': 4}, {'average': False}])
def test_another_architecture_is_named(tmp_path, other):
  saved(tmp_path)
  checkpointer = checkpoint.Checkpointer(tmp_path, 2)
  with pytest.raises(UserError, match='another architecture than the config: networks/vae/.*dense/kernel'):
    checkpointer.restore(abstract(state(**other)))
  assert checkpoint.latest_step(tmp_path) == 5  # nothing lost


def damage_truncate(folder):
  victims = [path for path in (folder / 'state').rglob('*') if path.is_file() and path.stat().st_size > 0]
  for path in victims:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_remove(folder):
  shutil.rmtree(folder / 'state' / 'd')


def damage_state(folder):
  shutil.rmtree(folder / 'state')


@pytest.mark.parametrize('damage', [damage_truncate, damage_remove, damage_state])
def test_a_damaged_checkpoint_is_named_and_left_alone(tmp_path, damage):
  before = saved(tmp_path)
  folder = tmp_path / checkpoint.FOLDER / '5'
  damage(folder)
  left = sorted(path.relative_to(folder) for path in folder.rglob('*'))
  with pytest.raises(UserError, match=f'{folder} cannot be read: .*the previous one'):
    checkpoint.Checkpointer(tmp_path, 2).restore(abstract(before))
  with pytest.raises(UserError, match=f'{folder} cannot be read'):
    checkpoint.load_frozen(tmp_path, 'vae', abstract(before.networks['vae'].params))
  assert sorted(path.relative_to(folder) for path in folder.rglob('*')) == left


def test_a_damaged_meta_is_named(tmp_path):
  before = saved(tmp_path)
  (tmp_path / checkpoint.FOLDER / '5' / 'meta' / 'metadata').write_text('{"data_pos')
  with pytest.raises(UserError, match='cannot be read'):
    checkpoint.load_meta(tmp_path)
  with pytest.raises(UserError, match='cannot be read'):
    checkpoint.Checkpointer(tmp_path, 2).restore(abstract(before))


def test_what_is_saved_is_what_was_given(tmp_path):
  """The save goes on in the background; a dict changed afterwards must not change it."""
  checkpointer, value, meta = checkpoint.Checkpointer(tmp_path, 2), state(), {'last': {'loss': 1.0}}
  checkpointer.save(5, value, meta)
  meta['last']['loss'] = 2.0
  checkpointer.close()
  assert checkpoint.load_meta(tmp_path)['last'] == {'loss': 1.0}


@pytest.fixture
def small_disk(tmp_path):
  """A file system of one megabyte."""
  folder = tmp_path / 'disk'
  folder.mkdir()
  mounted = subprocess.run(
    ['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', str(folder)],
    capture_output=True,
    check=False,
  )
  if mounted.returncode:
    pytest.skip('mounting a small file system needs root: ' + mounted.stderr.decode().strip())
  yield folder
  subprocess.run(['umount', '-l', str(folder)], check=True)


def test_a_full_disk_keeps_the_last_good_checkpoint(small_disk):
  before = saved(small_disk)
  noise = np.random.default_rng(0).standard_normal((512, 1024)).astype(np.float32)  # 2 MB, incompressible
  big = before.replace(step=jnp.int32(6), extra={'noise': jnp.asarray(noise)})
  checkpointer = checkpoint.Checkpointer(small_disk, 2)
  with pytest.raises(UserError, match='could not save step 6 in .*[Ll]ast good checkpoint is step 5'):
    checkpointer.save(6, big, {'data_position': 6})
    checkpointer.wait()
  assert checkpoint.latest_step(small_disk) == 5
  after, _ = checkpoint.Checkpointer(small_disk, 2).restore(abstract(before))
  jax.tree.map(np.testing.assert_array_equal, after, before)
