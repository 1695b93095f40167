"""The seconds spent compiling: each counted once, whatever the reports overlap."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.machine import compiling

TRACED, COMPILED = compiling.EVENTS[0], compiling.EVENTS[2]


@pytest.fixture
def clock(monkeypatch):
  """Returns at(now, event, duration): a report at that time, on a clock that was opened at 100."""
  now = [100.0]
  monkeypatch.setattr(compiling.time, 'monotonic', lambda: now[0])
  with compiling.Clock() as clock:

    def at(seconds, event, duration):
      now[0] = float(seconds)
      jax.monitoring.record_event_duration_secs(event, duration)
      return clock.seconds

    yield at


def test_what_lies_within_another_is_counted_once(clock):
  assert clock(103, TRACED, 1) == 1  # 102 to 103
  assert clock(105, TRACED, 1) == 2  # 104 to 105
  assert clock(106, TRACED, 5) == 5  # 101 to 106: the two are of it
  assert clock(107.5, COMPILED, 1) == 6  # 106.5 to 107.5: after it


def test_threads_that_compile_at_once_are_counted_once(clock):
  clock(104, COMPILED, 2)  # 102 to 104
  assert clock(105, COMPILED, 2) == 3  # 103 to 105, beside it


def test_what_began_before_counts_from_the_opening_on_and_other_reports_do_not(clock):
  assert clock(101, COMPILED, 7) == 1
  assert clock(109, '/jax/checkpoint/write', 5) == 1


def test_a_program_takes_its_time_to_compile_and_none_to_run_again():
  started = time.monotonic()
  with compiling.Clock() as clock:
    run = jax.jit(lambda x: jnp.sin(x) @ x + 17.25)
    run(np.eye(3, dtype=np.float32))
    first = clock.seconds
    assert 0 < first <= time.monotonic() - started
    run(np.eye(3, dtype=np.float32))
    assert clock.seconds == first
  jax.jit(lambda x: x * 3.5)(np.ones(2, np.float32))  # no longer open
  assert clock.seconds == first
