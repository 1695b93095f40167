"""One file per idea; `BY_NAME` maps `config.<stage>.experiment` to it."""

from ml_collections import ConfigDict

from vaediff.errors import UserError
from vaediff.experiments.base import Experiment
from vaediff.experiments.classifier import Classifier
from vaediff.experiments.guarded import Guarded
from vaediff.experiments.refiner import Refiner
from vaediff.experiments.vae import Vae

BY_NAME = {'vae': Vae, 'refiner': Refiner, 'classifier': Classifier}


def build(config: ConfigDict, stage: str) -> Experiment:
  """Returns the experiment of `config.<stage>`.

  Raises:
    UserError: for a stage without a section, an unknown experiment, or values it cannot be built from.
  """
  if stage not in config or 'experiment' not in config[stage]:
    known = [name for name in config if isinstance(config[name], ConfigDict) and 'experiment' in config[name]]
    raise UserError(f'config.stages names {stage!r}, which has no section; sections: {", ".join(known)}')
  name = config[stage].experiment
  if name not in BY_NAME:
    raise UserError(f'config.{stage}.experiment is {name!r}; valid: {", ".join(BY_NAME)}')
  try:
    return Guarded.around(BY_NAME[name].from_config(config, stage), config[stage].train)
  except UserError as error:
    raise UserError(f'config.{stage}: {error}') from error
