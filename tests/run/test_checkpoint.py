"""Checkpoints: save, restore, partial loads, and what is said when one is damaged or does not fit."""

import errno
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import types

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vaediff.errors import UserError
from vaediff.experiments.base import Network, TrainState
from vaediff.run import checkpoint, quiet
from vaediff.storage import identity

ROOT = pathlib.Path(__file__).parents[2]


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


def test_a_full_disk_keeps_the_last_good_checkpoint(small_disk):
  small_disk = small_disk('1m')
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


def flip(path, rng):
  content = bytearray(path.read_bytes())
  content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  path.write_bytes(content)


def test_a_flipped_bit_gives_the_state_that_was_saved_or_is_damage(tmp_path):
  """Anywhere in the files of the arrays; whoever turns the comparison off gets what is there."""
  rng, noticed = random.Random(0), 0
  saved(tmp_path / 'whole')
  for number in range(40):
    folder = tmp_path / str(number)
    shutil.copytree(tmp_path / 'whole', folder)
    state_files = folder / checkpoint.FOLDER / '5' / 'state'
    flip(rng.choice(sorted(p for p in state_files.rglob('*') if p.is_file() and p.stat().st_size)), rng)
    try:
      after, _ = checkpoint.Checkpointer(folder, 2).restore(abstract(state()))
    except checkpoint.DamagedCheckpoint as error:
      noticed += 1
      assert error.folder == folder / checkpoint.FOLDER / '5'
    else:
      jax.tree.map(np.testing.assert_array_equal, after, state())
  assert noticed > 5


def test_changed_arrays_are_damage_for_all_who_read_them(tmp_path):
  saved(tmp_path)
  path = tmp_path / checkpoint.FOLDER / '5' / 'meta' / 'metadata'
  meta = json.loads(path.read_text())
  meta = identity.unsealed(meta)
  meta['arrays']['networks/vae/ema_params'] = '0' * 16
  path.write_text(json.dumps(identity.sealed(meta)))
  params = abstract(state().networks['vae'].params)
  message = 'the values of networks/vae/ema_params are not those that were saved'
  with pytest.raises(checkpoint.DamagedCheckpoint, match=message):
    checkpoint.load_frozen(tmp_path, 'vae', params)
  with pytest.raises(checkpoint.DamagedCheckpoint, match=message):
    checkpoint.Checkpointer(tmp_path, 2).restore(abstract(state()))
  checkpoint.load_frozen(tmp_path, 'vae', params, check_arrays=False)
  checkpoint.Checkpointer(tmp_path, 2, check_arrays=False).restore(abstract(state()))


def test_an_id_is_of_the_arrays_and_not_of_the_moment(tmp_path):
  for name in ('a', 'b'):
    saved(tmp_path / name)
  assert checkpoint.identity_of(tmp_path / 'a') == checkpoint.identity_of(tmp_path / 'b')
  saved(tmp_path / 'c', average=False)
  assert checkpoint.identity_of(tmp_path / 'c') != checkpoint.identity_of(tmp_path / 'a')
  for name in ('d', 'e'):  # without digests every save has one of its own
    checkpointer = checkpoint.Checkpointer(tmp_path / name, 2, check_arrays=False)
    checkpointer.save(5, state(), {})
    checkpointer.close()
  assert checkpoint.identity_of(tmp_path / 'd') != checkpoint.identity_of(tmp_path / 'e')
  assert checkpoint.identity_of(tmp_path / 'none') == ''


def test_a_step_below_those_that_are_there_is_no_silent_success(tmp_path):
  saved(tmp_path, step=5)
  checkpointer = checkpoint.Checkpointer(tmp_path, 2)
  with pytest.raises(UserError, match='holds step 5, so step 3 was not saved'):
    checkpointer.save(3, state(step=3), {})


SYSTEM = (
  PermissionError(errno.EACCES, 'Permission denied'),
  OSError(errno.EIO, 'Input/output error'),
  MemoryError(),
  ValueError('PERMISSION_DENIED: Error opening "x"'),
  ValueError('UNAVAILABLE: the store is not there'),
)


@pytest.mark.parametrize('cause', SYSTEM, ids=lambda cause: type(cause).__name__ + str(cause)[:8])
def test_what_the_system_refuses_is_no_damage(tmp_path, monkeypatch, cause):
  saved(tmp_path)

  def refuse(*arguments, **named):
    raise RuntimeError('while reading') from cause

  monkeypatch.setattr(checkpoint.ocp.PyTreeCheckpointer, 'restore', refuse)
  with pytest.raises(checkpoint.UnreadableCheckpoint, match='cannot be read now: .*That is no damage'):
    checkpoint.load_frozen(tmp_path, 'vae', abstract(state().networks['vae'].params))
  checkpointer = checkpoint.Checkpointer(tmp_path, 2)
  monkeypatch.setattr(checkpointer._manager, 'restore', refuse)
  with pytest.raises(checkpoint.UnreadableCheckpoint, match='5 cannot be read now'):
    checkpointer.restore(abstract(state()))


def test_a_file_that_may_not_be_read_is_no_damage(tmp_path, monkeypatch):
  """Whatever the library makes of it: the files themselves are tried."""
  saved(tmp_path)
  victim = tmp_path / checkpoint.FOLDER / '5' / 'state' / '_METADATA'
  real_open = open

  def guarded(path, *arguments, **named):
    if str(path) == str(victim):
      raise PermissionError(errno.EACCES, 'Permission denied', str(path))
    return real_open(path, *arguments, **named)

  def fails(*arguments, **named):
    raise ValueError('something went wrong')

  monkeypatch.setattr('builtins.open', guarded)
  monkeypatch.setattr(checkpoint.ocp.StandardCheckpointer, 'metadata', fails)
  with pytest.raises(checkpoint.UnreadableCheckpoint, match=f'{victim}: Permission denied'):
    checkpoint.load_frozen(tmp_path, 'vae', abstract(state().networks['vae'].params))


@pytest.mark.parametrize('meta', ['[]', 'null', '{"id": 3}', '{"arrays": 1}', '[' * 100_000])
def test_a_meta_that_is_none_is_damage(tmp_path, meta):
  saved(tmp_path)
  (tmp_path / checkpoint.FOLDER / '5' / 'meta' / 'metadata').write_text(meta)
  with pytest.raises(checkpoint.DamagedCheckpoint, match='5 cannot be read: '):
    checkpoint.load_meta(tmp_path)


def test_messages_are_not_nested(tmp_path):
  saved(tmp_path)
  shutil.rmtree(tmp_path / checkpoint.FOLDER / '5' / 'state')
  with pytest.raises(checkpoint.DamagedCheckpoint) as caught:
    checkpoint.Checkpointer(tmp_path, 2).restore(abstract(state()))
  assert str(caught.value).count('cannot be read') == 1 and 'NoneType' not in str(caught.value)


@pytest.mark.parametrize(('error', 'said'), [('Event loop is closed', 0), ('another', 1)])
def test_writes_that_end_after_their_save_failed_print_nothing(error, said, monkeypatch):
  heard = []
  monkeypatch.setattr(absl.logging, 'get_verbosity', lambda: absl.logging.ERROR)
  hook = quiet.not_of_closed_loops(heard.append)
  hook(types.SimpleNamespace(exc_value=RuntimeError(error)))
  assert len(heard) == said


def test_a_full_disk_is_one_message_and_no_traceback(small_disk, tmp_path):
  """In a process of its own: here pytest hears what the system says of a failing thread."""
  program = tmp_path / 'program.py'
  program.write_text(
    'import absl.logging, jax, pathlib, sys\n'
    'from vaediff.errors import UserError\n'
    'from vaediff.run import checkpoint\n'
    "absl.logging.set_verbosity('error')\n"
    'state = {str(i): jax.random.normal(jax.random.key(i), (100, 100)) for i in range(200)}\n'
    'saving = checkpoint.Checkpointer(pathlib.Path(sys.argv[1]), 9)\n'
    'try:\n'
    '  saving.save(1, state, {})\n'
    '  saving.close()\n'
    'except UserError as error:\n'
    '  print(error)\n'
  )
  command = [sys.executable, str(program), str(small_disk('3m') / 'stage')]
  result = subprocess.run(command, cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True)
  assert result.returncode == 0, result.stderr.decode()
  assert b'No space left on device' in result.stdout and b'There is no earlier' in result.stdout
  assert b'Traceback' not in result.stderr, result.stderr.decode()[:2000]
