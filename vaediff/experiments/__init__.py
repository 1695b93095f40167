"""One file per idea; `BY_NAME` maps `config.<stage>.experiment` to it."""

from ml_collections import ConfigDict

from vaediff.errors import UserError
from vaediff.experiments import bounds, quantized
from vaediff.experiments.adversarial_distillation import AdversarialDistillation
from vaediff.experiments.autoencoder import Autoencoder
from vaediff.experiments.base import Experiment
from vaediff.experiments.classifier import Classifier
from vaediff.experiments.clip import Clip
from vaediff.experiments.consistency import Consistency
from vaediff.experiments.controlnet import EXPERIMENT as CONTROLNET
from vaediff.experiments.controlnet import ControlNet
from vaediff.experiments.ddgan import Ddgan
from vaediff.experiments.diffusion import Diffusion
from vaediff.experiments.distribution_matching import DistributionMatching
from vaediff.experiments.edit import EDIT_EMBEDDING, EDIT_FINETUNE, EditEmbedding, EditFinetune
from vaediff.experiments.embedding_prior import EmbeddingPrior
from vaediff.experiments.hierarchy import Hierarchy
from vaediff.experiments.light_decoder import LightDecoder
from vaediff.experiments.noisy_classifier import NoisyClassifier
from vaediff.experiments.progressive import Progressive
from vaediff.experiments.token_prior import TokenPrior
from vaediff.experiments.vae import Vae

SHARED = ('train.', 'sample.', 'conditions.', 'text.', f'{quantized.SECTION}.')
"""Parts of a section whose fields are not those of its experiment."""
BY_NAME: dict[str, type[Experiment] | type[quantized.FromConfig]] = {
  'vae': Vae,
  'diffusion': Diffusion,
  'autoencoder': Autoencoder,
  'hierarchy': Hierarchy,
  'light_decoder': LightDecoder,
  'ddgan': Ddgan,
  'progressive': Progressive,
  'consistency': Consistency,
  'adversarial_distillation': AdversarialDistillation,
  'distribution_matching': DistributionMatching,
  'classifier': Classifier,
  'noisy_classifier': NoisyClassifier,
  'token_prior': TokenPrior,
  'clip': Clip,
  EDIT_EMBEDDING: EditEmbedding,
  EDIT_FINETUNE: EditFinetune,
  CONTROLNET: ControlNet,
  'embedding_prior': EmbeddingPrior,
  quantized.SECTION: quantized.FromConfig,
}


def check_fields(config: ConfigDict, stage: str) -> None:
  """Raises UserError where a stage's section is that of another experiment than it names.

  Also where its best checkpoint is to be kept by a metric that the experiment does not report.
  """
  section = config[stage]
  experiment = BY_NAME[section.experiment]
  if 'teacher' in section and 'model' not in section:
    return  # not complete yet, which the experiment says
  # all numbers of an experiment have bounds: one without is of another
  foreign = [field for field in bounds.numeric_fields(section) if field not in experiment.bounds]
  foreign = [field for field in foreign if not field.startswith(SHARED)]
  if foreign:
    raise UserError(
      f'config.{stage}.experiment is {section.experiment!r}, which has no field {foreign[0]!r}: the section '
      'is that of another experiment. Leave the experiment as it is, and choose stages by variants'
    )
  measure = section.train.best_measure
  if measure.startswith('val/') and measure.removeprefix('val/') not in experiment.metrics:
    valid = ', '.join(f'val/{name}' for name in experiment.metrics)
    raise UserError(f'config.{stage}.train.best_measure is {measure!r}; metrics of this stage: {valid}')


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
    check_fields(config, stage)
    experiment = BY_NAME[name].from_config(config, stage)
  except UserError as error:
    if str(error).startswith('config.'):
      raise  # it has the whole name of the field
    raise UserError(f'config.{stage}: {error}') from error
  clash = experiment.networks.keys() & {*experiment.frozen, *experiment.for_sampling}
  if clash:
    raise ValueError(f'stage {stage!r} trains and reads networks of the same names: {sorted(clash)}')
  return experiment
