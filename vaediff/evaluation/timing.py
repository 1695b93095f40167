"""Seconds per image of what is made in batches, without those in which programs are compiled."""

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from vaediff.run import draw


def timed_batches(
  count: int, size: int, make: Callable[[np.ndarray], draw.HostArrays], *, compiled: bool
) -> Iterator[tuple[draw.HostArrays, int, float | None]]:
  """Yields what is made of each batch of `draw.padded_batches`, and the seconds that it takes.

  Args:
    count: of images.
    size: of a batch.
    make: makes arrays of the indices of a batch.
    compiled: whether `make` was called before with a batch of this size. Else the first of several batches is
      not timed, and a single one is made twice.

  Yields:
    Arrays by name with `size` rows each, the number of rows that count, and the seconds per image, padding
    counted; None for a batch that is not timed.
  """
  alone = count <= size
  if alone and not compiled:
    make(next(draw.batches(count, size)))
  for number, (indices, num_real) in enumerate(draw.padded_batches(count, size)):
    started = time.monotonic()
    made = make(indices)
    seconds = (time.monotonic() - started) / size
    yield made, num_real, seconds if number or alone or compiled else None


def median_seconds_per_image(seconds: Sequence[float]) -> float:
  """Returns the median over seeds of the seconds per image, of an even number the mean of the middle two."""
  return float(np.median(seconds))
