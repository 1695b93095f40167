"""What `--mode` names: one function (config, workdir, stages) each. A new mode is a new entry here."""

import pathlib
from collections.abc import Callable

from ml_collections import ConfigDict

from vaediff import aot, benchmark, describe, log, pipeline, restore, sample, sharding
from vaediff import interpolate as interpolation
from vaediff.data import sources
from vaediff.evaluation import networks
from vaediff.evaluation.evaluate import evaluate
from vaediff.evaluation.sweep import sweep
from vaediff.trained import Trained

Mode = Callable[[ConfigDict, pathlib.Path, tuple[str, ...]], None]


def _train(config: ConfigDict, workdir: pathlib.Path, stages: tuple[str, ...]) -> None:
  pipeline.run(config, workdir, stages)


def _prepare(config: ConfigDict, workdir: pathlib.Path, stages: tuple[str, ...]) -> None:
  del workdir, stages
  sources.prepare(config.data, log.say)
  log.say(sources.describe(config.data))
  networks.prepare(config, log.say)


def _describe(config: ConfigDict, workdir: pathlib.Path, stages: tuple[str, ...]) -> None:
  del workdir
  describe.describe(config, stages)


def _compile(config: ConfigDict, workdir: pathlib.Path, stages: tuple[str, ...]) -> None:
  del workdir
  aot.compile_mode(config, stages, config.compile.topology, config.compile.effort)


def _benchmark(config: ConfigDict, workdir: pathlib.Path, stages: tuple[str, ...]) -> None:
  del workdir
  benchmark.benchmark(config, stages)


def _on_trained(function: Callable[[Trained], dict[str, float]]) -> Mode:
  """Returns the mode that opens the last of the stages and prints the function's figures."""

  def mode(config: ConfigDict, workdir: pathlib.Path, stages: tuple[str, ...]) -> None:
    figures = function(Trained(config, workdir, stages[-1], sharding.make_mesh(config.mesh)))
    for name, value in figures.items():
      log.say(f'{name} {value:.5g}')

  return mode


MODES: dict[str, Mode] = {
  'train': _train,
  'prepare': _prepare,
  'describe': _describe,
  'sample': _on_trained(sample.sample),
  'reconstruct': _on_trained(sample.reconstruct),
  'interpolate': _on_trained(interpolation.interpolate),
  'restore': _on_trained(restore.restore),
  'evaluate': _on_trained(evaluate),
  'benchmark': _benchmark,
  'compile': _compile,
}

SWEEPS: dict[str, Mode] = {'evaluate': _on_trained(sweep)}
"""What `--sweep` makes of a mode: the same over a range of settings."""
