"""Networks that `--mode=quantize` made of those of other stages: how they are built from a stage's section.

Such a stage's section is that of the stage it is made of, with `quantized` beside it, which says how. Any
stage that reads a network of that kind can read this one: it is applied as the one in floats is.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from vaediff import reads
from vaediff.errors import UserError
from vaediff.machine import integers
from vaediff.models import observed
from vaediff.models.functional import Model
from vaediff.models.quantized import Quantized, has_time

SECTION = 'quantized'
"""Of a stage's section: how it was made. Its experiment has the same name."""
ENCODER = 'encoder'
"""How layers begin that stay as they are: they make no samples."""
WEIGHTS = {'int8': 8, 'int4': 4}
"""Bits of the kernels."""


def quantized(model: Model, made: Mapping[str, Any], field: str) -> Quantized:
  """Returns a network as one of whole numbers, but for an encoder in it.

  Args:
    model: of floats.
    made: a stage's section `quantized`.
    field: that names layers which stay floats, for messages.

  Raises:
    UserError: for a layer that there is not, or where none is left.
  """
  try:
    layers = observed.quantizable(observed.layers_of(model), tuple(made['keep_float']))
  except UserError as error:
    raise UserError(f'{field} {error}') from error
  layers = tuple(layer for layer in layers if not layer.path.startswith(ENCODER))
  if not layers:
    raise UserError(f'{field} is {made["keep_float"]}, which leaves no layer to be quantized; keep fewer')
  return Quantized.of(
    model,
    layers=layers,
    bits=WEIGHTS[made['weights']],
    quantized_inputs=made['activations'] == 'int8',
    buckets=made['time_buckets'],
    rows=made['correction_rows'] if has_time(model) else 0,
    arithmetic=integers.arithmetic,
  )


def is_of(config: ConfigDict, stage: str, experiment: str) -> bool:
  """Returns whether `config.<stage>` is a stage of whole numbers made of one with this experiment."""
  return reads.is_stage(config, stage, SECTION) and config[stage][SECTION].experiment == experiment


def need_stage(config: ConfigDict, name: str, experiment: str, field: str, what: str) -> ConfigDict:
  """Returns the section of the stage that a field names, of whole numbers or not; see `reads.need_stage`."""
  if is_of(config, name, experiment):
    return config[name]
  return reads.need_stage(config, name, experiment, field, what)


def as_stored(config: ConfigDict, stage: str, model: Model) -> Model:
  """Returns the network of a stage as its checkpoint has it: of whole numbers where that is their stage."""
  if not reads.is_stage(config, stage, SECTION):
    return model
  return quantized(model, config[stage][SECTION].to_dict(), f'config.{stage}.{SECTION}.keep_float')
