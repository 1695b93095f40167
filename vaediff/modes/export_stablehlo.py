"""A stage's sampler as one StableHLO file: made, run from its bytes, compared, and only then written."""

import functools
import hashlib
import pathlib
import statistics

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from ml_collections import ConfigDict

import vaediff
from vaediff.errors import UserError
from vaediff.modes import paired
from vaediff.modes.export_onnx import Figures, batches_of, differences, in_jax_of, speed
from vaediff.run import exported, log
from vaediff.run.draw import HostArrays
from vaediff.run.exported import Exported
from vaediff.run.trained import Trained
from vaediff.storage import files
from vaediff.weights import stablehlo_file

TOLERANCE = {
  'float32': {'float32': 1e-4, 'uint8': 1},
  'bfloat16': {'float32': 5e-2, 'uint8': 7},  # another order of sums is rounded otherwise
  'whole numbers': {'float32': 5e-2, 'uint8': 7},  # as are inputs that lie between two of them
}
"""Most that images may differ from those of the stage's program, by what it computes in, and their type."""


def check() -> None:
  """Raises UserError where the package is missing."""
  stablehlo_file.check_installed()


def export(
  trained: Trained, settings: ConfigDict, out: pathlib.Path, repeats: int
) -> tuple[pathlib.Path, Figures]:
  """Writes `<out>/<stage>.stablehlo` and what it is as JSON; returns its path and what was measured.

  Figures: `file_bytes`; `max_difference` of its images from those of JAX; `stablehlo_ms` and `jax_ms` of one
  call on this machine, medians of calls in turn, and `stablehlo_speed`, the median of jax over it in each
  turn.

  Args:
    trained: the stage.
    settings: `config.export`.
    out: the folder.
    repeats: of the calls that are timed.

  Raises:
    UserError: for a stage that cannot be exported, or a file that draws other images: nothing is written.
  """
  check_settings(settings)
  exported.check_kind(trained)
  batches = list(batches_of(trained, settings))
  whole = exported.of(trained, batches[0], settings.output, bfloat16=True)
  open_or_not = 'any' if settings.any_batch else settings.batch_size
  log.say(f'{trained.stage}: for {", ".join(settings.platforms)}, images of a call: {open_or_not}')
  content = stablehlo_file.convert(
    functools.partial(whole.apply, jax.tree.map(jnp.asarray, whole.read)),
    whole.inputs,
    tuple(settings.platforms),
    any_batch=settings.any_batch,
  )
  in_jax, in_file = in_jax_of(whole), stablehlo_file.runner(content)
  if settings.any_batch:  # another size than the one that is timed
    batches.append({name: value[:1] for name, value in batches[0].items()})
  apart = [float(differences(in_file(batch), in_jax(batch)).max()) for batch in batches]
  check_same(trained, whole, batches[0], max(apart, key=lambda value: (np.isnan(value), value)))
  found: Figures = {'file_bytes': len(content), 'max_difference': max(apart)}
  calls = {'jax': functools.partial(in_jax, batches[0]), 'stablehlo': functools.partial(in_file, batches[0])}
  times = paired.in_turn(calls, repeats)
  found |= {f'{name}_ms': 1e3 * statistics.median(seconds) for name, seconds in times.items()}
  found['stablehlo_speed'] = speed(times['jax'], times['stablehlo'])
  path = out / f'{trained.stage}.stablehlo'
  with files.replacing(path) as temporary:
    temporary.write_bytes(content)
  files.write_json(path.with_suffix('.json'), about(whole, content))
  return path, found


def check_same(trained: Trained, whole: Exported, example: HostArrays, apart: float) -> None:
  """Raises UserError where images of a file are further `apart` from those of the stage than `TOLERANCE`."""
  computes_in = 'whole numbers' if exported.is_quantized(trained) else 'float32'
  if exported.in_bfloat16(trained, example):
    computes_in = 'bfloat16'
  most = TOLERANCE[computes_in][whole.output]
  if not apart <= most:  # nan is not
    raise UserError(
      f'the StableHLO of stage {trained.stage!r} draws other images than the stage: by {apart:.3g}, '
      f'and {most:g} is allowed (config.export.output = {whole.output!r}). Nothing was written'
    )


def check_settings(settings: ConfigDict) -> None:
  """Raises UserError for settings of another format, or platforms without that of this machine."""
  if settings.weights != 'float32':
    raise UserError(
      f"config.export.weights is {settings.weights!r}, which config.export.format = 'stablehlo' does not "
      "have; set it to 'float32'"
    )
  here = {'gpu': ('cuda', 'rocm')}.get(jax.default_backend(), (jax.default_backend(),))
  if not set(here) & set(settings.platforms):
    raise UserError(
      f'config.export.platforms is {tuple(settings.platforms)} and this machine is {" or ".join(here)}: add '
      'that, for the file is run here and compared before it is written'
    )


def about(whole: Exported, content: bytes) -> dict[str, str | dict[str, str]]:
  """Returns what lies beside a file: what it was made of, what goes in and comes out, and who can read it."""
  images = 'in [-1, 1]; others are to be clipped' if whole.output == 'float32' else 'bytes'
  inputs = {
    name: f'{np.dtype(struct.dtype).name} {["batch", *struct.shape[1:]]}, {whole.ranges[name]}'
    for name, struct in whole.inputs.items()
  }
  return {
    'vaediff': vaediff.__version__,
    'jax': jax.__version__,
    'jaxlib': jaxlib.__version__,
    'sha256': hashlib.sha256(content).hexdigest(),
    **stablehlo_file.about(content),
    'call': 'jax.export.deserialize(bytearray(content)).call({name: array})',
    'inputs': inputs,
    'output': f'{whole.output} [batch, height, width, channels], {images}',
    **whole.about,
  }
