import numpy as np
import pytest
from ml_collections import ConfigDict
from some_slow import some_slow

from vaediff.data import oracle, shapes, sources
from vaediff.evaluation import compositions, networks, report
from vaediff.experiments.base import Experiment
from vaediff.run import trained as opened_stages

COUNT = 60


class Stage(opened_stages.Trained):
  """Draws what it is told, as `wrong` leaves it."""

  draws_alone, caption_stage, eval_source, experiment = True, None, None, Experiment

  def __init__(self, name='shapes/16', wrong=lambda index, attributes: attributes, told=True):
    data = {'source': 'tfds', 'name': name, 'caption_feature': 'caption'}
    self.config = ConfigDict({'data': data, 'evaluate': {'num_captions': COUNT}})
    self.texts = []
    self.caption_stage, self._wrong, mini = self if told else None, wrong, name.endswith('mini')
    scenes = [shapes.scene('test', i, mini=mini) for i in range(20)]
    self.eval_source = sources.ArraySource(
      images=shapes.images('test', range(20), 16, mini=mini), labels=np.zeros(20, np.int32), label_names=(),
      num_classes=6, captions=tuple(scene.caption for scene in scenes),
    )  # fmt: skip

  def caption_inputs(self, texts):
    self.texts.append(list(texts))
    return {'texts': texts}

  def draw_all(self, given):
    images = []
    for index, text in enumerate(given['texts']):
      attributes = tuple(self._wrong(index, shapes.told(text).tolist()))
      images.append(shapes.render(shapes.Scene(attributes=attributes), 16))
    return {'x0_vae': np.zeros_like(np.stack(images)), 'x0': np.stack(images)}

  def as_drawn(self, image):
    return image


class Classifier(networks.FeatureNetwork):
  """Is wrong about the background of the first image alone."""

  def __init__(self, name):
    self._reader = oracle.Oracle(16, mini=name.endswith('mini'))

  def __call__(self, image):
    found = self._reader.read(image).attributes.copy()
    found[0, 4] += 1
    return {'attributes': found}


def opened(**features):
  return networks.Networks(features=features, lpips=None, missing={})


def values(row):
  return {name: figure.value for name, figure in row.items() if not isinstance(figure, str | int)}


@pytest.mark.parametrize('name', some_slow(['shapes/16', 'shapes/mini'], 'shapes/mini'))
def test_samples_that_show_what_is_asked(name):
  stage = Stage(name)
  rows = compositions.composition_rows(stage, opened(classifier=Classifier(name)))
  scenes = [shapes.scene('test', i, mini='mini' in name) for i in range(COUNT)]
  assert stage.texts[0] == [scene.caption_full for scene in scenes]
  assert stage.texts[1] == [scene.reordered('caption') for scene in scenes]
  assert [row['set'] for row in rows] == [
    compositions.TEST,
    compositions.REORDERED,
    compositions.HELD_OUT,
    compositions.OTHERS,
    compositions.DATA,
  ]
  assert [row['N'] for row in rows] == [COUNT, COUNT, COUNT, COUNT, 20]
  for row in (*rows[:3], rows[4]):
    assert values(row)['oracles_agree'] == 1 - 1 / row['N']
    assert {value for figure, value in values(row).items() if figure != 'oracles_agree'} == {1.0}
  chance = values(rows[3])
  assert chance['valid'] == 1 and chance['accuracy_joint'] < 0.1
  numbers = [len(set(column)) for column in np.array([shapes.scene('test', i, mini='mini' in name).attributes
                                                      for i in range(COUNT)]).T]  # fmt: skip
  for attribute, number in zip(shapes.ATTRIBUTES, numbers, strict=True):
    # of one-hot draws, within four deviations
    spread = 4 * np.sqrt((1 - 1 / number) / number / COUNT)
    assert abs(chance[f'accuracy_{attribute}'] - 1 / number) <= spread
  assert 'compositions held out' in report.table(report.transpose(rows, 'set'))


def test_one_attribute_that_is_ignored_costs_itself_and_the_joint():
  def wrong(index, attributes):
    return [*attributes[:1], (attributes[1] + (index < 15)) % 4, *attributes[2:]]

  found = values(compositions.composition_rows(Stage('shapes/mini', wrong), opened())[0])
  assert found['accuracy_colour'] == found['accuracy_joint'] == pytest.approx(1 - 15 / COUNT)
  assert found['accuracy_shape'] == found['accuracy_background'] == 1


def test_one_caption_has_no_other():
  stage = Stage('shapes/mini')
  stage.config.evaluate.num_captions = 1
  rows = {row['set']: row for row in compositions.composition_rows(stage, opened())}
  others, own = rows[compositions.OTHERS], rows[compositions.TEST]
  names = [*(f'accuracy_{name}' for name in shapes.ATTRIBUTES), 'accuracy_joint']
  assert {others[name].missing for name in names} == {compositions.NO_OTHER}
  assert others['valid'].value == own['accuracy_joint'].value == 1


def test_what_captions_do_not_tell_is_not_counted():
  asked = np.array([[1, -1, 0, 0, 0], [2, -1, 0, 0, 0]], np.int32)
  attributes = np.array([[1, 3, 0, 0, 0], [2, 5, 1, 0, 0]], np.int32)
  reading = oracle.Reading(attributes=attributes, rmse=np.array([0.02, 0.2], np.float32))
  row = compositions.row_of('some', asked, reading)
  assert row['accuracy_colour'].value is None and row['accuracy_colour'].missing == 'no caption asks for it'
  assert (row['accuracy_size'].value, row['accuracy_joint'].value, row['valid'].value) == (0.5, 0.5, 0.5)


def test_other_data_and_stages_have_no_such_rows():
  assert compositions.composition_rows(Stage('noto_emoji'), opened()) == []
  assert compositions.composition_rows(Stage(told=False), opened()) == []
  stage = Stage()
  stage.config.evaluate.num_captions = 0
  assert compositions.composition_rows(stage, opened()) == []
  stage.config.update({'evaluate': {'num_captions': 5}, 'data': {'source': 'synthetic'}})
  assert compositions.composition_rows(stage, opened()) == []
