"""One file per idea; `BY_NAME` maps `config.<stage>.experiment` to it."""

from ml_collections import ConfigDict

from vaediff.errors import UserError
from vaediff.experiments.adversarial_distillation import AdversarialDistillation
from vaediff.experiments.autoencoder import Autoencoder
from vaediff.experiments.base import Experiment
from vaediff.experiments.classifier import Classifier
from vaediff.experiments.consistency import Consistency
from vaediff.experiments.ddgan import Ddgan
from vaediff.experiments.diffusion import Diffusion
from vaediff.experiments.distribution_matching import DistributionMatching
from vaediff.experiments.light_decoder import LightDecoder
from vaediff.experiments.progressive import Progressive
from vaediff.experiments.vae import Vae

BY_NAME: dict[str, type[Experiment]] = {
  'vae': Vae,
  'diffusion': Diffusion,
  'autoencoder': Autoencoder,
  'light_decoder': LightDecoder,
  'ddgan': Ddgan,
  'progressive': Progressive,
  'consistency': Consistency,
  'adversarial_distillation': AdversarialDistillation,
  'distribution_matching': DistributionMatching,
  'classifier': Classifier,
}


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
    experiment = BY_NAME[name].from_config(config, stage)
  except UserError as error:
    raise UserError(f'config.{stage}: {error}') from error
  clash = experiment.networks.keys() & experiment.frozen.keys()
  if clash:
    raise ValueError(f'stage {stage!r} trains and reads networks of the same names: {sorted(clash)}')
  return experiment
