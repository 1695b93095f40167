"""`--mode=quantize`: a trained stage's network as whole numbers, as a stage of its own beside it."""

from typing import Any

import jax
from ml_collections import ConfigDict

from vaediff import checks, experiments, reads
from vaediff.errors import UserError
from vaediff.experiments import quantized as stages
from vaediff.experiments.base import Experiment
from vaediff.machine import sharding
from vaediff.modes import describe
from vaediff.run import config as configs
from vaediff.run import log, quantize_calibration, quantize_stage
from vaediff.run.config import Run
from vaediff.run.trained import Trained
from vaediff.storage import files

BOUNDS = {
  **quantize_calibration.BOUNDS,
  'weights': stages.BOUNDS['weights'],
  'activations': stages.BOUNDS['activations'],
  'method': checks.one_of(quantize_stage.METHODS),
  'time_buckets': stages.BOUNDS['time_buckets'],
  'num_images': checks.count(1),
}
AS_MADE = ('weights', 'activations', 'method', 'keep_float', 'time_buckets', 'correction')
"""Of `config.quantize`, what the stage's own section says."""
READS = ('vae', 'autoencoder')
"""Parts of a stage's section that name what can be read as whole numbers."""


def mode(run: Run) -> None:
  """Makes a quantized stage of a trained one."""
  if jax.process_count() > 1:
    raise UserError(f'--mode=quantize runs in one process, and this job has {jax.process_count()}')
  with files.lock(run.workdir, '--mode=quantize'):
    quantize(run)


def quantize(run: Run) -> str:
  """Makes a quantized stage of `config.quantize.stage`, or of the last trained one; returns its name.

  It joins the stages of the run's stored config, so that `--workdir` and `--stages` name it as any other.

  Raises:
    UserError: for a stage that is not trained, or that cannot be quantized.
  """
  settings = run.config.quantize
  checks.check(settings, BOUNDS, 'config.quantize.')
  trainable = [stage for stage in run.stages if run.config[stage].experiment != stages.SECTION]
  source = settings.stage or (trainable or run.stages)[-1]
  check_source(run.config, source)
  check_read(run.config)
  trained = Trained(run.config, run.workdir, source, sharding.make_mesh(run.config.mesh))
  name = f'{source}_{stages.SUFFIX[settings.weights, settings.activations]}'
  config = with_stage(run.config, source, name, quantize_calibration.rows_of(trained, settings))
  experiment = experiments.build(config, name)
  check_is_read(run.config, experiment, source)
  log.say(f'{name}: {settings.weights} weights, {settings.activations} activations, {settings.method}')
  params = quantize_stage.quantize(trained, experiment, settings)
  quantize_stage.save(config, trained, experiment, name, params)
  # what else this call was asked is not the run's
  configs.save(configs.joined(configs.read(run.workdir), name, config[name]), run.workdir)
  describe.describe_quantized(config, run.workdir, name)
  for note in experiment.notes:
    log.say(f'{name}: {note}')
  log.say(f'wrote {run.workdir / name}; draw from it with --workdir={run.workdir} --stages={name}')
  return name


def check_source(config: ConfigDict, source: str) -> None:
  """Raises UserError where a stage cannot be quantized, or is not a stage."""
  if source not in config.stages:
    raise UserError(
      f'config.quantize.stage is {source!r}; the stages of this run are {", ".join(config.stages)}'
    )
  kind = config[source].experiment
  if kind not in stages.SOURCES:
    raise UserError(
      f'config.quantize.stage is {source!r}, whose experiment is {kind!r}; those that can be quantized are '
      f'{", ".join(stages.SOURCES)}'
    )


def check_read(config: ConfigDict) -> None:
  """Raises UserError where `quantize.reads` names no quantized stage of this run."""
  name = config.quantize.reads
  if not name:
    return
  if not reads.is_stage(config, name, stages.SECTION) or name not in config.stages:
    raise UserError(
      f'config.quantize.reads is {name!r}, which is no quantized stage of this run; make it first, by '
      '--mode=quantize --config.quantize.stage=<the VAE or autoencoder>'
    )


def check_is_read(config: ConfigDict, experiment: Experiment, source: str) -> None:
  """Raises UserError where a quantized stage does not read what `quantize.reads` names."""
  name = config.quantize.reads
  sources = (each for each in experiment.frozen.values() if isinstance(each, reads.FromStage))
  if name and not any(each.stage == name for each in sources):
    raise UserError(
      f'config.quantize.reads is {name!r}, which was made of {config[name][stages.SECTION].stage!r}; stage '
      f'{source!r} reads no such VAE or autoencoder of this run'
    )


def readers_of(section: ConfigDict, stage: str) -> tuple[str, ...]:
  """Returns the names of the parts of a stage's section that name a VAE or an autoencoder of this run."""
  parts = (part for part in READS if part in section)
  return tuple(part for part in parts if section[part].stage == stage and not section[part].workdir)


def with_stage(config: ConfigDict, source: str, name: str, rows: int = 0) -> ConfigDict:
  """Returns the config with a section for the quantized stage: that of its source, and how it is made.

  `rows` are those of the correction of its output.
  """
  settings = config.quantize
  sample = config[source].sample if 'sample' in config[source] else {}
  made: dict[str, Any] = {
    'stage': source,
    'experiment': config[source].experiment,
    **{field: settings[field] for field in AS_MADE},
    'correction_rows': rows,
    'checkpoint': sample['checkpoint'] if 'checkpoint' in sample else 'latest',
  }
  section = config[source].copy_and_resolve_references()
  with section.unlocked():
    section.experiment = stages.SECTION
    section[stages.SECTION] = ConfigDict(made)
    if settings.reads:
      for part in readers_of(section, config[settings.reads][stages.SECTION].stage):
        section[part].stage = settings.reads
    if 'sample' in section:
      section.sample.checkpoint = 'latest'  # it has one
  return configs.joined(config, name, section)
