"""Scalars and pictures of one stage: console, `metrics.jsonl`, TensorBoard and others. Process 0 only.

`metrics.jsonl` holds one object per line, `{"stage": ..., "step": ..., "<metric>": value, ...}`. A resumed
run drops the lines that it writes again, so none is repeated or lost: those past its checkpoint, and those of
the evaluation at that step, which comes after the save. A line that is no such object stays as it is.

In a bucket, to which nothing can be appended, both are written in a folder of this machine and copied whole:
at least before every checkpoint is saved, so that no line of a step that a run goes on from is missing.
"""

import contextlib
import io
import json
import math
import os
import pathlib
import queue
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from vaediff.errors import UserError
from vaediff.storage import buckets, files

PUSH_SECONDS = 60.0
"""At most so long what was logged is on this machine alone, where the run lies in a bucket and logs on."""


def say(text: str) -> None:
  """Prints a line on process 0, above the progress bar if there is one."""
  if jax.process_index() == 0:
    tqdm.tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
  """Turns an OSError inside into the message that names the file.

  Raises:
    UserError: names the file and the system's reason, such as a full disk.
  """
  try:
    yield
  except OSError as error:
    raise UserError(f'{path} cannot be written: {files.reason(error)}') from error


class StageLog:
  """Writes one stage's metrics.

  Args:
    folder: `<workdir>/<stage>`.
    stage: its name.
    start_step: steps done before; later lines in the file are dropped.
    num_steps: steps in all, for the progress bar and the time left.
    also: what scalars and pictures are handed to as well, such as `wandb_log.Writer`; raises nothing.

  Attributes:
    logged: what the file holds of the step `start_step`; on process 0.

  Raises:
    UserError: when a file cannot be read or written, here or later: names it and the reason.
  """

  def __init__(
    self, folder: pathlib.Path, stage: str, start_step: int, num_steps: int, also: Sequence[Any] = ()
  ):
    self._also = also
    self._stage, self._num_steps, self._start_step = stage, num_steps, start_step
    self._active = jax.process_index() == 0
    self._start = time.monotonic()
    self.logged: dict[str, float] = {}
    if not self._active:
      return
    self._path, self._events = folder / 'metrics.jsonl', folder / 'tensorboard'
    self._beside, self._pushed = buckets.Beside(folder), time.monotonic()
    here = self._beside.here
    with writing(folder):
      folder.mkdir(parents=True, exist_ok=True)
    self.logged = _drop_lines_after(self._path, start_step)
    with writing(self._path):
      self._beside.pull(self._path.name)
      self._file = open(here / self._path.name, 'a', encoding='utf-8')
    import tensorboardX  # not above: where PyTorch is installed it imports that, which takes seconds

    with writing(self._events):
      self._board = tensorboardX.SummaryWriter(str(here / self._events.name), purge_step=start_step + 1)
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
    with writing(self._path):
      self._file.write(json.dumps({'stage': self._stage, 'step': step, **values}) + '\n')
      self._file.flush()
    self._check_board()
    for name, value in values.items():
      self._board.add_scalar(name, value, step)
    for writer in self._also:
      writer.scalars(step, values)
    say(self._line(step, values))
    if time.monotonic() - self._pushed > PUSH_SECONDS:
      try:
        self._push()
      except UserError as error:  # before a checkpoint it must
        say(str(error))

  def picture(self, step: int, name: str, picture: np.ndarray) -> None:
    """Writes a uint8 picture [height, width, channels] to TensorBoard."""
    if self._active:
      self._check_board()
      self._board.add_image(name, picture, step, dataformats='HWC')
      for writer in self._also:
        writer.picture(step, name, picture)

  def flush(self) -> None:
    """Makes everything written so far durable; called before a checkpoint is saved."""
    if self._active:
      with writing(self._path):
        self._file.flush()
        os.fsync(self._file.fileno())
      self._check_board()
      with writing(self._events):
        self._board.flush()
      self._push()

  def _push(self) -> None:
    """Copies what is written to where the run lies."""
    self._pushed = time.monotonic()
    with writing(self._path.parent):
      self._beside.push()

  def close(self) -> None:
    """Closes files and bar. Raises nothing of a disk: every line of metrics is in its file already.

    Nor of a bucket: a run that goes on writes again what followed its checkpoint.
    """
    if not self._active:
      return
    self._bar.close()
    self._close_files()
    for writer in self._also:
      writer.close()
    try:
      self._push()
    except UserError as error:
      say(f'{error}; what was logged since the last checkpoint is missing there')

  def _close_files(self) -> None:
    with contextlib.suppress(OSError):  # of a line that could not be written, which was said
      self._file.close()
    events = self._board.file_writer.event_writer
    try:
      if events._worker.is_alive():
        self._board.close()
        return
      why = 'see the error above'
    except OSError as error:
      why = files.reason(error)
    with contextlib.suppress(queue.Full):
      events._event_queue.put(object(), timeout=1)  # ends its thread, if that still runs
    events._event_queue.cancel_join_thread()  # else what is in it would be waited for at exit
    events._closed = True
    say(f'{self._events} is not complete: {why}')

  def _check_board(self) -> None:
    """Raises UserError where tensorboardX's thread has met an error: it would be waited for without end."""
    if not self._board.file_writer.event_writer._worker.is_alive():
      raise UserError(f'{self._events} could not be written: see the error above. Is the disk full?')

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
    self._beside = buckets.Beside(folder / 'tensorboard')
    self._folder, self._steps, self._running = folder / 'tensorboard', steps, False

  def before(self, step: int) -> None:
    """Starts the trace before its first step."""
    if self._steps and step == self._steps[0]:
      jax.profiler.start_trace(str(self._beside.here))
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
      with writing(self._folder):
        self._beside.push()
      say(f'wrote a trace of steps {self._steps[0]} to {self._steps[1]} to {self._folder}')


def duration(seconds: float) -> str:
  """Returns a time as h:mm:ss."""
  minutes, seconds = divmod(int(round(seconds)), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02d}:{seconds:02d}'


def _drop_lines_after(path: pathlib.Path, step: int) -> dict[str, Any]:
  """Drops what a run that goes on after a step writes again, and a line that was cut off by a kill.

  Returns what the lines of that step itself hold.
  """
  with files.reading(path):
    if not path.exists():
      return {}
    if not path.is_file():
      raise UserError(f'{path} is no file; move it away')
    content = path.read_bytes()
  kept, logged, foreign = [], {}, 0
  for line in io.BytesIO(content):
    entry = _entry(line)
    if entry is None and line.endswith(b'\n'):
      foreign += 1  # not ours to remove
    elif entry is None or entry['step'] > step:
      continue
    elif entry['step'] == step:
      logged.update({name: value for name, value in entry.items() if name not in ('stage', 'step')})
    kept.append(line if line.endswith(b'\n') else line + b'\n')
  if foreign:
    say(f'{path}: {foreign} lines are no metrics of a step; they stay as they are')
  changed = b''.join(kept)
  if changed != content:
    with files.replacing(path) as temporary:
      temporary.write_bytes(changed)
  return logged


def _entry(line: bytes) -> dict[str, Any] | None:
  """Returns the object of a line, None where it is no object with a step."""
  try:
    entry = json.loads(line)
  except (ValueError, RecursionError):
    return None
  return entry if isinstance(entry, dict) and type(entry.get('step')) is int else None
