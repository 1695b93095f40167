"""How far samples follow the images that they were asked to follow: control images of the evaluation split.

    edge_precision, edge_recall, edge_f1   of the edges of samples and of their control (`vaediff.data.edges`)
    control_rmse                           of a control at a low resolution, pixels in [0, 1]

Samples have the captions of the same images, in turn. Beside them stand samples of the same seed without the
control; where training dropped captions, samples with the control alone and samples of neither, which are as
near to the control as any image of the set; samples compared with the control of the next image; and the
evaluation images themselves. Of the data set `shapes` each row says, too, how often the image shows what its
caption asks for (`compositions`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vaediff.data import oracle, shapes
from vaediff.evaluation import compositions
from vaediff.evaluation.measures import Figure
from vaediff.run import clips, draw, log, scoring
from vaediff.run.trained import Trained

SAMPLES = 'samples with their control'
ALONE = 'samples without it'
WORDLESS = 'samples with their control and no caption'
NEITHER = 'samples of neither'
OTHERS = 'samples with the control of the next'
DATA = 'evaluation images'
NO_OTHER = 'there is no other control: it needs at least 2 images'
ABOUT = (
  'Controls are those of the first N images of the evaluation split. '
  f'{OTHERS.capitalize()}: those of the first row, each compared with another control than its own. '
  f'{WORDLESS.capitalize()}, and {NEITHER}, where training dropped captions: compared with ones not given.'
)


def control_rows(trained: Trained) -> list[dict[str, Any]]:
  """Returns a row for each set of images; [] for a stage whose samples follow no image.

  Raises:
    UserError: as `Trained.draw`.
  """
  experiment, count = trained.experiment, trained.config.evaluate.num_controls
  if not (experiment.borrowed and count and trained.draws_alone):
    return []
  data, labels = trained.eval_images(count)
  seen = trained.observe(data, labels)
  given = {name: seen[name] for name in experiment.borrowed}
  hint = given[experiment.borrowed[0]]
  none = clips.no_words(trained, len(data))
  log.say(f'drawing {len(data)} samples that follow control images, and as many without')
  base, data = trained.with_settings(strength=0.0, controls=()), trained.as_drawn(data)
  drawn = draw.own_image(trained.draw_all(given))
  sets = [(SAMPLES, drawn, hint), (ALONE, draw.own_image(base.draw_all(given)), hint)]
  if none:
    log.say(f'drawing {len(data)} samples without captions that follow control images, and as many without')
    for title, one in ((WORDLESS, trained), (NEITHER, base)):
      one = scoring.unranked(one)  # there is no caption to rank by
      sets.append((title, draw.own_image(one.draw_all({**given, **none})), hint))
  sets.append((OTHERS, drawn, np.roll(hint, 1, axis=0)))
  rows = [row_of(trained, title, image, wanted) for title, image, wanted in sets]
  rows.append(row_of(trained, DATA, data, hint, is_data=True))
  return rows


def row_of(
  trained: Trained, title: str, image: np.ndarray, hint: np.ndarray, *, is_data: bool = False
) -> dict[str, Any]:
  """Returns the row of a set of images, uint8: how far they follow controls, and their captions."""
  followed = jax.jit(trained.experiment.followed)(jnp.float32(image) / 127.5 - 1, hint)
  figures = {name: Figure(value=float(np.mean(each))) for name, each in jax.device_get(followed).items()}
  if title == OTHERS and len(image) < 2:  # the next is its own
    figures = dict.fromkeys(figures, Figure(missing=NO_OTHER))
  return {'set': title, 'N': len(image), **figures, **told(trained, image, is_data=is_data)}


def told(trained: Trained, image: np.ndarray, *, is_data: bool) -> dict[str, Figure]:
  """Returns how often images of the data set `shapes` show what their captions say; {} of others."""
  data = trained.config.data
  if not (shapes.is_named(data) and trained.caption_stage):
    return {}
  known = trained.eval_source.captions if is_data else trained.captions
  asked = compositions.asked_by([known[i % len(known)] for i in range(len(image))])
  reading = oracle.Oracle(image.shape[1], mini=shapes.is_mini(data)).read(image)
  found = compositions.row_of('', asked, reading)
  return {name: figure for name, figure in found.items() if isinstance(figure, Figure)}
