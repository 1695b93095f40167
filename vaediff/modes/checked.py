"""All that can be said of a config before anything is read, trained or written: rules across its fields.

Bounds of single fields are tables, `vaediff.run.config` and those of each experiment; this calls them too.
"""

import pathlib
import traceback

from jax.sharding import Mesh
from ml_collections import ConfigDict

from vaediff import experiments, reads
from vaediff.errors import UserError
from vaediff.evaluation import measures, networks
from vaediff.evaluation.own_classifier import STAGE as CLASSIFIER
from vaediff.experiments.base import Experiment
from vaediff.machine import chips, sharding
from vaediff.run import captions, checkpoint, classes, guides, students, values, wandb_log
from vaediff.run import config as configs
from vaediff.run import loop as training
from vaediff.run.config import Run
from vaediff.weights import published, tensors

SEEDS = 2**31
"""Random numbers start from numbers below it."""
TRAINS = ('train', 'benchmark')
"""Modes that run train steps on the devices that are here."""


def complete(config: ConfigDict) -> None:
  """Makes a config whole, in place: students have all that their teachers give them, `~` is the home folder.

  Raises:
    UserError: for the first value that no run could use.
  """
  configs.check_stages(config)
  values.check(config)  # sections that students are made of are gone afterwards
  students.resolve(config)
  configs.validate(config)
  values.expand(config)
  guides.resolve(config)


def check(run: Run, mode: str = 'train') -> dict[str, Experiment]:
  """Returns the experiments of all stages of a config that could run, by stage.

  JAX is asked for its devices, so that `distributed.join` comes first; not for `--mode=prepare`, of a machine
  that need not have them, and which returns {}.

  Args:
    run: a config that `complete` has made whole, its folder, and the stages that are chosen.
    mode: what is done with them.

  Raises:
    UserError: for the first thing that would fail later: names field or file, value, and what is allowed.
  """
  config = run.config
  configs.validate(config)
  networks.check(config.evaluate)
  if mode in ('train', 'evaluate'):
    check_seeds(config)
  if mode == 'train':
    wandb_log.check(config)
    captions.check_installed(config, run.stages)
  for topology in config.compile.topology.split(','):
    chips.parse(topology.strip())
  for stage in config.stages:
    students.check_chain(config, stage)
    check_best(config, stage)
  if mode == 'train':
    check_weights(config, run.stages)
  sharding.rules_of(config.mesh)
  if mode == 'prepare':
    return {}
  classes.number(config)
  built = {stage: build(config, stage) for stage in config.stages}
  check_sizes(config, built, run.stages[-1] if mode == 'evaluate' else '')
  if mode in ('describe', 'compile'):
    return built  # of devices that are not here
  mesh = sharding.make_mesh(config.mesh)
  if needs_classifier(config, mode):
    check_classifier(config, mesh)
  if mode in TRAINS:
    for stage in (stage for stage in run.stages if built[stage].trainable):
      training.check_batch_size(config[stage], stage, mesh)
  if mode == 'train':
    check_order(config, tuple(s for s in run.stages if built[s].trainable), built, run.workdir)
  if mode == 'interpolate':
    check_labels(config)
  if mode == 'restore':
    check_factor(config)
  return built


def build(config: ConfigDict, stage: str) -> Experiment:
  """Returns the experiment of a stage; raises UserError where its section is one of another experiment."""
  try:
    return experiments.build(config, stage)
  except (AttributeError, KeyError) as error:
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    if frame.f_locals.get('self') is not config[stage]:
      raise
    raise UserError(
      f'config.{stage} has only the keys {", ".join(config[stage])}, and its experiment '
      f'{config[stage].experiment!r} reads another: the section is that of another experiment'
    ) from error


def check_sizes(config: ConfigDict, built: dict[str, Experiment], evaluated: str) -> None:
  """Raises UserError where images are to be compared with data that are larger.

  Args:
    config: of the run.
    built: the experiments by stage.
    evaluated: the stage whose figures are asked for; '' = none.
  """
  size = config.data.image_size
  for stage, experiment in built.items():
    measure = config[stage].train.best_measure
    asked = 'has train.best_measure = ' + repr(measure) if measure and not measure.startswith('val/') else ''
    if stage == evaluated:
      asked = 'is to be evaluated'
    if asked and experiment.image_factor > 1:
      side = size // experiment.image_factor
      raise UserError(
        f'config.{stage} {asked}, which compares its samples with the data: they have {side} pixels a side, '
        f'the data {size}. Take a stage whose space_factor is 1, as the last of a cascade (--stages), or a '
        "measure of its own, such as 'val/loss'"
      )


def check_seeds(config: ConfigDict) -> None:
  """Raises UserError where the last of several seeds would be beyond what random numbers start from."""
  more = config.evaluate.num_seeds - 1
  for stage in config.stages:
    seed = config[stage].sample.seed
    if seed + more >= SEEDS:
      raise UserError(
        f'config.{stage}.sample.seed is {seed} and config.evaluate.num_seeds {more + 1}: the last seed '
        'would be '
        f'{seed + more}, and seeds must be in [0, 2^31). Lower one of them'
      )


def check_best(config: ConfigDict, stage: str) -> None:
  """Raises UserError for a figure `train.best_measure` that no network gives."""
  measure = config[stage].train.best_measure
  if measure and not measure.startswith('val/'):
    try:
      measures.network_of(measure)
    except UserError as error:
      raise UserError(f'config.{stage}.{error}') from error


def check_weights(config: ConfigDict, stages: tuple[str, ...]) -> None:
  """Raises UserError where a stage is to be kept at its best by a network whose weights are not there."""
  for name in measures.weights_of_best(config, stages):
    try:
      published.require(name, tensors.folder(config.evaluate.weights_dir))
    except UserError as error:
      raise UserError(f'train.best_measure of one of {", ".join(stages)}: {error}') from error


def needs_classifier(config: ConfigDict, mode: str) -> bool:
  """Returns whether the data set's own classifier will be trained, if it is not there."""
  if mode == 'evaluate' and CLASSIFIER in config.evaluate.extractors:
    return True
  return mode == 'train' and any(
    config[name].train.best_measure.endswith(CLASSIFIER) for name in config.stages
  )


def check_classifier(config: ConfigDict, mesh: Mesh) -> None:
  """Raises UserError where the section of the own classifier holds what it cannot be trained with."""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.classifier.model.num_classes = max(config.data.num_classes, 2)
    config.stages = (CLASSIFIER,)
  configs.validate(config)
  build(config, CLASSIFIER)
  training.check_batch_size(config.classifier, CLASSIFIER, mesh)


def check_order(
  config: ConfigDict, chosen: tuple[str, ...], built: dict[str, Experiment], workdir: pathlib.Path
) -> None:
  """Raises UserError where a stage to be trained reads one that will not have been trained by then.

  Args:
    config: of the run.
    chosen: the stages to be trained, in their order.
    built: the experiments by stage.
    workdir: the run's folder, which may hold stages that are trained already.
  """
  for number, stage in enumerate(chosen):
    for source in built[stage].frozen.values():
      if not isinstance(source, reads.FromStage):
        continue
      folder = reads.workdir_of(source, workdir)
      reading = f'stage {stage!r} reads stage {source.stage!r} of {folder}'
      if source.stage in chosen[:number] and not source.workdir:
        continue
      if checkpoint.latest_step(folder / source.stage) is not None:
        continue
      if source.workdir:
        raise UserError(f'{reading}, where no such stage is trained; name the folder of a run that has it')
      if source.stage in chosen[number:]:
        raise UserError(
          f'{reading}, which comes after it: config.stages is {tuple(config.stages)}. Name '
          f'{source.stage!r} first'
        )
      if source.stage in config.stages:
        raise UserError(
          f'{reading}, which is not trained to its last step; train it first (--stages={source.stage})'
        )
      raise UserError(
        f'{reading}, which is none of config.stages {tuple(config.stages)} and has no checkpoint there. '
        'Add it to '
        'config.stages, or name the run that has it as the workdir beside the stage'
      )


def check_labels(config: ConfigDict) -> None:
  """Raises UserError for a direction between two classes that cannot be."""
  settings, count = config.interpolate, config.data.num_classes
  if settings.from_label == settings.to_label:
    raise UserError(
      f'config.interpolate.from_label and to_label are both {settings.to_label}: there is no way from a '
      'class to itself'
    )
  for field in ('from_label', 'to_label'):
    if count > 1 and settings[field] >= count:
      raise UserError(
        f'config.interpolate.{field} is {settings[field]}; the labels of this data set are 0 to {count - 1}'
      )


def check_factor(config: ConfigDict) -> None:
  """Raises UserError where images cannot be made smaller by `restore.factor`."""
  factor, size = config.restore.factor, config.data.image_size
  if config.restore.task in ('all', 'super_resolution') and (factor < 2 or size % factor):
    raise UserError(f'config.restore.factor must be >= 2 and divide the image size {size}, got {factor}')
