"""Pictures and interpolation against values worked out by hand."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vaediff.data import pixels
from vaediff.evaluation import quality
from vaediff.modes.interpolate import lerp, slerp
from vaediff.run import images
from vaediff.storage import files


def test_grid_places_images_row_by_row_and_enlarges_small_ones():
  value = np.stack([np.full((64, 64, 1), 10 * k, np.uint8) for k in range(5)])
  picture = images.grid(value, 3)
  assert picture.shape == (2 * 66 + 2, 3 * 66 + 2, 1)
  assert picture[10, 10 + 66 * 2, 0] == 20 and picture[10 + 66, 10, 0] == 30
  assert picture[0, 0, 0] == 255  # the gap
  small = images.grid(np.zeros((1, 8, 8, 3), np.uint8), 1)
  assert small.shape == (68, 68, 3)


def test_side_by_side_takes_turns():
  a, b = np.zeros((3, 2, 2, 1)), np.ones((3, 2, 2, 1))
  assert images.side_by_side(a, b)[:, 0, 0, 0].tolist() == [0, 1, 0, 1, 0, 1]


def test_texts_stand_beside_the_rows_of_a_grid_that_stays_as_it_is():
  picture = images.grid(np.full((6, 8, 8, 3), 128, np.uint8), 3)
  height, width, _ = picture.shape
  labelled = images.beside_rows(picture, ['first row\nfrom', ''], ['', 'a long text to the right'])
  assert labelled.shape[0] == height and labelled.shape[2] == 3
  dark = (labelled < 100).any(axis=2)
  places = range(labelled.shape[1] - width)
  (left,) = (x for x in places if np.array_equal(labelled[:, x : x + width], picture))
  half = height // 2
  assert dark[:half, :left].sum() > 30 and not dark[half:, :left].any()
  assert dark[half:, left + width :].sum() > 30 and not dark[:half, left + width :].any()
  assert not dark[:, -4:].any()  # no text is cut off


def test_groups_are_rows_of_images_that_take_turns():
  assert images.in_groups(7, 3).tolist() == [0, 3, 1, 4, 2, 5]  # the last, of a turn cut short, is left out
  assert images.in_groups(6, 3).tolist() == [0, 3, 1, 4, 2, 5]
  assert images.in_groups(3, 3).tolist() == [0, 1, 2]
  order = images.in_groups(40, 10)
  assert sorted(order.tolist()) == list(range(40))
  assert (order.reshape(10, 4) % 10 == np.arange(10)[:, None]).all()  # a row is one kind, ascending
  assert (np.diff(order.reshape(10, 4)) == 10).all()


@pytest.mark.parametrize('num_groups', [0, 5, 1])
def test_without_groups_or_a_whole_turn_of_them_images_stay_as_they_are(num_groups):
  assert images.in_groups(4, num_groups).tolist() == [0, 1, 2, 3]


def test_bytes_are_rounded_not_cut():
  value = jnp.array([-1.0, 1.0, 0.0, 2.0, -1 + 1.6 / 127.5])[:, None, None, None]
  assert np.asarray(pixels.to_bytes(value)).ravel().tolist() == [0, 255, 128, 255, 2]


def test_files_appear_whole(tmp_path):
  files.write_npz(tmp_path / 'a.npz', {'x0': np.arange(4)})
  images.write_png(tmp_path / 'deep' / 'a.png', np.zeros((4, 4, 3), np.uint8))
  assert np.load(tmp_path / 'a.npz')['x0'].tolist() == [0, 1, 2, 3]
  left = {path.name for path in tmp_path.rglob('*') if path.is_file()}
  assert left == {'a.npz', 'a.png'}


@pytest.mark.parametrize('channels', [1, 3])
def test_a_picture_says_what_it_was_made_of(tmp_path, channels):
  made_of = {'network vae': 'ab12', 'seed': '3', 'name': 'é ☃'}
  picture = np.arange(16 * channels, dtype=np.uint8).reshape(4, 4, channels)
  images.write_png(tmp_path / 'a.png', picture, made_of)
  assert images.png(picture, made_of) == (tmp_path / 'a.png').read_bytes()
  images.write_png(tmp_path / 'b.png', picture)
  for name, text in (('a.png', {'vaediff': made_of}), ('b.png', {})):
    with Image.open(tmp_path / name) as stored:
      assert {key: json.loads(value) for key, value in stored.text.items()} == text
      assert np.array_equal(np.asarray(stored).reshape(picture.shape), picture)


def test_lerp_and_slerp_meet_their_ends_and_slerp_keeps_the_norm():
  rng, weights = np.random.default_rng(0), np.linspace(0, 1, 5)
  a, b = rng.standard_normal((2, 4000))
  for path in (lerp(a, b, weights), slerp(a, b, weights)):
    np.testing.assert_allclose(path[0], a, atol=1e-9)
    np.testing.assert_allclose(path[-1], b, atol=1e-9)
  assert lerp(a, b, weights)[2].std() == pytest.approx(0.5**0.5, abs=0.03)  # why noise is not lerped
  assert slerp(a, b, weights)[2].std() == pytest.approx(1.0, abs=0.03)
  quarter = slerp(np.array([1.0, 0.0]), np.array([0.0, 1.0]), weights)
  np.testing.assert_allclose(quarter[2], [0.5**0.5, 0.5**0.5])


def test_figures():
  a, b = np.zeros((1, 2, 2, 1), np.uint8), np.full((1, 2, 2, 1), 51, np.uint8)
  assert quality.mse(a, b) == pytest.approx(0.04)
  assert quality.psnr(a, b) == pytest.approx(13.9794, abs=1e-4)
  assert quality.psnr(a, a) == float('inf')


def test_captions_stand_above_their_images_and_once_above_a_row_of_one():
  value = np.full((4, 128, 128, 3), 128, np.uint8)
  each = images.captioned(
    value, 2, ['a red ring', 'a blue cross', 'a circle', 'a long caption of many words']
  )
  row = images.captioned(value, 2, ['a red ring'] * 2 + ['a circle'] * 2)
  assert each.shape[1:] == row.shape[1:] == (2 * 130 + 2, 3)
  dark = (each < 100).any(axis=2)
  left, right = dark[:, :131], dark[:, 131:]
  assert left.any() and right.any()
  dark = (row < 100).any(axis=2)
  assert dark[:, :131].any() and not dark[:, 131:].any()
  for picture in (each, row):  # all images are there, as they are
    assert (picture == 128).all(axis=2).sum() >= 4 * 128 * 128
  assert len(each) > len(row) > 2 * 130
  small = images.captioned(np.zeros((1, 8, 8, 1), np.uint8), 1, ['a'])
  assert small.shape[1:] == (132, 1)  # enlarged, so that words fit
