"""Orbax checkpoints: save, restore, and load the networks of finished stages. Nothing else touches Orbax.

A checkpoint of step N is the folder `<stage>/checkpoints/N` with two items: `state` (parameters, optimizer
state, averages, step) and `meta` (JSON: its id, digests of its arrays, stage, config, ids of what it was made
of, data position, seconds trained). Saving is asynchronous; an unfinished save leaves a temporary folder that
the next run removes, never a step. In a bucket that is the step's folder without the object `spool.DONE`.
"""

import pathlib
import secrets
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from vaediff.errors import UserError
from vaediff.machine import digests, distributed, sharding
from vaediff.models.functional import Model
from vaediff.run import quiet, spool
from vaediff.storage import files, identity
from vaediff.types import Params

FOLDER = 'checkpoints'
DAMAGED, EARLIER = 'damaged', 'earlier'
"""Folders of a stage for what was set aside."""
OF_STEP = 'step-'
"""What the id of a checkpoint of an earlier version begins with: they had none of their own."""
ID, ARRAYS = 'id', 'arrays'
"""In `meta`: the id of the saved state, and the digests of its parts."""
STARTS = 'starts'
"""In `meta`: the ids of the networks that training began as."""

finished_steps = spool.finished_steps

quiet.install()


class DamagedCheckpoint(UserError):
  """A checkpoint whose files are missing or cannot be read.

  Attributes:
    folder: of the checkpoint.
  """

  def __init__(self, folder: pathlib.Path, message: str):
    super().__init__(message)
    self.folder = folder


class UnreadableCheckpoint(UserError):
  """A checkpoint that the system does not let be read, such as for want of permission: it may be whole."""

  def __init__(self, folder: pathlib.Path, reason: str):
    super().__init__(
      f'the checkpoint {folder} cannot be read now: {reason}. That is no damage: it was left where it is. '
      'Mend that, then run the same command again'
    )


class Checkpointer:
  """The checkpoints of one stage.

  Args:
    stage_folder: `<workdir>/<stage>`.
    keep: how many of the latest checkpoints to keep.
    check_arrays: digests of the arrays are stored, and compared when they are read.
  """

  def __init__(self, stage_folder: pathlib.Path, keep: int, check_arrays: bool = True):
    self.folder = (stage_folder / FOLDER).absolute()
    self._check_arrays, self._saving, self._closed = check_arrays, None, False
    try:
      self._spool = spool.of(self.folder, keep)
      self._manager = ocp.CheckpointManager(
        self._spool.here if self._spool else self.folder,
        options=ocp.CheckpointManagerOptions(
          max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
        ),
      )
    except OSError as error:
      raise UserError(f'{self.folder} cannot be written: {files.reason(error)}') from error

  def latest_step(self) -> int | None:
    """Returns the step of the newest complete checkpoint, or None."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
    """Starts saving; returns once the arrays are copied off the devices. All processes must call it.

    Raises:
      UserError: when this or the previous save failed; the last good checkpoint stays.
    """
    arrays = digests.of_parts(state) if self._check_arrays else {}
    own = identity.digest(arrays) if arrays else secrets.token_hex(identity.DIGITS // 2)
    meta = identity.sealed({**meta, ID: own, ARRAYS: arrays})
    before, self._saving = self._saving, step
    try:
      if self._spool:
        self._spool.wait()
      saved = self._manager.save(
        step,
        args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)),
      )
    except Exception as error:  # Orbax wraps whatever the storage raised, of the save before or of this one
      raise self._failed(error, before) from error
    if not saved:
      raise UserError(
        f'{self.folder} holds step {self.latest_step()}, so step {step} was not saved: those checkpoints are '
        'of another training. Move the folder away, and run again'
      )
    if self._spool:
      self._spool.send(step, self._manager.wait_until_finished)

  def wait(self) -> None:
    """Waits for the save in progress. Raises UserError when it failed."""
    if self._closed:
      return
    try:
      if self._spool:
        self._spool.wait()
      self._manager.wait_until_finished()
    except Exception as error:
      raise self._failed(error, self._saving) from error

  def kept(self) -> str:
    """Waits for the save in progress; returns in words which step is kept, also where that save failed."""
    try:
      self.wait()
    except UserError as error:
      return str(error)
    try:
      steps = finished_steps(self.folder)
    except OSError as error:
      return f'which step is kept is not known: {files.reason(error)}'
    return f'step {steps[-1]} is kept' if steps else 'no step was saved yet'

  def restore(self, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
    """Returns state and meta of the latest checkpoint, with the shardings of `abstract_state`.

    Raises:
      DamagedCheckpoint: when files of it are missing or hold something else.
      UserError: when it is of another architecture, or the system does not let it be read.
    """
    step = self.latest_step()
    folder = self.folder / str(step)
    failure, restored = None, None
    try:
      check_allowed(folder)
      _check_structure(folder, abstract_state)
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), meta=ocp.args.JsonRestore()),
      )
      check_meta(folder, restored.meta)
    except Exception as error:
      failure = unreadable(folder, error)
    if not distributed.agree(failure is None):  # another process may have met the broken file
      raise failure or damaged(folder, OSError('another process could not read its part'))
    if self._check_arrays:
      compare_arrays(folder, restored.state, restored.meta)
    return restored.state, restored.meta

  def close(self) -> None:
    """Waits for the save in progress and frees the manager's threads. Raises UserError when it failed."""
    try:
      self.wait()
    finally:
      self._closed = True
      self._manager.close()

  def _failed(self, error: Exception, step: int | None) -> UserError:
    try:
      steps = finished_steps(self.folder)
      last = f'the last good checkpoint is step {steps[-1]}' if steps else 'there is no earlier checkpoint'
    except OSError as now:
      last = f'which is the last good checkpoint is not known ({files.reason(now)})'
    return UserError(
      f'could not save step {step} in {self.folder}: {files.reason(error)}. {last.capitalize()}. Make room '
      'or mend the folder, then run the same command again: it resumes from there'
    )


def latest_step(stage_folder: pathlib.Path) -> int | None:
  """Returns the newest complete step of a stage without opening it, or None."""
  steps = finished_steps(stage_folder / FOLDER)
  return steps[-1] if steps else None


def abstract_params(model: Model, mesh: Mesh) -> Params:
  """Returns shapes, types and (replicated) shardings of a network's parameters."""
  return sharding.abstract_replicated(jax.eval_shape(model.init, jax.random.key(0)), mesh)


def load_frozen(
  stage_folder: pathlib.Path,
  network: str,
  abstract_params: Params,
  *,
  check_arrays: bool = True,
  field: str = '',
  step: int = 0,
) -> Params:
  """Returns a network's averaged parameters (or its parameters, where no average is kept).

  Args:
    stage_folder: `<workdir>/<stage>` of the stage that trained it.
    network: its name in that stage's state.
    abstract_params: shapes, types and shardings of the parameters.
    check_arrays: compare them with the digest that was stored with them.
    field: of the config, that names another run; for the message.
    step: of the checkpoint; 0 = the latest.

  Raises:
    UserError: when there is no checkpoint, it is damaged, or it holds another architecture.
  """
  folder = folder_of(stage_folder, step, field)
  check_allowed(folder)
  stored = stored_shapes(folder)
  averaged = any(path.startswith(f'networks/{network}/ema_params/') for path in stored)
  name = 'ema_params' if averaged else 'params'
  tree = {'networks': {network: {name: abstract_params}}}
  _check_structure(folder, tree, partial=True)
  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      restored = checkpointer.restore(
        spool.local(folder) / 'state',
        args=ocp.args.PyTreeRestore(
          tree,
          restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
          partial_restore=True,
        ),
      )
  except Exception as error:
    raise unreadable(folder, error) from error
  if check_arrays:
    compare_arrays(folder, restored, load_meta(stage_folder, step))
  return restored['networks'][network][name]


def latest_folder(stage_folder: pathlib.Path, field: str = '') -> pathlib.Path:
  """Returns the folder of the newest complete checkpoint of a stage.

  Raises:
    UserError: when there is none; `field` is what to correct where the stage is of another run.
  """
  step = latest_step(stage_folder)
  if step is None:
    moved = f', or set config.{field} to where that run lies now' if field else ''
    raise UserError(f'no checkpoint in {stage_folder / FOLDER}: train that stage first (--mode=train){moved}')
  return (stage_folder / FOLDER / str(step)).absolute()


def folder_of(stage_folder: pathlib.Path, step: int, field: str = '') -> pathlib.Path:
  """Returns the folder of the complete checkpoint of a step, for 0 of the newest.

  Raises:
    UserError: when there is none; names those that there are.
  """
  newest = latest_folder(stage_folder, field)
  steps = finished_steps(stage_folder / FOLDER)
  if step and step not in steps:
    raise UserError(
      f'no checkpoint of step {step} in {stage_folder / FOLDER}, which has those of steps '
      f'{", ".join(map(str, steps))}; how many a training keeps says train.keep_checkpoints'
    )
  return newest.parent / str(step) if step else newest


def load_meta(stage_folder: pathlib.Path, step: int = 0) -> dict[str, Any]:
  """Returns the JSON item of a checkpoint: its id, stage, config, data position, seconds, and so on.

  It is that of a step; of the latest for 0.

  Raises:
    DamagedCheckpoint: when it is missing, or is none.
    UserError: when there is no such checkpoint.
  """
  folder = folder_of(stage_folder, step)
  try:
    meta = files.read_json(folder / 'meta' / 'metadata')
  except UserError as error:
    raise unreadable(folder, error) from error
  check_meta(folder, meta)
  return meta


def check_allowed(folder: pathlib.Path) -> None:
  """Raises UnreadableCheckpoint where a file of a checkpoint may not be read: libraries say it at length."""
  forbidden = files.first_forbidden(folder)
  if forbidden:
    raise UnreadableCheckpoint(folder, f'{forbidden}: Permission denied')


def check_meta(folder: pathlib.Path, meta: Any) -> None:
  """Raises DamagedCheckpoint for a `meta` that is not what was saved; an earlier version did not seal it."""
  try:
    if not isinstance(meta, dict) or {ID, ARRAYS, identity.SEAL} & meta.keys():
      identity.unsealed(meta)
  except ValueError as error:
    raise damaged(folder, ValueError(f'its meta: {error}')) from error


def identity_of(stage_folder: pathlib.Path, step: int = 0) -> str:
  """Returns the id of a stage's complete checkpoint of a step, for 0 of the newest; '' without one.

  Checkpoints of an earlier version have none of their own: it is their step.
  """
  step = step or latest_step(stage_folder)
  if step not in finished_steps(stage_folder / FOLDER):
    return ''
  return load_meta(stage_folder, step).get(ID, f'{OF_STEP}{step}')


def compare_arrays(folder: pathlib.Path, tree: Any, meta: dict[str, Any]) -> None:
  """Raises DamagedCheckpoint where arrays of a state are not those that were saved.

  All processes must call it. Checkpoints that were stored without digests are not compared.
  """
  stored = meta.get(ARRAYS, {})
  if not stored:
    return
  changed = [part for part, value in digests.of_parts(tree).items() if stored.get(part) != value]
  if changed:
    raise damaged(folder, ValueError(f'the values of {changed[0]} are not those that were saved'))


def stored_shapes(folder: pathlib.Path) -> dict[str, tuple[int, ...]]:
  """Returns the shape of every stored array by its slash-joined path."""
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      metadata = checkpointer.metadata(spool.local(folder) / 'state')
    if metadata.item_metadata is None:
      raise ValueError('the description of its arrays is missing')
    tree = metadata.item_metadata.tree
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, 'shape'))
    return {sharding.path_name(path): tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, 'shape')}
  except Exception as error:
    raise unreadable(folder, error) from error


def damaged(folder: pathlib.Path, error: Exception) -> DamagedCheckpoint:
  """Returns the error for a checkpoint whose content is not what it should be."""
  return DamagedCheckpoint(
    folder,
    f'the checkpoint {folder} cannot be read: {files.reason(error)}. Files of it are missing or damaged. '
    'Training sets it aside and goes on from the previous one; to do so by hand, move that folder away',
  )


def unreadable(folder: pathlib.Path, error: Exception) -> UserError:
  """Returns the error for a checkpoint that could not be read: damage, or what the system did not allow."""
  if isinstance(error, DamagedCheckpoint | UnreadableCheckpoint):
    return error
  if isinstance(error, UserError) and error.__cause__ is None:
    return error  # such as another architecture: it says by itself what is wrong
  system = files.said_by_the_system(error) or files.first_unreadable(folder)
  return UnreadableCheckpoint(folder, system) if system else damaged(folder, error)


def set_aside(error: DamagedCheckpoint) -> pathlib.Path:
  """Moves a damaged checkpoint to `<stage>/damaged/<step>` (or `<step>-2` ...); returns where it is now."""
  return move_aside(error.folder, error.folder.parent.parent / DAMAGED)


def move_aside(folder: pathlib.Path, to: pathlib.Path | None = None) -> pathlib.Path:
  """Moves a folder into another, beside it by default; nothing there is lost. Returns where it is now."""
  first = (to or folder.parent / EARLIER) / folder.name
  target, number = first, 1
  while target.exists():
    number += 1
    target = first.with_name(f'{first.name}-{number}')
  distributed.wait_for_all(f'about to move {folder}')
  if jax.process_index() == 0:
    target.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(target)
  distributed.wait_for_all(f'moved {folder}')
  return target


def _check_structure(folder: pathlib.Path, tree: Any, partial: bool = False) -> None:
  stored = stored_shapes(folder)
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  wanted = {sharding.path_name(path): tuple(leaf.shape) for path, leaf in leaves}
  problems = [
    f'{name}: stored {stored.get(name, "nothing")}, config needs {shape}'
    for name, shape in wanted.items()
    if stored.get(name) != shape
  ]
  if not partial:
    problems += [
      f'{name}: stored {stored[name]}, config needs nothing' for name in stored.keys() - wanted.keys()
    ]
  if problems:
    raise UserError(
      f'the checkpoint {folder} holds another architecture than the config: {problems[0]}'
      + (f' (and {len(problems) - 1} more)' if len(problems) > 1 else '')
      + '. Use the config it was trained with (--workdir alone reads it), or another --workdir'
    )
