"""Weights & Biases beside TensorBoard, where `config.log.wandb.mode` asks for it. Process 0 alone.

One W&B run for each stage, since each counts its own steps; those of a run folder are one group. The id is in
the stage's folder, so that a training that goes on continues it: W&B keeps the first value of a step, and
those that are logged again, of the steps after the checkpoint, are the same. 'offline' writes below
`<stage>/wandb`, for `wandb sync`.

The package is the extra `[wandb]`, and nothing else imports it. Whatever it raises is said once, and training
goes on without it.
"""

import importlib.util
import json
import pathlib
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vaediff.errors import UserError
from vaediff.run import log
from vaediff.storage import buckets, files

MODES = ('disabled', 'offline', 'online')
FILE = 'wandb.json'
"""In the stage's folder: the id of its W&B run."""
SETTINGS = {'console': 'off', 'silent': True, 'disable_git': True, 'disable_code': True}
"""W&B neither takes over the output nor sends what was not asked for."""


def check(config: ConfigDict) -> None:
  """Raises UserError where W&B is asked for and is not installed."""
  mode = config.log.wandb.mode
  if mode != 'disabled' and importlib.util.find_spec('wandb') is None:
    raise UserError(
      f"config.log.wandb.mode is {mode!r}, which takes the package wandb: pip install -e '.[wandb]'"
    )


def writers(config: ConfigDict, stage: str, folder: pathlib.Path, start_step: int) -> tuple['Writer', ...]:
  """Returns what the log of a stage also writes to: one, or none.

  Args:
    config: of the run; all of it is handed over.
    stage: its name.
    folder: `<workdir>/<stage>`.
    start_step: steps done before; 0 begins another W&B run.
  """
  if config.log.wandb.mode == 'disabled' or jax.process_index() > 0:
    return ()
  return (Writer(config, stage, folder, start_step),)


class Writer:
  """The W&B run of one stage; see `writers`."""

  def __init__(self, config: ConfigDict, stage: str, folder: pathlib.Path, start_step: int):
    self._stage, self._run = stage, None
    self._try(lambda: self._begin(config, stage, folder, start_step))

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Logs finite numbers of a step."""
    self._log(step, lambda: dict(values))

  def picture(self, step: int, name: str, picture: np.ndarray) -> None:
    """Logs a uint8 picture [height, width, channels]."""
    self._log(step, lambda: {name: self._image(picture)})

  def close(self) -> None:
    """Waits for what is on its way, and ends the W&B run for now."""
    if self._run is not None:
      self._try(self._run.finish)
    self._run = None

  def _begin(self, config: ConfigDict, stage: str, folder: pathlib.Path, start_step: int) -> None:
    import wandb

    asked, path = config.log.wandb, folder / FILE
    known = files.read_json(path) if start_step and path.exists() else {}
    if known.get('project') != asked.project or known.get('entity') != asked.entity:
      known = {'id': secrets.token_hex(4), 'project': asked.project, 'entity': asked.entity}
      files.write_json(path, known)
    self._image = wandb.Image
    self._run = wandb.init(
      project=asked.project,
      entity=asked.entity or None,
      dir=str(buckets.Beside(folder).here),
      id=known['id'],
      resume='allow',
      name=f'{folder.parent.name}-{stage}',
      group=folder.parent.name,
      job_type=stage,
      config=json.loads(config.to_json()),
      mode=asked.mode,
      settings=SETTINGS,
    )

  def _log(self, step: int, values: Callable[[], dict[str, Any]]) -> None:
    if self._run is not None:
      self._try(lambda: self._run.log(values(), step=step))

  def _try(self, call: Callable[[], Any]) -> None:
    """Calls, and after the first error never again."""
    try:
      call()
    except Exception as error:  # a package and a network that training does not need
      self._run = None
      log.say(
        f'stage {self._stage}: Weights & Biases has failed and gets nothing more of this stage: '
        f'{type(error).__name__}: {files.reason(error)}. Training goes on; all is in metrics.jsonl too'
      )
