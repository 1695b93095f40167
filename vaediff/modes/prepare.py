"""`--mode=prepare`: fetches and converts data and weights once, for machines without a network too."""

from vaediff.data import sources
from vaediff.evaluation import measures, networks
from vaediff.run import log
from vaediff.run.config import Run


def mode(run: Run) -> None:
  """Prepares the data set, then the weights that `config.evaluate` and `train.best_measure` name.

  Raises:
    UserError: when something cannot be fetched; the message says what to put where.
  """
  sources.prepare(run.config.data, log.say)
  log.say(sources.describe(run.config.data))
  networks.prepare(run.config, log.say, measures.weights_of_best(run.config, run.config.stages))
