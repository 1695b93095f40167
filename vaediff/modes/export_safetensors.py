"""The weights of a stage as safetensors: under the paths that they have here, or their published names."""

import json
import math
import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict

import vaediff
from vaediff.models.functional import Model
from vaediff.run import adopting
from vaediff.run import exported as exported_stage
from vaediff.run.published import exported
from vaediff.run.trained import Trained
from vaediff.weights import tensors

NAMES = ('vaediff', 'official')
LAYOUTS = {'vaediff': 'HWIO, Dense [in,out]', 'official': 'OIHW, Linear [out,in]'}
"""How the axes of kernels are ordered, by the names."""
STORED = 'kernel_q [out,*window,in] int8, kernel_q4 the same as uint8, two inputs to a byte; scales in tables'
"""How those of quantized networks are, beside floats in the order of this package."""


def check() -> None:
  """Raises UserError where packages are missing: none can be, safetensors is a dependency of this package."""


def export(
  trained: Trained, settings: ConfigDict, out: pathlib.Path, repeats: int
) -> tuple[pathlib.Path, dict[str, int]]:
  """Writes a file for each network of a stage; returns the path of the last, and `parameters`, `file_bytes`.

  A file is `<out>/<stage>.safetensors`, or `<stage>-<network>.safetensors` where there are several networks.
  They hold the averaged parameters where there are any; of a quantized stage what its checkpoint stores:
  kernels as int8, or uint8 with two numbers to a byte, and `tables` of their scales.

  Raises:
    UserError: for a network that has no published names, or of which the published code makes other images.
  """
  del repeats
  files = []
  for name in trained.experiment.networks:
    arrays = {path: np.asarray(leaf) for path, leaf in adopting.leaves_of(trained.params[name])}
    family = exported.family_of(trained.config, trained.stage, name)
    if settings.names == 'official':
      found = exported.official(trained.config, trained.stage, family, arrays)
    else:
      found = {path.replace('/', '.'): value for path, value in arrays.items()}
    files.append((name, family.name if family else '', found))
  for name, family, found in files:
    path = out / (
      f'{trained.stage}.safetensors' if len(files) == 1 else f'{trained.stage}-{name}.safetensors'
    )
    tensors.save(path, found, about(trained, name, family, settings.names))
  return path, {
    'parameters': sum(count_of(model) for model in trained.experiment.networks.values()),
    'file_bytes': sum(value.nbytes for _, _, found in files for value in found.values()),
  }


def count_of(model: Model) -> int:
  """Returns how many parameters a network has; of a quantized one, before it was."""
  shapes = jax.eval_shape(getattr(model, 'in_floats', model).init, jax.random.key(0))
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def about(trained: Trained, network: str, family: str, names: str) -> dict[str, str]:
  """Returns the metadata of a file: family, config, layout, and what it was made of."""
  return {
    'vaediff': vaediff.__version__,
    'family': family or 'vaediff',
    'stage': trained.stage,
    'network': network,
    'names': names,
    'layout': f'{LAYOUTS[names]}; {STORED}' if exported_stage.is_quantized(trained) else LAYOUTS[names],
    'config': json.dumps(json.loads(trained.config[trained.stage].to_json())),
    **{f'id of {what}': value for what, value in trained.made_of.items() if what.startswith('the stage')},
  }
