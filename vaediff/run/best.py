"""The best checkpoint by a named figure, kept beside the latest in `<stage>/best/checkpoints`."""

import math
import pathlib
from typing import Any

from vaediff.errors import UserError
from vaediff.run import checkpoint, log

FOLDER = 'best'
HIGHER_IS_BETTER = ('precision', 'recall', 'density', 'coverage', 'is', 'psnr', 'ssim', 'val/accuracy')
"""Names, or what comes before '_<network>' in them; of everything else the lowest is the best."""


def higher_is_better(measure: str) -> bool:
  """Returns whether the largest value of a figure is its best."""
  return measure in HIGHER_IS_BETTER or measure.split('_')[0] in HIGHER_IS_BETTER


class Best:
  """Keeps the checkpoint with the best value so far.

  Args:
    stage_folder: `<workdir>/<stage>`.
    measure: name of the figure.

  Raises:
    UserError: when the folder holds a checkpoint kept by another figure.
  """

  def __init__(self, stage_folder: pathlib.Path, measure: str):
    self.measure = measure
    folder = stage_folder / FOLDER
    self.value = None
    self._checkpointer = checkpoint.Checkpointer(folder, keep=1)
    if self._checkpointer.latest_step() is not None:
      meta = checkpoint.load_meta(folder)
      if meta['measure'] != measure:
        raise UserError(
          f'{folder} holds the best checkpoint by {meta["measure"]!r}, train.best_measure is {measure!r}; '
          'move it away, or use the same measure'
        )
      self.value = meta['value']

  def consider(self, step: int, state: Any, meta: dict[str, Any], value: float) -> bool:
    """Saves the state if its value is better than all before; returns whether it is.

    A value that is not finite is never the best. A resumed run meets the same values again, and they are
    no better than themselves.
    """
    sign = -1 if higher_is_better(self.measure) else 1
    if not math.isfinite(value) or (self.value is not None and sign * value >= sign * self.value):
      return False
    self.value = value
    self._checkpointer.save(step, state, {**meta, 'measure': self.measure, 'value': value})
    log.say(f'best {self.measure} so far: {value:.5g} at step {step}')
    return True

  def close(self) -> None:
    """Waits for the save in progress."""
    self._checkpointer.close()
