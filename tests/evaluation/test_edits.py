"""What a strip of an edit shows, read out of images of shapes that are drawn for it."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from vaediff.data import shapes
from vaediff.errors import UserError
from vaediff.evaluation import edits

DATA = ConfigDict({'source': 'tfds', 'name': 'shapes/mini'})
PICTURE = (0, 2, 2, 0, 2)
"""A large yellow circle at the top left on white."""


def drawn(*attributes):
  return shapes.render(shapes.Scene(attributes=attributes), 16)


def strip_of(*compositions):
  return np.stack([drawn(*one) for one in compositions])


def asked(caption='a large red circle at the top left on a white background'):
  return edits.asked_for(DATA, drawn(*PICTURE), caption)


def test_a_strip_that_reaches_what_is_asked_and_then_loses_the_rest():
  strip = strip_of(PICTURE, PICTURE, (0, 0, 2, 0, 2), (0, 0, 2, 6, 0))
  found = edits.edited((0, 0.4, 0.8, 1.2), strip, strip[3], strip[0], asked())
  assert found.changed == ('colour',) and found.reached == (0, 0, 1, 1) and found.kept == (4, 4, 4, 2)
  assert found.done == (False, False, True, False)
  assert found.rmse[:2] == (0, 0) and found.rmse_before == found.rmse[3] > found.rmse[2] > 0.05
  rows = edits.rows_of(found)
  assert [row['reached'] for row in rows] == ['0 of 1', '0 of 1', '1 of 1', '1 of 1']
  assert rows[3]['kept'] == '2 of 4' and rows[3]['shows'].startswith('a large red circle at the bottom left')


def test_the_root_mean_square_is_of_pixels_between_0_and_1():
  black, white = np.zeros((1, 4, 4, 3), np.uint8), np.full((1, 4, 4, 3), 255, np.uint8)
  np.testing.assert_array_equal(edits.rmse(np.concatenate([white, black]), black), [1, 0])
  half = black.copy()
  half[:, :2] = 51
  np.testing.assert_allclose(edits.rmse(half, black), 0.2 * np.sqrt(0.5))


def test_without_an_oracle_there_is_the_difference_alone():
  other = ConfigDict({'source': 'idx', 'name': 'digits'})
  assert edits.asked_for(other, drawn(*PICTURE), 'a seven') is None
  strip = strip_of(PICTURE, (0, 0, 2, 0, 2))
  found = edits.edited((0, 1), strip, strip[0], strip[0], None)
  assert set(edits.rows_of(found)[0]) == {'eta', 'rmse'} and found.done == ()
  with pytest.raises(UserError, match='no caption of the data set shapes'):
    asked('a seven')


def test_the_summary_is_over_edits():
  good = edits.edited((0, 1), strip_of(PICTURE, (0, 0, 2, 0, 2)), drawn(*PICTURE), drawn(*PICTURE), asked())
  bad = edits.edited((0, 1), strip_of(PICTURE, (1, 0, 2, 0, 2)), drawn(*PICTURE), drawn(*PICTURE), asked())
  rows, figures = edits.summary([good, bad, bad, good])
  assert [row['reached'] for row in rows] == [0, 1] and [row['all kept'] for row in rows] == [1, 0.5]
  assert [row['both'] for row in rows] == [0, 0.5] and figures['edited'] == 0.5
  assert figures['rmse_first'] == figures['rmse_before'] == 0 and rows[1]['rmse'] > 0


@pytest.mark.parametrize('mini', [True, False])
def test_neighbours_have_one_attribute_changed_to_one_of_training(mini):
  choices, seen = shapes.MINI if mini else shapes.ALL, set()
  for number in range(60):
    own = shapes.scene('test', number, mini=mini).attributes
    other = edits.with_one_changed(own, number, mini=mini)
    changed = [place for place in range(5) if own[place] != other[place]]
    assert len(changed) == 1 and not shapes.is_held_out(other)
    assert all(value in names for value, names in zip(other, choices, strict=True))
    assert other == edits.with_one_changed(own, number, mini=mini)
    seen.add(changed[0])
  assert seen == ({0, 1, 3, 4} if mini else set(range(5)))
