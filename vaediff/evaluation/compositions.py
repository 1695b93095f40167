"""Whether samples show what captions ask for, on the data set `shapes`, whose images can be read exactly.

Captions that tell everything, or all that those of training can tell, are those of the split `test`, the same
in an order of words that no caption has, and those of compositions that no training image has. What is drawn
is read in closed form (`vaediff.data.oracle`).

accuracy_<attribute>    share of samples that show what was asked
accuracy_joint          ... all that was asked
valid                   share of samples that are one shape on one background at all
oracles_agree           share of samples in which the data set's own classifier sees the same five attributes
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vaediff.data import oracle, shapes, sources
from vaediff.evaluation.measures import CLASSIFIER, Figure
from vaediff.evaluation.networks import Networks
from vaediff.run import draw, log
from vaediff.run.trained import Trained

TEST, REORDERED, HELD_OUT = 'captions of test', 'in an order never read', 'compositions held out'
"""The sets of captions."""
OTHERS = 'samples of other captions'
"""What chance gives."""
NO_OTHER = 'there is no other caption: it needs at least 2'
DATA = 'evaluation images'
ABOUT = (
  'Captions tell all that those of training can tell; samples are read exactly: vaediff/data/oracle.py. '
  f'{OTHERS.capitalize()}: those of the first set, each against the caption of the next.'
)


def composition_rows(trained: Trained, opened: Networks) -> list[dict[str, Any]]:
  """Returns a row for each set of captions; [] for a stage without captions, or of other data.

  Raises:
    UserError: as `Trained.draw`.
  """
  data, count = trained.config.data, trained.config.evaluate.num_captions
  if not (shapes.is_named(data) and count and trained.draws_alone and trained.caption_stage):
    return []
  mini, rows, reader = shapes.is_mini(data), [], None
  for title in (TEST, REORDERED, HELD_OUT):
    split = 'held_out' if title == HELD_OUT else 'test'
    scenes = [shapes.scene(split, index, mini=mini) for index in range(count)]
    log.say(f'drawing {count} samples: {title}')
    texts = [scene.telling(data.caption_feature) for scene in scenes]
    other = [scene.reordered(data.caption_feature) for scene in scenes]
    given = trained.caption_inputs(other if title == REORDERED else texts)
    drawn = trained.draw_all({**given, **followed_by(trained, split, count)})
    image = draw.own_image(drawn)
    reader = reader or oracle.Oracle(image.shape[1], mini=mini)
    asked = asked_by(texts)
    reading = reader.read(image)
    rows.append(row_of(title, asked, reading) | agreement(image, reading, opened))
    if len(rows) == 1:
      chance = row_of(OTHERS, np.roll(asked, 1, axis=0), reading)
      if count < 2:  # the next is its own
        chance |= {name: Figure(missing=NO_OTHER) for name in chance if name.startswith('accuracy_')}
  real = trained.eval_source.read(np.arange(min(count, len(trained.eval_source))))[sources.IMAGE]
  told = asked_by(trained.eval_source.captions[: len(real)])
  rows.append(chance)
  image = trained.as_drawn(real)
  reading = reader.read(image)
  rows.append(row_of(DATA, told, reading) | agreement(image, reading, opened))
  return rows


def followed_by(trained: Trained, split: str, count: int) -> dict[str, np.ndarray]:
  """Returns what samples follow to show the first scenes of a split; {} where they follow nothing."""
  names = trained.experiment.borrowed
  if not names:
    return {}
  data = trained.config.data
  image = shapes.images(split, range(count), data.image_size, mini=shapes.is_mini(data))
  seen = trained.observe(image, np.zeros(count, np.int32))
  return {name: seen[name] for name in names}


def agreement(image: np.ndarray, reading: oracle.Reading, opened: Networks) -> dict[str, Figure]:
  """Returns how often the own classifier sees what is read; {} where it is not open."""
  if CLASSIFIER not in opened.features:
    return {}
  same = opened.features[CLASSIFIER](image)[oracle.ATTRIBUTES] == reading.attributes
  return {'oracles_agree': Figure(value=float(same.all(axis=1).mean()))}


def asked_by(captions: Sequence[str]) -> np.ndarray:
  """Returns what captions ask for, int32 [n, attributes]; -1 for nothing."""
  return np.stack([shapes.told(caption) for caption in captions])


def row_of(title: str, asked: np.ndarray, reading: oracle.Reading) -> dict[str, Any]:
  """Returns the row of a set of images.

  Args:
    title: of the set.
    asked: what their captions ask for, [n, attributes]; -1 for nothing.
    reading: what they show.
  """
  right = oracle.correct(asked, reading.attributes)
  figures = {
    f'accuracy_{name}': Figure(value=float(np.nanmean(column)))
    if np.isfinite(column).any()
    else Figure(missing='no caption asks for it')
    for name, column in zip(shapes.ATTRIBUTES, right.T, strict=True)
  }
  whole = (asked < 0) | (asked == reading.attributes)
  return {
    'set': title,
    'N': len(asked),
    **figures,
    'accuracy_joint': Figure(value=float(whole.all(axis=1).mean())),
    'valid': Figure(value=float(reading.valid.mean())),
  }
