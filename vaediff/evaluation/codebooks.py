"""Figures of codebooks: what of them the images of the evaluation split take."""

import jax
import numpy as np

from vaediff.evaluation.measures import Figure
from vaediff.machine import sharding
from vaediff.run import draw, usage
from vaediff.run.trained import Trained


def figures(trained: Trained) -> dict[str, Figure]:
  """Returns `vaediff.run.usage` of every codebook of the stage; {} without any.

  Over the evaluation split, of which at most `evaluate.num_reconstructions` images are read.
  """
  counts, number = counted(trained)
  return {name: Figure(value=value, n=number) for name, value in usage.figures(counts).items()}


def counted(trained: Trained) -> tuple[dict[str, np.ndarray], int]:
  """Returns how often each code occurs, float64 by codebook, and in how many images."""
  source, settings = trained.eval_source, trained.config.evaluate
  number = min(settings.num_reconstructions, len(source))
  size = sharding.round_up(min(settings.batch_size, number), trained.mesh)
  where = sharding.batch_sharding(trained.mesh)
  count = jax.jit(trained.experiment.counts, out_shardings=sharding.replicated(trained.mesh))
  totals = {}
  for indices, num_real in draw.padded_batches(number, size):
    batch = source.read(indices)
    mask = np.arange(size) < num_real
    batch = jax.device_put({**batch, 'mask': mask.astype(np.float32)}, where)
    found = jax.device_get(count(trained.read, batch))
    if not found:
      return {}, 0
    for name, value in found.items():
      totals[name] = totals.get(name, 0.0) + np.asarray(value, np.float64)
  return totals, number
