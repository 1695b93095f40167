"""Rows of samples that follow control images: identical ones, none, others, and what captions ask for."""

import dataclasses
import functools
import types

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from vaediff.conditions.control import Control
from vaediff.data import pixels, shapes, sources, words
from vaediff.evaluation import controls
from vaediff.experiments.base import Experiment
from vaediff.run import trained as opened_stages
from vaediff.spaces.pixels import Pixels

COUNT, SIZE = 12, 16
CONTROL = Control(
  kind='edges', image_shape=(SIZE, SIZE, 3), space=Pixels(shape=(SIZE, SIZE, 3)), least=0.06, factor=4
)


class Following(Experiment):
  """Borrows edges, and can say how far images follow them."""

  borrowed = CONTROL.borrowed
  networks = {}
  conditions = types.SimpleNamespace(each=())
  init = train_step = eval_step = lambda self: None

  def followed(self, image, hint):
    return CONTROL.followed(image, hint)


@functools.cache
def scenes():
  """The images that are drawn, with their captions."""
  return sources.ArraySource(
    images=shapes.images('test', range(COUNT), SIZE, mini=True), labels=np.zeros(COUNT, np.int32),
    label_names=(), num_classes=3,
    captions=tuple(shapes.scene('test', i, mini=True).caption for i in range(COUNT)),
  )  # fmt: skip


class Stage(opened_stages.Trained):
  """Draws the very image whose control is given; at strength 0 a grey one."""

  draws_alone, caption_stage, eval_source, experiment = True, None, None, None
  settings = ConfigDict({'rerank': {'stage': 'clip', 'candidates': 4}})

  def __init__(self, name='shapes/mini', experiment=None, strength=1.0):
    self.config = ConfigDict({'data': {'source': 'tfds', 'name': name}, 'evaluate': {'num_controls': COUNT}})
    self.experiment, self.strength = experiment or Following(), strength
    self.caption_stage = self if shapes.is_named(self.config.data) else None
    self.eval_source = scenes()

  captions = property(lambda self: self.eval_source.captions)

  def observe(self, image, label, key=None):
    seen = CONTROL.observe({}, {}, pixels.to_unit_range(jnp.asarray(image)), None)
    return {**{name: np.asarray(value) for name, value in seen.items()}, 'z': np.zeros((len(image), 2))}

  def caption_inputs(self, captions):
    assert captions == [''] * COUNT
    return {words.TOKENS: np.full((COUNT, 4), words.EOS)}

  def draw_all(self, given):
    assert set(given) in ({'control'}, {'control', words.TOKENS})
    image = self.eval_source.images
    if words.TOKENS in given:
      assert not self.settings.rerank.stage
      image = 255 - image  # of the same edges, other colours
    grey = np.full_like(image, 250 if words.TOKENS in given else 128)
    return {'control': image, 'x0': image if self.strength else grey}

  def with_settings(self, strength=None, controls=(), rerank=None):
    assert controls == ()
    other = Stage(self.config.data.name, self.experiment, self.strength if strength is None else strength)
    other.settings = self.settings.copy_and_resolve_references()
    other.settings.rerank.update(rerank or {})
    return other

  def as_drawn(self, image):
    return image


def values(row):
  return {name: figure.value for name, figure in row.items() if not isinstance(figure, str | int)}


def test_rows_of_samples_with_and_without_their_control():
  rows = controls.control_rows(Stage())
  names = [controls.SAMPLES, controls.ALONE, controls.OTHERS, controls.DATA]
  assert [row['set'] for row in rows] == names and {row['N'] for row in rows} == {COUNT}
  own, alone, others, data = map(values, rows)
  for row in (own, data):
    assert row['edge_f1'] == row['edge_precision'] == row['edge_recall'] == pytest.approx(1)
    assert row['accuracy_colour'] == row['valid'] == 1
  assert alone['edge_f1'] == alone['edge_recall'] == 0 and alone['accuracy_colour'] < 1
  assert 0.05 < others['edge_f1'] < 0.6 and others['accuracy_colour'] == 1


def test_one_image_is_compared_with_no_other_control():
  stage = Stage()
  stage.eval_source = dataclasses.replace(
    stage.eval_source, images=stage.eval_source.images[:1], labels=np.zeros(1, np.int32)
  )
  stage.with_settings = lambda **_: stage
  _, _, others, _ = controls.control_rows(stage)
  assert others['N'] == 1 and others['edge_f1'].missing == controls.NO_OTHER
  assert others['accuracy_colour'].value == 1  # that is of its own caption


def reading(dropout):
  experiment = Following()
  text = types.SimpleNamespace(inputs={words.TOKENS: None}, dropout=dropout)
  experiment.conditions = types.SimpleNamespace(each=(text,))
  return Stage(experiment=experiment)


def test_where_captions_were_dropped_the_control_alone_and_neither_are_rows_too():
  rows = controls.control_rows(reading(0.5))
  without = [controls.WORDLESS, controls.NEITHER]
  names = [controls.SAMPLES, controls.ALONE, *without, controls.OTHERS, controls.DATA]
  assert [row['set'] for row in rows] == names
  own, alone, wordless, neither, _, _ = map(values, rows)
  assert own['edge_f1'] == wordless['edge_f1'] == pytest.approx(1) and neither['edge_f1'] == 0
  assert own['accuracy_background'] == 1 and wordless['accuracy_background'] == 0  # black for white
  assert neither['accuracy_background'] != alone['accuracy_background']  # a lighter grey


@pytest.mark.slow
def test_where_none_was_dropped_there_are_no_such_rows():
  titles = [row['set'] for row in controls.control_rows(reading(0.0))]
  assert titles == [controls.SAMPLES, controls.ALONE, controls.OTHERS, controls.DATA]


def test_other_data_have_no_captions_to_read():
  rows = controls.control_rows(Stage('noto_emoji'))
  assert set(values(rows[0])) == {'edge_f1', 'edge_precision', 'edge_recall'}


def test_a_stage_that_follows_nothing_has_no_rows():
  class Other(Following):
    borrowed = ()

  assert controls.control_rows(Stage(experiment=Other())) == []
  stage = Stage()
  stage.config.evaluate.num_controls = 0
  assert controls.control_rows(stage) == []
