"""What choices come to, and what is between two ends."""

import numpy as np
import pytest

from vaediff.modes import explore_wishes as wishes
from vaediff.modes.explore_wishes import Choice, End, Shown, Wish
from vaediff.run.trained import Trained


def test_a_wish_is_not_touched_by_later_choices():
  choice = Choice(stage='refiner')
  choice.amounts['a'], choice.chosen['label'] = 1.0, 3
  choice.seed(0, 'z', 5)
  before = choice.wish()
  choice.amounts['a'], choice.chosen['label'] = 2.0, 4
  choice.seed(0, 'z', 6)
  choice.replaced.add('x')
  assert (before.amounts, before.chosen, before.replaced) == ({'a': 1.0}, {'label': 3}, ())
  assert before.ends[0].seeds == {'z': 5} and choice.wish().ends[0].seeds == {'z': 6}
  assert choice.ends[1].seeds == {}  # each end has its own


@pytest.mark.parametrize(
  ('shape', 'has_two', 'weights', 'ends'),
  [
    ('one', False, [0.25], 1),
    ('one', True, [0.25], 2),
    ('four', True, [0.25] * 4, 2),
    ('nine', False, [0.25] * 9, 1),
    ('row', True, [0, 0.25, 0.5, 0.75, 1], 2),
    ('row', False, [0.25], 1),
  ],
)
def test_how_many_pictures(shape, has_two, weights, ends):
  wish = Choice(stage='s', shape=shape, has_two=has_two, weight=0.25, num_points=5).wish()
  assert list(wish.weights) == weights and len(wish.ends) == ends
  assert wish.varies == (shape in ('four', 'nine'))


def test_equal_images_are_one_end():
  image = np.zeros((2, 2, 1), np.uint8)
  one, same = (End(kind='upload', image=image.copy(), seeds={'z': k}) for k in range(2))
  assert one.key == same.key != End(kind='upload', image=image + 1).key
  assert End(kind='data', index=1).key != End(kind='data', index=2).key


def test_between_two_ends_lie_noise_on_a_circle_codes_on_a_line_and_the_nearer_number():
  rng = np.random.default_rng(0)
  draw = lambda: {
    'noise': rng.standard_normal((3, 40, 40)).astype(np.float32),
    'z': rng.standard_normal((3, 5)).astype(np.float32),
    'label': rng.integers(0, 10, 3).astype(np.int32),
  }
  a, b = draw(), {**draw(), 'only here': np.zeros((3, 1))}
  found = wishes.between(a, b, (0.0, 0.25, 1.0))
  assert set(found) == {'noise', 'z', 'label'}
  np.testing.assert_allclose(found['z'][1], 0.75 * a['z'][1] + 0.25 * b['z'][1], rtol=1e-5)
  np.testing.assert_allclose(found['noise'][0], a['noise'][0], atol=1e-6)
  np.testing.assert_allclose(found['noise'][2], b['noise'][2], atol=1e-6)
  assert found['noise'][1].std() == pytest.approx(1, abs=0.05)  # on a line it would be 0.79
  assert found['label'].tolist() == [a['label'][0], a['label'][1], b['label'][2]]
  assert found['z'].dtype == np.float32


def test_small_pictures_are_enlarged_by_repeating():
  image = np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1)
  large = wishes.picture(image, least=10)
  np.testing.assert_array_equal(large[..., 0], np.kron(image[0, ..., 0], np.ones((5, 5), np.uint8)))
  assert wishes.picture(np.zeros((1, 500, 500, 3), np.uint8)).shape == (500, 500, 3)
  assert wishes.picture(np.zeros((9, 8, 8, 1), np.uint8)).shape == (3 * 130 + 2, 3 * 130 + 2, 1)
  row = wishes.picture(np.zeros((9, 8, 8, 1), np.uint8), is_row=True)
  assert row.shape == (100, 9 * 98 + 2, 1)


def test_the_file_has_all_that_is_shown():
  ones = {'a': np.zeros((3, 8, 8, 1), np.uint8), 'b': np.full((3, 8, 8, 1), 9, np.uint8)}
  shown = lambda images, weights: Shown(
    images=images, titles={}, what='', seconds=0.0, is_new=False, is_quick=False,
    wish=Wish(stage='s', weights=weights), program=Trained.__new__(Trained),
  )  # fmt: skip
  row = wishes.whole_picture(shown(ones, (0.0, 0.5, 1.0)))
  single = {name: value[:1] for name, value in ones.items()}
  beside = wishes.whole_picture(shown({'other': np.zeros((1, 4, 4, 1), np.uint8), **single}, (0.0,)))
  assert row.shape[0] == 2 * wishes.picture(ones['a'], is_row=True).shape[0]
  assert beside.shape == (384, 768, 1) and beside[0, 0, 0] == 0 and beside[0, -1, 0] == 9
