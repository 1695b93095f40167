"""The kinds of updates of a stage, each of which is a program of its own."""

import collections

from vaediff.experiments.base import Experiment


def kinds_of(experiment: Experiment, num_steps: int) -> dict[str, float]:
  """Returns the kinds of updates in the second half of training, most frequent first, and their shares.

  What is done in the first half alone is a part of what comes after it: an autoencoder's updates before its
  discriminator's.
  """
  steps = range(num_steps // 2, num_steps)
  counts = collections.Counter(map(experiment.kind_of, steps))
  return {kind: count / len(steps) for kind, count in counts.most_common()}
