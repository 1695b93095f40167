"""A trained stage whose network is stored, and computed, as whole numbers: it is sampled as that stage is.

The section of such a stage is that of the stage it is made of, with `quantized` beside it, which says how.
Its experiment is that stage's own, with another `Model` in the place of the network (`models.quantized`), so
that samplers, figures and tables see what they always see. Of a student it is the student alone, without its
teacher. `--mode=quantize` makes the checkpoint; nothing is trained.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import io_callback
from ml_collections import ConfigDict

from vaediff import checks, reads
from vaediff.diffusion import noise_correction
from vaediff.errors import UserError
from vaediff.experiments import base, student
from vaediff.experiments.adversarial_distillation import AdversarialDistillation
from vaediff.experiments.autoencoder import Autoencoder
from vaediff.experiments.columns import Columns
from vaediff.experiments.consistency import Consistency
from vaediff.experiments.corrected import NoiseCorrection
from vaediff.experiments.ddgan import Ddgan
from vaediff.experiments.diffusion import Diffusion
from vaediff.experiments.distribution_matching import DistributionMatching
from vaediff.experiments.light_decoder import LightDecoder
from vaediff.experiments.progressive import Progressive
from vaediff.experiments.token_prior import TokenPrior
from vaediff.experiments.vae import Vae
from vaediff.machine import integers
from vaediff.models import observed
from vaediff.models.functional import Model
from vaediff.models.quantized import FLOATS, Quantized, has_time
from vaediff.spaces import whole_numbers
from vaediff.spaces.whole_numbers import SECTION, WEIGHTS
from vaediff.types import Params

SOURCES: Mapping[str, type[base.Experiment]] = {
  'diffusion': Diffusion,
  **dict.fromkeys(student.EXPERIMENTS, Diffusion),  # what they teach is a diffusion
  'ddgan': Ddgan,
  'light_decoder': LightDecoder,
  'vae': Vae,
  'autoencoder': Autoencoder,
  'token_prior': TokenPrior,
}
"""The experiments of stages that can be quantized, and what their samples are drawn by."""
STUDENTS = (Progressive, Consistency, AdversarialDistillation, DistributionMatching)
"""Whose sections have fields beside those of a diffusion."""
FOR_TRAINING = ('discriminator',)
"""Networks that samples do not need."""
SLOW = 'this machine has no fast products of whole numbers: floats are made of the kernels when it is opened'
NARROW = (
  '{narrow} of {layers} layers are too narrow to be faster in whole numbers on a CPU: floats are made of '
  'their kernels when it is opened'
)
ACTIVATIONS = ('int8', 'float32')
SUFFIX = {
  ('int8', 'int8'): 'int8',
  ('int4', 'int8'): 'w4a8',
  ('int8', 'float32'): 'w8',
  ('int4', 'float32'): 'w4',
}
"""What is appended to the name of a stage."""
BOUNDS = {
  'weights': checks.one_of(tuple(WEIGHTS)),
  'activations': checks.one_of(ACTIVATIONS),
  'time_buckets': checks.count(1),
  'correction': checks.one_of(noise_correction.CORRECTIONS),
  'correction_rows': checks.count(0),
  'checkpoint': checks.checkpoint(),
}
"""Of a stage's section `quantized`."""


class FromConfig:
  """What the name of the experiment stands for: it builds those of `quantize_experiment`."""

  bounds: checks.Bounds = {
    name: bound for kind in (*SOURCES.values(), *STUDENTS) for name, bound in kind.bounds.items()
  }
  metrics: Mapping[str, bool] = {
    name: most for kind in SOURCES.values() for name, most in kind.metrics.items()
  }

  @classmethod
  def from_config(cls, config: ConfigDict, stage: str) -> base.Experiment:
    """Returns the experiment of `config.<stage>`."""
    if SECTION not in config[stage]:
      raise UserError(f'it has no section {SECTION!r}: such a stage is made by --mode=quantize')
    made = config[stage][SECTION]
    checks.check(made, BOUNDS, f'config.{stage}.{SECTION}.')
    if made.experiment not in SOURCES:
      raise UserError(f'{SECTION}.experiment is {made.experiment!r}; can be quantized: {", ".join(SOURCES)}')
    inner = SOURCES[made.experiment].from_config(config, stage)
    return quantize_experiment(inner, made.to_dict(), f'config.{stage}.{SECTION}.keep_float')


class OfWholeNumbers:
  """What such a stage has in place of that of the experiment that it also is.

  Attributes:
    made_of_stage: the stage it is made of.
    made_of_checkpoint: the checkpoint of it: 'latest', 'best' or a step.
    suffix: how its name ends.
  """

  made_of_stage: str
  made_of_checkpoint: str
  suffix: str
  trainable = False

  @property
  def networks(self) -> Mapping[str, Model]:
    """The networks that samples need."""
    return {name: model for name, model in super().networks.items() if name not in FOR_TRAINING}

  @property
  def made_of(self) -> Mapping[str, tuple[str, str]]:
    """Stage and checkpoint of the networks of floats, which are not read any more."""
    whole = (name for name, model in self.networks.items() if isinstance(model, Quantized))
    return {f'float_{name}': (self.made_of_stage, self.made_of_checkpoint) for name in whole}

  @property
  def notes(self) -> tuple[str, ...]:
    """How it is computed, where that is not with whole numbers."""
    models = [model for model in self.networks.values() if isinstance(model, Quantized)]
    models = [model for model in models if model.quantized_inputs]
    if models and integers.arithmetic() == FLOATS:
      return (*super().notes, SLOW)
    layers = sum(len(model.layers) for model in models)
    narrow = layers - sum(len(model.whole_layers()) for model in models)
    return (*super().notes, NARROW.format(narrow=narrow, layers=layers)) if narrow else super().notes

  def columns(self) -> Columns:
    """Returns those of the stage, with what it is stored as behind the method."""
    columns = super().columns()
    return dataclasses.replace(columns, method=f'{columns.method} {self.suffix}')

  def init(self, key: jax.Array) -> base.TrainState:
    """Returns the state of fresh networks; there is nothing to train them with."""
    keys = jax.random.split(key, len(self.networks))
    params = {name: model.init(one) for (name, model), one in zip(self.networks.items(), keys, strict=True)}
    return state_of(params, 0)

  def train_step(self, *args: Any, **kwargs: Any) -> Any:
    """Raises UserError: whole numbers have no gradient."""
    raise UserError('a quantized stage is not trained; train the stage it is made of, and quantize that')


def state_of(params: Mapping[str, Params], step: int) -> base.TrainState:
  """Returns the state that a checkpoint of a quantized stage holds."""
  networks = {
    name: base.Network(params=tree, opt_state=None, ema_params=None) for name, tree in params.items()
  }
  return base.TrainState(step=jnp.int32(step), networks=networks, extra={})


def quantize_experiment(experiment: base.Experiment, made: Mapping[str, Any], field: str) -> base.Experiment:
  """Returns an experiment whose networks are of whole numbers, but for encoders; without discriminators.

  Args:
    experiment: of floats.
    made: a stage's section `quantized`.
    field: that names layers which stay floats, for messages.

  Raises:
    UserError: for a layer that there is not, or where none is left.
  """
  for name, model in experiment.networks.items():
    if name in FOR_TRAINING:
      continue
    whole = whole_numbers.quantized(model, made, field)
    experiment = replaced(experiment, model, whole)
  if made['correction_rows'] and isinstance(experiment, Diffusion):
    correction = NoiseCorrection(direction=made['correction'] == 'published')
    experiment = dataclasses.replace(experiment, noise_correction=correction)
  kind = type(experiment)
  known = {
    'made_of_stage': made['stage'],
    'made_of_checkpoint': made['checkpoint'],
    'suffix': SUFFIX[made['weights'], made['activations']],
  }
  own = type(f'Quantized{kind.__name__}', (OfWholeNumbers, kind), known)
  return own(**{field.name: getattr(experiment, field.name) for field in dataclasses.fields(experiment)})


def replaced(node: Any, old: Any, new: Any) -> Any:
  """Returns an experiment in which one object, such as a `Model`, is another; the rest is shared."""
  if node is old:
    return new
  if isinstance(node, dict):
    parts = {name: replaced(part, old, new) for name, part in node.items()}
    return parts if any(parts[name] is not node[name] for name in node) else node
  if isinstance(node, tuple) and type(node) is tuple:
    several = tuple(replaced(part, old, new) for part in node)
    return several if any(a is not b for a, b in zip(several, node, strict=True)) else node
  if not dataclasses.is_dataclass(node) or isinstance(node, type | Model):
    return node
  fields = {field.name: getattr(node, field.name) for field in dataclasses.fields(node) if field.init}
  changed = {name: replaced(part, old, new) for name, part in fields.items()}
  changed = {name: part for name, part in changed.items() if part is not fields[name]}
  return dataclasses.replace(node, **changed) if changed else node


def in_floats(experiment: base.Experiment) -> base.Experiment:
  """Returns the same experiment with its networks, and those that it reads, in floats."""
  read = (source.model for source in experiment.frozen.values() if isinstance(source, reads.FromStage))
  for model in (*experiment.networks.values(), *read):
    if isinstance(model, Quantized):
      experiment = replaced(experiment, model, model.in_floats)
  return experiment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observing(Model):
  """A network that tells, at every call, what its layers read.

  Attributes:
    layers: that are looked at.
    sink: called on the host with the times [batch], () without, and ranges [batch, parts, 2] by path.
  """

  layers: tuple[observed.Layer, ...]
  sink: Callable[[Any, Any], None]

  def apply(self, params: Params, *args: Any, **kwargs: Any) -> Any:
    """Applies the network; see `Model.apply`."""
    model = Model(module=self.module, inputs=self.inputs, entry=self.entry)
    output, ranges = observed.output_and_ranges(model, params, *args, layers=self.layers, **kwargs)
    t = args[1] if len(args) > 1 and has_time(model) else ()
    io_callback(self.sink, None, t, ranges)
    return output
