"""`--mode=evaluate`: the figures of a trained stage; with `--sweep` those of many sampler settings."""

from vaediff.evaluation.evaluate import evaluate
from vaediff.evaluation.sets import FOLDER
from vaediff.evaluation.sweep import sweep
from vaediff.modes import pictures
from vaediff.run.config import Run
from vaediff.run.trained import open_last


def mode(run: Run) -> None:
  """Prints the table of the last stage and writes it to `evaluation/`."""
  out = pictures.out_of(run, FOLDER)
  evaluate(open_last(run), out)


def sweep_mode(run: Run) -> None:
  """Prints one row per sampler setting and writes table and plots to `evaluation/`."""
  out = pictures.out_of(run, FOLDER)
  sweep(open_last(run), out)
