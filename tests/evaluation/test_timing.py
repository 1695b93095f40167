"""What is timed of what is made in batches, and how often it is made."""

import time

import numpy as np
import pytest

from vaediff.evaluation import timing


def run(count, size, compiled):
  """Returns the batches that were made, and of each what was yielded."""
  made = []

  def make(indices):
    made.append(indices.tolist())
    time.sleep(0.01)
    return {'x0': indices}

  found = list(timing.timed_batches(count, size, make, compiled=compiled))
  assert [arrays['x0'].tolist() for arrays, _, _ in found] == made[-len(found) :]
  return made, [num_real for _, num_real, _ in found], [seconds for _, _, seconds in found]


def test_the_first_of_several_batches_is_not_timed_where_it_is_compiled():
  made, real, seconds = run(7, 3, compiled=False)
  assert made == [[0, 1, 2], [3, 4, 5], [6, 6, 6]] and real == [3, 3, 1]
  assert seconds[0] is None and min(seconds[1:]) >= 0.01 / 3
  made, _, seconds = run(7, 3, compiled=True)
  assert len(made) == 3 and min(seconds) >= 0.01 / 3


def test_a_single_batch_is_made_twice_unless_it_is_compiled():
  for compiled, times in ((False, 2), (True, 1)):
    made, real, seconds = run(3, 3, compiled)
    assert made == [[0, 1, 2]] * times and real == [3] and seconds[0] >= 0.01 / 3


def test_seconds_per_image_are_a_median_over_seeds():
  assert timing.median_seconds_per_image([0.5]) == 0.5
  assert timing.median_seconds_per_image([9.0, 0.25, 0.5]) == 0.5
  assert timing.median_seconds_per_image([0.5, 9.0, 0.25, 1.0]) == pytest.approx(0.75)
  assert isinstance(timing.median_seconds_per_image(np.array([1.0]).tolist()), float)
