"""Figures of vectors of a CLIP stage: of a prior that draws them, and of a decoder that is given them.

Of a prior, over captions and images of the evaluation split; on the data set `shapes` captions that tell all
(`clip_own` is another stage's cosine, and no CLIP score):

cosine_of_image         mean cosine of what is drawn of a caption and the vector of its image
cosine_of_caption       the same of the caption's own vector: what there is without a prior
cosine_to_caption       of what is drawn and the caption's vector
recall_<k>              share of captions whose drawn vector has a right image among its k nearest, of 256
recall_<k>_captions     the same of the captions' own vectors

Of a decoder, on the data set `shapes`: which attributes of the image, or of the caption, its samples show
when they are given the image's vector, a prior's, or the caption's in its place, which is no vector of an
image (the ablation of arXiv:2204.06125, section 5.1, where an FID is 7.99 with the prior and 16.55 without).
A decoder that was trained on captions' vectors is given these alone. Captions have no words in them there,
where training dropped some.
"""

from typing import Any

import numpy as np

from vaediff.data import oracle, shapes, sources, words
from vaediff.evaluation.compositions import row_of
from vaediff.evaluation.measures import Figure
from vaediff.evaluation.retrieval import recalls
from vaediff.experiments.embedding_prior import EmbeddingPrior
from vaediff.run import clips, draw, log, scoring
from vaediff.run.draw import HostArrays
from vaediff.run.trained import Trained

OF_IMAGES, OF_PRIOR = "images' vectors", "the prior's vectors"
OF_CAPTIONS = "captions' vectors in their place"
"""The sets of samples of a decoder of vectors of images."""
TRAINED_ON_CAPTIONS = "captions' vectors"
"""The one set of a decoder that was trained on vectors of captions."""


def figures(trained: Trained) -> dict[str, Figure]:
  """Returns the figures of a prior of vectors; {} of other stages, or where none are wanted."""
  count = trained.config.evaluate.num_captions
  if not (isinstance(trained.experiment, EmbeddingPrior) and count):
    return {}
  image, tokens, kinds = examples(trained, count)
  log.say(f'drawing the vectors of {len(image)} captions')
  scorer = scoring.Scorer(clips.open_clip(trained))
  drawn, seen, told = vectors(trained, tokens), scorer.images(image), scorer.texts(tokens)
  cosines = {
    'cosine_of_image': np.sum(drawn * seen, axis=1),
    'cosine_of_caption': np.sum(told * seen, axis=1),
    'cosine_to_caption': np.sum(drawn * told, axis=1),
  }
  found = {name: Figure(value=float(each.mean()), n=len(each)) for name, each in cosines.items()}
  for suffix, asked in (('', drawn), ('_captions', told)):
    known = recalls(asked, seen, kinds)
    found |= {f'{name}{suffix}': x for name, x in known.items() if not name.endswith('_images')}
  return found


def examples(trained: Trained, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns images, captions as ids, and what makes images and captions right for each other, row by row."""
  data = trained.config.data
  if not shapes.is_named(data):
    rows = trained.eval_source.read(np.arange(min(count, len(trained.eval_source))))
    return rows[sources.IMAGE], rows[words.TOKENS], rows[words.TOKENS]
  scenes = scenes_of(trained, count)
  image = np.stack([shapes.render(scene, data.image_size) for scene in scenes])
  tokens = trained.caption_inputs([scene.caption_full for scene in scenes])[words.TOKENS]
  return image, tokens, np.array([scene.attributes for scene in scenes], np.int32)


def scenes_of(trained: Trained, count: int) -> list[shapes.Scene]:
  """Returns the first scenes of the split `test`."""
  return [shapes.scene('test', index, mini=shapes.is_mini(trained.config.data)) for index in range(count)]


def vectors(prior: Trained, tokens: np.ndarray) -> np.ndarray:
  """Returns what a prior draws of captions, row by row."""
  size, parts = min(prior.settings.batch_size, len(tokens)), []
  for indices, num_real in draw.padded_batches(len(tokens), size):
    drawn = prior.draw(indices, {words.TOKENS: tokens[indices]}, handed=True)
    parts.append(drawn[clips.EMBEDDING][:num_real])
  return np.concatenate(parts)


def decoder_rows(trained: Trained) -> list[dict[str, Any]]:
  """Returns a row for each kind of vectors that a decoder is given; [] of other stages, or of other data."""
  data, count = trained.config.data, trained.config.evaluate.num_captions
  wanted = clips.reads_vectors(trained) and trained.experiment.draws_images
  if not (wanted and shapes.is_named(data) and count):
    return []
  scenes, clip = scenes_of(trained, count), clips.open_clip(trained)
  asked = np.array([scene.attributes for scene in scenes], np.int32)
  captions, scorer = [scene.caption_full for scene in scenes], scoring.Scorer(clip)
  tokens = clip.caption_inputs(captions)[words.TOKENS]
  image = np.stack([shapes.render(scene, data.image_size) for scene in scenes])
  if not clips.sees_vectors(trained):
    return [decoded(trained, TRAINED_ON_CAPTIONS, asked, scorer.texts(tokens))]
  given = {OF_IMAGES: scorer.images(image)}
  for source in trained.experiment.makers:
    if source.feeds == clips.EMBEDDING and trained.has_maker(source):
      given[OF_PRIOR] = vectors(trained.maker(source), tokens)
  given[OF_CAPTIONS] = scorer.texts(tokens)
  return [decoded(trained, title, asked, each) for title, each in given.items()]


def decoded(trained: Trained, title: str, asked: np.ndarray, given: np.ndarray) -> dict[str, Any]:
  """Returns the row of samples that are given vectors, row by row of what they should show."""
  log.say(f'drawing {len(given)} samples of {title}')
  whole: HostArrays = {clips.EMBEDDING: given, **clips.no_words(trained, len(given))}
  image = draw.own_image(trained.draw_all(whole))
  reader = oracle.Oracle(image.shape[1], mini=shapes.is_mini(trained.config.data))
  return row_of(title, asked, reader.read(image))
