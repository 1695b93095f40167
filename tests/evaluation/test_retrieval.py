"""Recall of vectors that are known, and of scenes by an encoder that sees everything."""

import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from vaediff.data import oracle, shapes, sources, words
from vaediff.evaluation import retrieval
from vaediff.evaluation.measures import Figure
from vaediff.run.trained import Trained

SEEN = np.eye(4)


def test_recall_of_known_vectors():
  kinds = np.arange(4)[:, None]
  told = np.array([[1, 0, 0, 0], [0.9, 0.5, 0, 0], [0, 0.6, 0.5, 0], [0, 0, 0, 1.0]])
  assert retrieval.recall(SEEN, SEEN, kinds, 1) == 1
  assert retrieval.recall(SEEN, told, kinds, 1) == 0.75  # image 1 is nearest to text 2
  assert retrieval.recall(SEEN, told, kinds, 2) == 1
  assert retrieval.recall(told, SEEN, kinds, 1) == 0.5  # text 1 is nearest to image 0, text 2 to image 1
  same = np.array([[0], [0], [1], [2]])
  assert retrieval.recall(told, SEEN, same, 1) == 0.75  # image 0 shows what text 1 says


def test_equal_vectors_find_what_chance_does():
  equal = np.ones((300, 2))
  found = retrieval.recalls(equal, equal, np.arange(300)[:, None])
  assert {name: figure.value for name, figure in found.items()} == {
    'recall_1': 1 / 256, 'recall_5': 5 / 256, 'recall_1_images': 1 / 256, 'recall_5_images': 5 / 256
  }  # fmt: skip
  assert found['recall_1'] == Figure(value=1 / 256, n=256)


class SeesAll:
  """Stands for a scorer: one-hot vectors of the attributes that an image shows, or a caption tells."""

  def __init__(self, trained):
    self._reader = oracle.Oracle(16, mini=True)

  def images(self, image):
    return self._vectors(self._reader.read(image).attributes)

  def texts(self, captions):
    return self._vectors(np.stack([shapes.told(caption) for caption in captions]))

  def _vectors(self, attributes):
    parts = [np.eye(n + 1)[column][:, :n] for n, column in zip(oracle.NUMBERS, attributes.T, strict=True)]
    return np.concatenate(parts, axis=1)


class Stage(Trained):
  """Stands for a trained stage."""

  caption_stage = None
  draws_alone = True

  def __init__(self, config, **more):
    self.config, self.experiment = ConfigDict(config), None
    vars(self).update(more)


class Vectors:
  """Stands for a scorer: images and captions are vectors themselves."""

  images = texts = staticmethod(np.asarray)

  def cosines(self, image, texts):
    return np.sum(image * texts, axis=1)


class Four:
  """Stands for four evaluation images and their captions."""

  def __len__(self):
    return 4

  def read(self, rows):
    return {sources.IMAGE: SEEN[rows], words.TOKENS: SEEN[rows]}


@pytest.mark.parametrize('batch', [1, 2, 3, 5, 8])
def test_samples_are_compared_with_captions_of_others_in_whatever_batches(batch, monkeypatch):
  monkeypatch.setattr(retrieval.scoring, 'tokens_of', lambda trained, indices, given: SEEN[indices % 4])
  stage = Stage(
    {'refiner': {'sample': {'batch_size': batch}}}, stage='refiner',
    caption_stage=types.SimpleNamespace(eval_source=Four()),
    draw=lambda indices: {'x0': SEEN[indices % 4]}, as_drawn=lambda image: image,
  )  # fmt: skip
  found = retrieval.of_samples.__wrapped__(stage, Vectors(), 4)
  assert found['clip_own'] == Figure(value=1.0, floor=1.0, floor_n=4, n=4)
  assert found['clip_own_others'] == Figure(value=0.0, n=4)
  found = retrieval.of_samples.__wrapped__(stage, Vectors(), 1)
  assert found['clip_own'].value == 1 and 'needs at least 2' in found['clip_own_others'].missing


def test_scenes_are_found_by_what_they_show(monkeypatch):
  monkeypatch.setattr(retrieval.scoring, 'Scorer', SeesAll)
  monkeypatch.setattr(retrieval, 'MOST', 256)
  data = {'source': 'tfds', 'name': 'shapes/mini', 'image_size': 16}
  found = retrieval.of_shapes(Stage({'data': data}, caption_inputs=lambda texts: {words.TOKENS: texts}))
  assert len(found) == 10 and 'recall_5_images_held_out' in found
  assert {figure.value for figure in found.values()} == {1.0}
  assert found['zero_shot_shape'].n == 256


def test_stages_without_captions_have_no_such_figures():
  for stage, captioned in (('', True), ('clip', None)):
    config = {'evaluate': {'clip': {'stage': stage}, 'num_captions': 3}}
    assert retrieval.figures(Stage(config, caption_stage=captioned)) == {}


def test_a_stage_that_cannot_score_is_said_in_the_table():
  def refused(named, field):
    raise retrieval.UserError(f'{field}: no such stage')

  config = {'evaluate': {'clip': {'stage': 'clip'}, 'num_captions': 3}}
  (figure,) = retrieval.figures(Stage(config, caption_stage=True, scorer=refused)).values()
  assert figure.value is None and figure.missing == 'evaluate.clip: no such stage'
