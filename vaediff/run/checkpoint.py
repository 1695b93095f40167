"""Orbax checkpoints: save, restore, and load the networks of finished stages. Nothing else touches Orbax.

A checkpoint of step N is the folder `<stage>/checkpoints/N` with two items: `state` (parameters, optimizer
state, averages, step) and `meta` (JSON: stage, config, data position, seconds trained). Saving is
asynchronous; an unfinished save leaves a temporary folder that the next run removes, never a step.
"""

import copy
import json
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from vaediff.errors import UserError
from vaediff.machine import distributed, sharding
from vaediff.models.functional import Model
from vaediff.types import Params

FOLDER = 'checkpoints'
DAMAGED = 'damaged'


class DamagedCheckpoint(UserError):
  """A checkpoint whose files are missing or cannot be read.

  Attributes:
    folder: of the checkpoint.
  """

  def __init__(self, folder: pathlib.Path, message: str):
    super().__init__(message)
    self.folder = folder


class Checkpointer:
  """The checkpoints of one stage.

  Args:
    stage_folder: `<workdir>/<stage>`.
    keep: how many of the latest checkpoints to keep.
  """

  def __init__(self, stage_folder: pathlib.Path, keep: int):
    self.folder = (stage_folder / FOLDER).absolute()
    self._manager = ocp.CheckpointManager(
      self.folder,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
      ),
    )

  def latest_step(self) -> int | None:
    """Returns the step of the newest complete checkpoint, or None."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
    """Starts saving; returns once the arrays are copied off the devices.

    Raises:
      UserError: when this or the previous save failed; the last good checkpoint stays.
    """
    try:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(copy.deepcopy(meta))
        ),
      )
    except Exception as error:  # Orbax wraps whatever the storage raised
      raise self._failed(error) from error

  def wait(self) -> None:
    """Waits for the save in progress. Raises UserError when it failed."""
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise self._failed(error) from error

  def restore(self, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
    """Returns state and meta of the latest checkpoint, with the shardings of `abstract_state`."""
    step = self.latest_step()
    folder = self.folder / str(step)
    failure, restored = None, None
    try:
      _check_structure(folder, abstract_state)
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), meta=ocp.args.JsonRestore()),
      )
    except Exception as error:
      if isinstance(error, UserError) and not isinstance(error, DamagedCheckpoint):
        raise
      failure = error
    if not distributed.agree(failure is None):  # another process may have met the broken file
      raise damaged(folder, failure or OSError('another process could not read its part')) from failure
    return restored.state, restored.meta

  def close(self) -> None:
    """Waits for the save in progress and frees the manager's threads."""
    self.wait()
    self._manager.close()

  def _failed(self, error: Exception) -> UserError:
    steps = finished_steps(self.folder)
    last = f'the last good checkpoint is step {steps[-1]}' if steps else 'there is no earlier checkpoint'
    return UserError(
      f'could not save a checkpoint in {self.folder}: {_first_line(error)}. {last.capitalize()}. Make room '
      'or mend the folder, then run the same command again: it resumes from there'
    )


def finished_steps(folder: pathlib.Path) -> list[int]:
  """Returns the steps of the complete checkpoints in a `checkpoints` folder, ascending."""
  if not folder.is_dir():
    return []
  return sorted(int(child.name) for child in folder.iterdir() if child.name.isdigit())


def latest_step(stage_folder: pathlib.Path) -> int | None:
  """Returns the newest complete step of a stage without opening it, or None."""
  steps = finished_steps(stage_folder / FOLDER)
  return steps[-1] if steps else None


def abstract_params(model: Model, mesh: Mesh) -> Params:
  """Returns shapes, types and (replicated) shardings of a network's parameters."""
  return sharding.abstract_replicated(jax.eval_shape(model.init, jax.random.key(0)), mesh)


def load_frozen(stage_folder: pathlib.Path, network: str, abstract_params: Params) -> Params:
  """Returns a network's averaged parameters (or its parameters, where no average is kept).

  Args:
    stage_folder: `<workdir>/<stage>` of the stage that trained it.
    network: its name in that stage's state.
    abstract_params: shapes, types and shardings of the parameters.

  Raises:
    UserError: when there is no checkpoint, it is damaged, or it holds another architecture.
  """
  step = latest_step(stage_folder)
  if step is None:
    raise UserError(f'no checkpoint in {stage_folder / FOLDER}: train that stage first (--mode=train)')
  folder = (stage_folder / FOLDER / str(step)).absolute()
  stored = stored_shapes(folder)
  averaged = any(path.startswith(f'networks/{network}/ema_params/') for path in stored)
  name = 'ema_params' if averaged else 'params'
  tree = {'networks': {network: {name: abstract_params}}}
  _check_structure(folder, tree, partial=True)
  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      restored = checkpointer.restore(
        folder / 'state',
        args=ocp.args.PyTreeRestore(
          tree,
          restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
          partial_restore=True,
        ),
      )
  except Exception as error:
    raise damaged(folder, error) from error
  return restored['networks'][network][name]


def load_meta(stage_folder: pathlib.Path) -> dict[str, Any]:
  """Returns the JSON item of the latest checkpoint: stage, config, data position, seconds."""
  folder = stage_folder / FOLDER / str(latest_step(stage_folder))
  try:
    return json.loads((folder / 'meta' / 'metadata').read_text())
  except (OSError, ValueError) as error:
    raise damaged(folder, error) from error


def stored_shapes(folder: pathlib.Path) -> dict[str, tuple[int, ...]]:
  """Returns the shape of every stored array by its slash-joined path."""
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      metadata = checkpointer.metadata(folder / 'state')
    tree = metadata.item_metadata.tree
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, 'shape'))
    return {sharding.path_name(path): tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, 'shape')}
  except Exception as error:
    raise damaged(folder, error) from error


def damaged(folder: pathlib.Path, error: Exception) -> DamagedCheckpoint:
  """Returns the error for a checkpoint that cannot be read."""
  return DamagedCheckpoint(
    folder,
    f'the checkpoint {folder} cannot be read: {_first_line(error)}. Files of it are missing or damaged. '
    'Training sets it aside and goes on from the previous one; to do so by hand, move that folder away',
  )


def set_aside(error: DamagedCheckpoint) -> pathlib.Path:
  """Moves a damaged checkpoint to `<stage>/damaged/<step>` (or `<step>-2` ...); returns where it is now."""
  stage_folder, step = error.folder.parent.parent, error.folder.name
  target, number = stage_folder / DAMAGED / step, 1
  while target.exists():
    number += 1
    target = stage_folder / DAMAGED / f'{step}-{number}'
  distributed.wait_for_all(f'about to set aside {error.folder}')
  if jax.process_index() == 0:
    target.parent.mkdir(parents=True, exist_ok=True)
    error.folder.rename(target)
  distributed.wait_for_all(f'set aside {error.folder}')
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


def _first_line(error: Exception) -> str:
  text = str(error).strip() or type(error).__name__
  return text.splitlines()[0][:300].rstrip('.')
