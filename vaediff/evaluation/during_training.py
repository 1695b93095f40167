"""A figure of samples while a stage trains, by which its best checkpoint is kept."""

from collections.abc import Callable

from jax.sharding import Mesh
from ml_collections import ConfigDict

from vaediff.data import sources
from vaediff.errors import UserError
from vaediff.evaluation import measures, networks
from vaediff.evaluation.references import reference
from vaediff.experiments.base import Experiment
from vaediff.run import draw
from vaediff.types import Params, Read

Measure = Callable[[dict[str, Params]], float]


def make_measure(
  config: ConfigDict, stage: str, experiment: Experiment, frozen: Read, source: sources.Source, mesh: Mesh
) -> tuple[Measure | None, dict[str, str]]:
  """Returns params -> the figure `train.best_measure` of `train.best_images` samples of the stage.

  None where there is no such figure to compute, or it is one of the stage's own validation metrics. `source`
  are images of the evaluation split, for a stage whose samples are made of images.

  And what the figure depends on beside the parameters: feature network, real images, number of samples.

  Raises:
    UserError: for an unknown figure, or when its network has no weights.
  """
  train = config[stage].train
  if not train.best_measure or train.best_measure.startswith('val/'):
    return None, {}
  networks.check(config.evaluate)
  name = measures.network_of(train.best_measure)
  least = measures.least_of(name, config.evaluate)[train.best_measure]
  if train.best_images < least:
    raise UserError(
      f'config.{stage}.train.best_images must be at least {least} for train.best_measure = '
      f'{train.best_measure!r}, got {train.best_images}'
    )
  extractor, accuracy = networks.load(name, config, mesh)
  network = networks.FeatureNetwork(extractor, mesh, config.evaluate.batch_size, accuracy)
  known = reference(config, 'train', network)
  run = draw.Drawer(
    experiment, mesh, config[stage].sample.seed, source.image_shape, lambda: source
  )
  size = min(config[stage].sample.batch_size, train.best_images)

  def measure(params: dict[str, Params]) -> float:
    stream = network.stream()
    for indices, num_real in draw.padded_batches(train.best_images, size):
      images = run({**frozen, **params}, indices)
      stream.add(draw.own_image(images)[:num_real])
    seen = stream.finish()
    missing = measures.missing(name, seen['features'], known.features, config.evaluate)
    if train.best_measure in missing:
      raise UserError(
        f'config.{stage}.train.best_measure = {train.best_measure!r}: {missing[train.best_measure]}'
      )
    return measures.of_features(name, seen, known, config.evaluate, missing)[train.best_measure]

  made_of = {
    'the real images': str(known.provenance['images_sha256']),
    f'the network {name!r}': extractor.fingerprint,
    'the number of samples': str(train.best_images),
  }
  return measure, made_of
