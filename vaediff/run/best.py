"""The best checkpoint by a named figure, kept beside the latest in `<stage>/best/checkpoints`."""

import math
import pathlib
from collections.abc import Callable
from typing import Any

from vaediff import experiments
from vaediff.errors import UserError
from vaediff.run import checkpoint, log
from vaediff.storage import identity

FOLDER = 'best'
MADE_OF = 'made_of'
"""In its `meta`: what its value depends on beside the parameters."""
VALIDATION = 'val/'
"""What the names of an experiment's own metrics begin with."""
HIGHEST = {
  'is': True,
  'psnr': True,
  'ssim': True,
  'fid': False,
  'kid': False,
  'rfid': False,
  'rkid': False,
  'mse': False,
  'lpips_vgg16': False,
  'lpips_alexnet': False,
  'bits_per_dimension': False,
  'elbo': True,
  'active_units': True,
  'nearest_training_rmse': True,
  'rmse to teacher': False,
  'diversity ratio': True,
}
"""Whether the largest value of a figure is its best, by name."""
HIGHEST_OF = {
  'fd': False,
  'kd': False,
  'rfd': False,
  'rkd': False,
  'precision': True,
  'recall': True,
  'density': True,
  'coverage': True,
  'diversity': True,
}
"""The same of figures on a network, '<name>_<network>'."""


def higher_is_better(measure: str) -> bool:
  """Returns whether the largest value of a figure or of a validation metric is its best.

  Raises:
    UserError: for a name that is in no table: the worst would be kept as the best.
  """
  if measure.startswith(VALIDATION):
    known = {name: best for one in experiments.BY_NAME.values() for name, best in one.metrics.items()}
    name = measure.removeprefix(VALIDATION)
  else:
    name, _, network = measure.partition('_')
    known, name = (HIGHEST_OF, name) if network and name in HIGHEST_OF else (HIGHEST, measure)
  if name not in known:
    raise UserError(
      f'train.best_measure is {measure!r}, of which it is not known whether high or low is good; known: '
      f'{", ".join(sorted(known))}'
    )
  return known[name]


class Best:
  """Keeps the checkpoint with the best value so far.

  Args:
    stage_folder: `<workdir>/<stage>`.
    measure: name of the figure.
    made_of: what the values depend on beside the parameters, such as how samples are drawn for them.
    start_step: of the training: where it begins, what is there is of another one, and is moved aside.
    check_arrays: see `checkpoint.Checkpointer`.
    as_now: `meta` of the checkpoint that is there -> what it was made of, where an earlier version said it
      in another way; None = as it is stored.

  Raises:
    UserError: for an unknown figure, or when the folder holds a checkpoint kept by another figure, or one
      that was made of something else.
  """

  def __init__(
    self,
    stage_folder: pathlib.Path,
    measure: str,
    made_of: identity.MadeOf,
    start_step: int,
    check_arrays: bool = True,
    as_now: Callable[[dict[str, Any]], identity.MadeOf] | None = None,
  ):
    self.measure, self._made_of = measure, dict(made_of)
    self._sign = -1 if higher_is_better(measure) else 1
    folder = stage_folder / FOLDER
    self.value, self._step = None, -1
    if start_step == 0 and checkpoint.latest_step(folder) is not None:
      log.say(f'{folder} is of an earlier training; moved to {checkpoint.move_aside(folder)}')
    if checkpoint.latest_step(folder) is not None:
      meta = checkpoint.load_meta(folder)
      if meta.get('measure') != measure:
        raise UserError(
          f'{folder} holds the best checkpoint by {meta.get("measure")!r}, train.best_measure is '
          f'{measure!r}; move it away, or use the same measure'
        )
      if MADE_OF in meta:  # an earlier version did not store it
        mend = f'Move {folder} away, or use what it was kept with'
        stored = as_now(meta) if as_now else meta[MADE_OF]
        identity.compare(f'the best checkpoint in {folder}', stored, self._made_of, mend)
      self.value, self._step = meta.get('value'), checkpoint.latest_step(folder)
    self._checkpointer = checkpoint.Checkpointer(folder, keep=1, check_arrays=check_arrays)

  def consider(self, step: int, state: Any, meta: dict[str, Any], value: float) -> bool:
    """Saves the state if its value is better than all before; returns whether it is.

    A value that is not finite is never the best. Nor is that of a step up to the one that is kept: a resumed
    run meets those again, and on other devices their values differ by rounding.
    """
    sign = self._sign
    if step <= self._step or not math.isfinite(value):
      return False
    if self.value is not None and sign * value >= sign * self.value:
      return False
    facts = {**meta, 'measure': self.measure, 'value': value, MADE_OF: self._made_of}
    self._checkpointer.save(step, state, facts)
    self.value, self._step = value, step
    log.say(f'best {self.measure} so far: {value:.5g} at step {step}')
    return True

  def wait(self) -> None:
    """Waits for the save in progress. Raises UserError when it failed."""
    self._checkpointer.wait()

  def close(self) -> None:
    """Waits for the save in progress."""
    self._checkpointer.close()
