"""What `--mode` names: one file per mode, each with a function `mode(run)`."""

from collections.abc import Callable

from vaediff.modes import (
  adopt,
  benchmark,
  compile,
  describe,
  edit,
  evaluate,
  explore,
  export,
  interpolate,
  prepare,
  quantize,
  reconstruct,
  restore,
  sample,
  text_diff,
  train,
  vary,
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
  'vary': vary.mode,
  'text_diff': text_diff.mode,
  'evaluate': evaluate.mode,
  'benchmark': benchmark.mode,
  'compile': compile.mode,
  'quantize': quantize.mode,
  'export': export.mode,
  'edit': edit.mode,
  'import': adopt.mode,
  'explore': explore.mode,
}
SWEEPS: dict[str, Mode] = {'evaluate': evaluate.sweep_mode}
"""What `--sweep` makes of a mode: the same over a range of settings."""
WRITERS = (
  'sample',
  'reconstruct',
  'interpolate',
  'restore',
  'vary',
  'text_diff',
  'evaluate',
  'export',
  'edit',
)
"""Modes that write pictures, tables or files for other programs, into the run's folder or that of `--out`."""
