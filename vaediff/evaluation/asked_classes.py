"""The share of images that the own classifier takes for the class that they were asked to be of."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from vaediff.data import sources
from vaediff.evaluation import measures
from vaediff.evaluation.measures import Figure
from vaediff.evaluation.networks import Networks
from vaediff.run.trained import Trained


def class_accuracy(
  trained: Trained, opened: Networks, seen: Sequence[Mapping[str, Mapping[str, np.ndarray]]], count: int
) -> dict[str, Figure]:
  """Returns the share of samples that are of the class they were asked to be of, says the own classifier.

  Samples of the captions of evaluation images are asked to be of the classes of these images. Its floor is
  that of real images: the classifier's accuracy on the evaluation split.

  Args:
    trained: the stage.
    opened: the networks.
    seen: by seed, what each network saw in `count` samples; () = of images that were asked for nothing.
    count: of samples.

  Returns:
    {} where samples are asked to be of no class.
  """
  asked = classes_asked(trained, count) if seen else None
  if asked is None:
    return {}
  if measures.CLASSIFIER not in {*opened.features, *opened.missing}:
    reason = f'it is of the network {measures.CLASSIFIER!r}, which config.evaluate.extractors does not name'
    return {measures.CLASS_ACCURACY: Figure(missing=reason)}
  return classifier_accuracy(asked, opened, seen, len(trained.eval_source))


def classifier_accuracy(
  asked: np.ndarray, opened: Networks, seen: Sequence[Mapping[str, Mapping[str, np.ndarray]]], real: int
) -> dict[str, Figure]:
  """Returns the share of images that the own classifier takes for the classes `asked`, or why there is none.

  Args:
    asked: class of each image.
    opened: the networks; the classifier is among them, or among those that are missing.
    seen: by seed, what each network saw in the images.
    real: of how many real images its floor is, the classifier's own accuracy.
  """
  name, network = measures.CLASS_ACCURACY, measures.CLASSIFIER
  if network in opened.missing:
    return {name: Figure(missing=opened.missing[network])}
  logits = [each[network]['logits'] for each in seen]
  if not all(np.isfinite(each).all() for each in logits):
    return {name: Figure(missing=f'what {network} sees in the images is not finite')}
  figure = measures.over_seeds([{name: measures.class_accuracy(each, asked)} for each in logits])[name]
  return {name: dataclasses.replace(figure, floor=opened.features[network].accuracy, floor_n=real)}


def classes_asked(trained: Trained, count: int) -> np.ndarray | None:
  """Returns the class that each of the first samples is asked to be of; None where it is asked for none."""
  asked = trained.class_source.classes_of(np.arange(count))
  reader = trained.caption_stage
  if asked is not None or reader is None or reader.config[reader.stage].sample.captions:
    return asked
  source = trained.eval_source
  if not source.num_classes:
    return None
  told = min(len(trained.captions), len(source))  # the captions of the first images, in turn
  return source.read(np.arange(told))[sources.LABEL][np.arange(count) % told]
