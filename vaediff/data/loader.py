"""Batches: seeded, resumable at any position, and the same for every number of processes.

The order of examples is an order of indices: grain shuffles 0 .. N - 1 anew in every epoch, in
constant memory, and batches the endless sequence globally; each process reads only its rows of
every batch. So the position is one integer, the number of batches taken, and it survives a change
of process count.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np

from vaediff.data.sources import Source
from vaediff.errors import UserError

HostBatch = dict[str, np.ndarray]
"""'image' (uint8), 'label' (int32), 'index' (int32, which example it is), and the extra arrays."""


class TrainBatches:
  """An endless iterator of batches that knows its position."""

  def __init__(self, batches: grain.DatasetIterator, position: int):
    self._batches = batches
    self.position = position
    """How many batches were taken since step 0; pass it as `start_step` to go on from here."""

  def __iter__(self) -> 'TrainBatches':
    return self

  def __next__(self) -> HostBatch:
    batch = next(self._batches)
    self.position += 1
    return batch


def train_batches(
  source: Source,
  *,
  batch_size: int,
  seed: int,
  start_step: int,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int,
  prefetch: int,
  extra: Mapping[str, np.ndarray] | None = None,
) -> TrainBatches:
  """Returns endless batches of this process, `batch_size` / `process_count` examples each.

  Every epoch holds each example once; batches run across its end, so all have full size.

  Args:
    source: what to read.
    batch_size: of all processes together.
    seed: of the order.
    start_step: how many batches to leave out, in constant time.
    process_index: which rows of every batch to read.
    process_count: how many processes share a batch.
    num_threads: that read ahead; 0 reads when asked, which suits arrays in memory.
    prefetch: how many batches are read ahead by the threads.
    extra: arrays with one row per example of `source`, to be gathered with the images.

  Raises:
    UserError: `batch_size` does not divide among the processes.
  """
  read = _reading(source, batch_size, process_index, process_count, extra)
  order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat().batch(batch_size)
  options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
  batches = iter(order.map(read).to_iter_dataset(options))
  batches.set_state({'next_index': start_step})
  return TrainBatches(batches, start_step)


def eval_batches(
  source: Source,
  *,
  batch_size: int,
  limit: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int = 0,
  prefetch: int = 0,
  extra: Mapping[str, np.ndarray] | None = None,
) -> Iterator[HostBatch]:
  """Returns one ordered pass over the first `limit` examples (0 = all), all batches of full size.

  The last batch is filled up by repeating the last example. Every batch has 'mask', float32: 1 for
  an example, 0 for a repetition; weight means by it. Other arguments: see `train_batches`.

  Raises:
    UserError: `batch_size` does not divide among the processes.
  """
  read = _reading(source, batch_size, process_index, process_count, extra)
  count = min(limit, len(source)) if limit else len(source)

  def batch_at(start: int) -> HostBatch:
    positions = np.arange(start, start + batch_size)
    batch = read(np.minimum(positions, count - 1))
    mask = (positions < count).astype(np.float32)
    return batch | {'mask': mask[_rows(batch_size, process_index, process_count)]}

  options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
  starts = grain.MapDataset.range(0, count, batch_size)
  return iter(starts.map(batch_at).to_iter_dataset(options))


def _rows(batch_size: int, process_index: int, process_count: int) -> slice:
  per_process = batch_size // process_count
  return slice(process_index * per_process, (process_index + 1) * per_process)


def _reading(
  source: Source,
  batch_size: int,
  process_index: int,
  process_count: int,
  extra: Mapping[str, np.ndarray] | None,
) -> Any:
  """Returns a function from the indices of a global batch to this process' rows of it."""
  if batch_size < 1 or batch_size % process_count:
    raise UserError(
      f'batch_size={batch_size} must be a positive multiple of the number of processes, {process_count}'
    )
  extra = dict(extra or {})
  for name, values in extra.items():
    if name in ('image', 'label', 'index', 'mask') or len(values) != len(source):
      raise ValueError(
        f'extra[{name!r}] has {len(values)} rows for {len(source)} examples, or a reserved name'
      )
  rows = _rows(batch_size, process_index, process_count)

  def read(indices: np.ndarray) -> HostBatch:
    mine = np.asarray(indices)[rows]
    gathered = {name: np.asarray(values[mine]) for name, values in extra.items()}
    return source.read(mine) | {'index': mine.astype(np.int32)} | gathered

  return read
