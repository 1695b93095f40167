"""Scalars and pictures of one stage: console, `metrics.jsonl` and TensorBoard. Process 0 only.

`metrics.jsonl` holds one object per line, `{"stage": ..., "step": ..., "<metric>": value, ...}`. A resumed
run drops the lines past its checkpoint before it writes them again, so none is repeated or lost.
"""

import contextlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tqdm

from vaediff import files
from vaediff.errors import UserError


def say(text: str) -> None:
  """Prints a line on process 0, above the progress bar if there is one."""
  if jax.process_index() == 0:
    tqdm.tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


class StageLog:
  """Writes one stage's metrics.

  Args:
    folder: `<workdir>/<stage>`.
    stage: its name.
    start_step: steps done before; later lines in the files are dropped.
    num_steps: steps in all, for the progress bar and the time left.

  Attributes:
    logged: what the files hold of the step `start_step`; on process 0.
  """

  def __init__(self, folder: pathlib.Path, stage: str, start_step: int, num_steps: int):
    self._stage, self._num_steps, self._start_step = stage, num_steps, start_step
    self._active = jax.process_index() == 0
    self._start = time.monotonic()
    self.logged: dict[str, float] = {}
    if not self._active:
      return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / 'metrics.jsonl'
    self.logged = _drop_lines_after(path, start_step)
    self._file = open(path, 'a', encoding='utf-8')
    import tensorboardX  # not above: where PyTorch is installed it imports that, which takes seconds

    self._board = tensorboardX.SummaryWriter(str(folder / 'tensorboard'), purge_step=start_step + 1)
    self._bar = tqdm.tqdm(
      total=num_steps,
      initial=start_step,
      desc=stage,
      unit='step',
      disable=not sys.stderr.isatty(),
      dynamic_ncols=True,
    )

  def progress(self, step: int) -> None:
    """Moves the progress bar."""
    if self._active:
      self._bar.update(step - self._bar.n)

  def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
    """Writes one line of metrics, already on the host."""
    if not self._active:
      return
    # a skipped update leaves values that are not finite, which JSON does not know
    values = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
    self._file.write(json.dumps({'stage': self._stage, 'step': step, **values}) + '\n')
    self._file.flush()
    for name, value in values.items():
      self._board.add_scalar(name, value, step)
    say(self._line(step, values))

  def picture(self, step: int, name: str, picture: np.ndarray) -> None:
    """Writes a uint8 picture [height, width, channels] to TensorBoard."""
    if self._active:
      self._board.add_image(name, picture, step, dataformats='HWC')

  def flush(self) -> None:
    """Makes everything written so far durable; called before a checkpoint is saved."""
    if self._active:
      self._file.flush()
      os.fsync(self._file.fileno())
      self._board.flush()

  def close(self) -> None:
    """Closes files and bar."""
    if self._active:
      self._bar.close()
      self._file.close()
      self._board.close()

  def _line(self, step: int, values: Mapping[str, float]) -> str:
    seconds = time.monotonic() - self._start
    left = seconds / max(step - self._start_step, 1) * (self._num_steps - step)
    shown = '  '.join(f'{name} {value:.5g}' for name, value in values.items())
    return f'{self._stage} {step}/{self._num_steps}  {shown}  ETA {duration(left)}'


class Clock:
  """Where the time of the loop goes: waiting for input and checkpoints, and everything else."""

  def __init__(self):
    self._start = time.monotonic()
    self._paused, self._waiting = 0.0, {'input': 0.0, 'checkpoint': 0.0}

  @contextlib.contextmanager
  def waiting(self, name: str) -> Iterator[None]:
    """Counts the time inside as waiting for 'input' or 'checkpoint'."""
    started = time.monotonic()
    yield
    self._waiting[name] += time.monotonic() - started

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves the time inside out: evaluation is not training."""
    started = time.monotonic()
    yield
    self._paused += time.monotonic() - started

  def lap(self) -> dict[str, Any]:
    """Returns 'seconds' since the last lap, and 'waiting', the share of them by name; starts anew."""
    seconds = max(time.monotonic() - self._start - self._paused, 1e-9)
    shares = {name: value / seconds for name, value in self._waiting.items()}
    self.__init__()
    return {'seconds': seconds, 'waiting': shares}


class Profile:
  """Traces some steps for TensorBoard's profile plugin, into `<stage>/tensorboard`.

  Args:
    folder: `<workdir>/<stage>`.
    steps: () = none, or the first and the last step.

  Raises:
    UserError: when `steps` is no such pair.
  """

  def __init__(self, folder: pathlib.Path, steps: tuple[int, ...]):
    if steps and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
      raise UserError(f'train.profile_steps must be () or (first, last) with 1 <= first <= last, got {steps}')
    self._folder, self._steps, self._running = folder / 'tensorboard', steps, False

  def before(self, step: int) -> None:
    """Starts the trace before its first step."""
    if self._steps and step == self._steps[0]:
      jax.profiler.start_trace(str(self._folder))
      self._running = True

  def after(self, step: int, result: Any) -> None:
    """Ends the trace once the result of its last step is there."""
    if self._running and step == self._steps[1]:
      jax.block_until_ready(result)
      self.close()

  def close(self) -> None:
    """Writes the trace if it is still running."""
    if self._running:
      self._running = False
      jax.profiler.stop_trace()
      say(f'wrote a trace of steps {self._steps[0]} to {self._steps[1]} to {self._folder}')


def duration(seconds: float) -> str:
  """Returns h:mm:ss."""
  minutes, seconds = divmod(int(round(seconds)), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02d}:{seconds:02d}'


def _drop_lines_after(path: pathlib.Path, step: int) -> dict[str, float]:
  """Drops the lines past a step, and what is no line; returns what the lines of that step hold."""
  if not path.exists():
    return {}
  kept, logged = [], {}
  for line in path.read_text(encoding='utf-8').splitlines(keepends=True):
    try:
      values = json.loads(line)
      keep = line.endswith('\n') and values['step'] <= step
    except ValueError:
      keep = False  # cut off in the middle by a kill
    if keep:
      kept.append(line)
      if values['step'] == step:
        logged.update({name: value for name, value in values.items() if name not in ('stage', 'step')})
  files.write_text(path, ''.join(kept))
  return logged
