"""`--mode=export`: a trained stage as a file that other programs run."""

from collections.abc import Callable, Mapping

import jax

from vaediff import checks
from vaediff.errors import UserError
from vaediff.experiments import bounds
from vaediff.modes import export_onnx, export_safetensors, export_stablehlo, pictures
from vaediff.run import exported, log
from vaediff.run.config import Run
from vaediff.run.trained import open_last
from vaediff.weights import stablehlo_file

BOUNDS = {
  'weights': checks.one_of(export_onnx.WEIGHTS),
  'batch_size': checks.count(1),
  'output': checks.one_of(exported.OUTPUTS),
  'num_images': checks.count(1),
  'reduce_range': checks.one_of(export_onnx.REDUCED),
  'names': checks.one_of(export_safetensors.NAMES),
  'platforms': bounds.several(
    checks.one_of(stablehlo_file.PLATFORMS), f'a tuple of names, of {stablehlo_file.PLATFORMS}'
  ),
}
FORMATS: Mapping[str, tuple[Callable, Callable]] = {
  'onnx': (export_onnx.check, export_onnx.export),
  'stablehlo': (export_stablehlo.check, export_stablehlo.export),
  'safetensors': (export_safetensors.check, export_safetensors.export),
}
"""By name, as `config.export.format` has it: what sees whether it can be written, and what writes it."""


def mode(run: Run) -> None:
  """Exports the last stage.

  Raises:
    UserError: for an unknown format or setting, packages that are missing, a stage that is not trained, one
      that cannot be exported, or a file whose images are others.
  """
  if jax.process_count() > 1:
    raise UserError(f'--mode=export runs in one process, and this job has {jax.process_count()}')
  settings = run.config.export
  checks.check(settings, {'format': checks.one_of(FORMATS), **BOUNDS}, 'config.export.')
  check, export = FORMATS[settings.format]
  out = pictures.out_of(run)
  check()
  # ONNX has whole numbers of its own, made of floats
  trained = open_last(run, as_stored=settings.format != 'onnx')
  path, figures = export(trained, settings, out, run.config.benchmark.num_repeats)
  for name, value in figures.items():
    log.say(f'{name} {value:,}' if isinstance(value, int) else f'{name} {value:.4g}')
  log.say(f'wrote {path}')
