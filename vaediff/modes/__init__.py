"""What `--mode` names: one file per mode, each with a function `mode(run)`."""

from collections.abc import Callable

from vaediff.modes import (
  benchmark,
  compile,
  describe,
  evaluate,
  explore,
  export,
  interpolate,
  prepare,
  quantize,
  reconstruct,
  restore,
  sample,
  train,
)
from vaediff.run.config import Run

Mode = Callable[[Run], None]
MODES: dict[str, Mode] = {
  'train': train.mode,
  'prepare': prepare.mode,
  'describe': describe.mode,
  'sample': sample.mode,
  'reconstruct': reconstruct.mode,
  'interpolate': interpolate.mode,
  'restore': restore.mode,
  'evaluate': evaluate.mode,
  'benchmark': benchmark.mode,
  'compile': compile.mode,
  'quantize': quantize.mode,
  'export': export.mode,
  'explore': explore.mode,
}
SWEEPS: dict[str, Mode] = {'evaluate': evaluate.sweep_mode}
"""What `--sweep` makes of a mode: the same over a range of settings."""
WRITERS = ('sample', 'reconstruct', 'interpolate', 'restore', 'evaluate', 'export')
"""Modes that write pictures, tables or files for other programs, into the run's folder or that of `--out`."""
