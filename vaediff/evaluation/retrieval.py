"""What a CLIP stage finds, and how well samples fit their captions by one.

recall_<k>              share of images whose k nearest captions, of 256, hold a right one
recall_<k>_images       share of captions whose k nearest images, of 256, hold a right one
..._held_out            the same of compositions that no training image has
zero_shot_shape         share of images whose shape is that of the nearest of 'a circle', 'a square', ...
clip_own                mean cosine of samples and their captions; its floor is that of real images
clip_own_others         the same, each with the caption of another

A caption is right where it tells the attributes of the image, on the data set `shapes`, where it tells all of
them; else where it is equal to that of the image.
"""

import numpy as np
from jaxtyping import Float, Int

from vaediff.data import shapes, sources, words
from vaediff.errors import UserError
from vaediff.evaluation.measures import Figure
from vaediff.experiments.clip import Clip
from vaediff.run import draw, log, scoring
from vaediff.run.scoring import CLIP_OWN
from vaediff.run.trained import Trained

POOL, MOST = 256, 1024
"""Images, and captions, among which one is looked for; and most that are looked for, in pools of so many."""
COUNTS = (1, 5)
"""k of recall."""
SPLITS = {'': 'test', '_held_out': 'held_out'}
FIELD = 'evaluate.clip'


def figures(trained: Trained) -> dict[str, Figure]:
  """Returns the figures of a CLIP stage, or of samples that have captions; {} of other stages.

  Where `evaluate.clip` names a stage that cannot score the samples, the table says why.
  """
  if isinstance(trained.experiment, Clip):
    return of_shapes(trained) if shapes.is_named(trained.config.data) else of_split(trained)
  settings = trained.config.evaluate
  if not (settings.clip.stage and settings.num_captions and trained.draws_alone and trained.caption_stage):
    return {}
  try:
    scorer = trained.scorer(settings.clip, FIELD)
  except UserError as error:
    return {CLIP_OWN: Figure(missing=str(error))}
  return of_samples(trained, scorer, settings.num_captions)


def of_samples(trained: Trained, scorer: scoring.Scorer, count: int) -> dict[str, Figure]:
  """Returns the mean cosine of the first samples and their captions."""
  log.say(f'drawing {count} samples to be compared with their captions')
  size, images, texts = min(trained.settings.batch_size, count), [], []
  for indices, num_real in draw.padded_batches(count, size):
    images.append(scorer.images(draw.own_image(trained.draw(indices)))[:num_real])
    texts.append(scorer.texts(scoring.tokens_of(trained, indices, {}))[:num_real])
  seen, told = np.concatenate(images), np.concatenate(texts)
  source = trained.caption_stage.eval_source
  real = source.read(np.arange(min(count, len(source))))
  floor = scorer.cosines(trained.as_drawn(real[sources.IMAGE]), scorer.texts(real[words.TOKENS]))
  mean = lambda of: float(np.sum(seen * of, axis=1).mean())
  others = Figure(missing='there is no other caption: it needs at least 2')
  if count > 1:
    others = Figure(value=mean(np.roll(told, 1, axis=0)), n=count)
  return {
    CLIP_OWN: Figure(value=mean(told), floor=float(floor.mean()), floor_n=len(floor), n=count),
    f'{CLIP_OWN}_others': others,
  }


def of_split(trained: Trained) -> dict[str, Figure]:
  """Returns recall among the first images of the evaluation split and their captions."""
  batch = trained.eval_source.read(np.arange(min(MOST, len(trained.eval_source))))
  scorer = scoring.Scorer(trained)
  seen, told = scorer.images(batch[sources.IMAGE]), scorer.texts(batch[words.TOKENS])
  return recalls(seen, told, batch[words.TOKENS])


def of_shapes(trained: Trained) -> dict[str, Figure]:
  """Returns recall among scenes and captions that tell all of them, and the accuracy of the shape alone."""
  data, scorer, found = trained.config.data, scoring.Scorer(trained), {}
  mini = shapes.is_mini(data)
  for suffix, split in SPLITS.items():
    scenes = [shapes.scene(split, index, mini=mini) for index in range(MOST)]
    attributes = np.array([scene.attributes for scene in scenes], np.int32)
    seen = scorer.images(np.stack([shapes.render(scene, data.image_size) for scene in scenes]))
    told = scorer.texts(trained.caption_inputs([scene.caption_full for scene in scenes])[words.TOKENS])
    found |= {f'{name}{suffix}': figure for name, figure in recalls(seen, told, attributes).items()}
    known = np.unique(attributes[:, 0])
    prompts = trained.caption_inputs([f'a {shapes.NAMES[0][number]}' for number in known])[words.TOKENS]
    nearest = known[np.argmax(seen @ scorer.texts(prompts).T, axis=1)]
    right = float(np.mean(nearest == attributes[:, 0]))
    found[f'zero_shot_shape{suffix}'] = Figure(value=right, n=len(scenes))
  return found


def recalls(
  seen: Float[np.ndarray, 'n d'], told: Float[np.ndarray, 'n d'], kinds: Int[np.ndarray, 'n facts']
) -> dict[str, Figure]:
  """Returns recall at each of `COUNTS`, both ways: means over pools.

  Args:
    seen: images as vectors.
    told: captions as vectors, row by row of the same.
    kinds: what they show or say: rows that are equal are right for each other.
  """
  pools = [np.arange(first, first + POOL) for first in range(0, len(seen) - POOL + 1, POOL)]
  pools = pools or [np.arange(len(seen))]
  both = {'': (seen, told), '_images': (told, seen)}
  return {
    f'recall_{k}{name}': Figure(
      value=float(np.mean([recall(one[rows], other[rows], kinds[rows], k) for rows in pools])),
      n=sum(map(len, pools)),
    )
    for name, (one, other) in both.items()
    for k in COUNTS
  }


def recall(
  asked: Float[np.ndarray, 'n d'], known: Float[np.ndarray, 'n d'], kinds: Int[np.ndarray, 'n facts'], k: int
) -> float:
  """Returns the share of rows of `asked` that have a right one among the k nearest of `known`."""
  nearest = np.argsort(-(asked @ known.T), axis=1, kind='stable')[:, :k]
  return float(np.mean((kinds[nearest] == kinds[:, None]).all(axis=-1).any(axis=1)))
