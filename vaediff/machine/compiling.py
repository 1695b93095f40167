"""How much of the time goes into compiling, which is what whoever starts a run waits for.

When JAX has traced, lowered or compiled a program, or read it from the compilation cache, it reports how long
that took. Reports overlap: a program that is traced within another has one of its own, and threads compile
side by side. So the intervals are kept, and their union is what was spent.
"""

import threading
import time

from jax import monitoring

EVENTS = (
  '/jax/core/compile/jaxpr_trace_duration',
  '/jax/core/compile/jaxpr_to_mlir_module_duration',
  '/jax/core/compile/backend_compile_duration',  # reading from the cache is within it
)


class Clock:
  """Counts the seconds in which something was traced, lowered or compiled, in this process, while open."""

  def __init__(self):
    self._lock = threading.Lock()
    self._opened = time.monotonic()
    self._spent: list[tuple[float, float]] = []  # disjoint, in order
    monitoring.register_event_duration_secs_listener(self._hear)

  def __enter__(self) -> 'Clock':
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    """Stops counting; `seconds` stays."""
    monitoring.unregister_event_duration_listener(self._hear)

  @property
  def seconds(self) -> float:
    """Seconds so far, at most those since it was opened."""
    with self._lock:
      return sum((end - start for start, end in self._spent), 0.0)

  def _hear(self, event: str, duration: float | int, **_) -> None:
    if event not in EVENTS:
      return
    with self._lock:
      end = time.monotonic()
      start = max(end - duration, self._opened)
      while self._spent and self._spent[-1][1] >= start:  # what lies within, or overlaps, becomes part of it
        start = min(start, self._spent.pop()[0])
      self._spent.append((start, end))
