"""`--mode=evaluate`: the figures of a trained stage; with `--sweep` those of many sampler settings."""

from vaediff.evaluation.evaluate import evaluate
from vaediff.evaluation.sweep import sweep
from vaediff.run.config import Run
from vaediff.run.trained import open_last


def mode(run: Run) -> None:
  """Prints the table of the last stage and writes it to `evaluation/`."""
  evaluate(open_last(run))


def sweep_mode(run: Run) -> None:
  """Prints one row per sampler setting and writes table and plots to `evaluation/`."""
  sweep(open_last(run))
