import numpy as np
import pytest
from PIL import Image

from vaediff.data import resize
from vaediff.errors import UserError


def ramp(height, width, channels=1):
  return np.arange(height * width * channels, dtype=np.uint8).reshape(height, width, channels)


def test_center_crop_by_hand():
  image = ramp(4, 5)
  np.testing.assert_array_equal(resize.center_crop(image, 2)[..., 0], [[6, 7], [11, 12]])
  np.testing.assert_array_equal(resize.center_crop(image, 0), image[:, 0:4])


def test_pad_is_even_and_black(make_data):
  data = make_data(image_size=32, channels=1, resize='pad')
  padded = resize.fit(np.full((28, 28, 1), 9, np.uint8), data)
  assert padded.shape == (32, 32, 1)
  assert (padded[2:30, 2:30] == 9).all() and padded.sum() == 9 * 28 * 28
  odd = resize.pad(np.ones((1, 2, 1), np.uint8), 3)
  np.testing.assert_array_equal(odd[..., 0], [[0, 0, 0], [1, 1, 0], [0, 0, 0]])


def test_box_halving_is_the_mean_of_each_square(make_data):
  image = np.random.RandomState(0).randint(256, size=(8, 8, 3)).astype(np.uint8)
  small = resize.fit(image, make_data(image_size=4, resize='box'))
  means = image.reshape(4, 2, 4, 2, 3).mean((1, 3))
  assert np.abs(small - means).max() <= 1  # Rows and columns are rounded one after the other.


@pytest.mark.parametrize('name', ['bilinear', 'bicubic', 'lanczos', 'box'])
def test_shrinking_is_antialiased(make_data, name):
  board = np.indices((16, 16)).sum(0)[..., None] % 2 * 255
  small = resize.fit(board.astype(np.uint8), make_data(image_size=4, channels=1, resize=name))
  assert np.abs(small.astype(float) - 127.5).max() < 16  # Aliased, it would be black or white.


def test_bilinear_by_hand():
  """Halving, the antialiased tent has taps at -1.5, -0.5, 0.5, 1.5 with weights 1, 3, 3, 1."""
  row = np.array([0, 80, 160, 240, 80, 0, 40, 120], np.uint8)
  image = np.broadcast_to(row, (8, 8))[..., None]
  expected = [(3 * 0 + 3 * 80 + 160) / 7]
  expected += [np.dot([1, 3, 3, 1], row[i : i + 4]) / 8 for i in (1, 3)]
  expected += [(0 + 3 * 40 + 3 * 120) / 7]
  small = resize.resize(image, 4, 'bilinear')
  assert np.abs(small[..., 0] - np.array(expected)[None, :]).max() <= 0.6


def test_nearest_doubles_every_pixel():
  image = ramp(2, 2, 3)
  expected = image.repeat(2, axis=0).repeat(2, axis=1)
  np.testing.assert_array_equal(resize.resize(image, 4, 'nearest'), expected)


def test_crop_comes_before_resize(make_data):
  image = np.zeros((10, 12, 3), np.uint8)
  image[3:7, 4:8] = 200
  fitted = resize.fit(image, make_data(crop='center', crop_size=4, resize='bicubic'))
  assert fitted.shape == (8, 8, 3) and (fitted == 200).all()


@pytest.mark.parametrize('name', list(resize.FILTERS))
def test_squash_resizes_both_sides_by_the_filter(make_data, name):
  image = np.random.RandomState(0).randint(256, size=(24, 16, 3)).astype(np.uint8)
  squashed = resize.fit(image, make_data(resize=f'squash_{name}'))
  expected = np.asarray(Image.fromarray(image).resize((8, 8), resize.FILTERS[name]))
  np.testing.assert_array_equal(squashed, expected)
  square = image[:16]
  np.testing.assert_array_equal(
    resize.fit(square, make_data(resize=f'squash_{name}')), resize.fit(square, make_data(resize=name))
  )


def test_squash_by_a_box_is_the_mean_of_each_part(make_data):
  image = np.random.RandomState(0).randint(256, size=(24, 16, 3)).astype(np.uint8)
  means = image.reshape(8, 3, 8, 2, 3).mean((1, 3))
  assert np.abs(resize.fit(image, make_data(resize='squash_box')) - means).max() <= 1


@pytest.mark.parametrize(
  ('shape', 'changes', 'message'),
  [
    ((8, 8, 1), {}, 'data.channels=1'),
    ((9, 9, 3), {}, "data.resize='none'"),
    ((9, 12, 3), {'resize': 'box'}, "data.crop='center', or to distort it data.resize='squash_box'"),
    ((8, 8, 4), {}, 'images have 1 or 3'),
    ((9, 9, 3), {'resize': 'pad'}, 'only enlarges'),
    ((9, 9, 3), {'crop': 'center', 'crop_size': 10}, 'at most 9'),
  ],
)
def test_what_does_not_fit_says_what_to_set(make_data, shape, changes, message):
  with pytest.raises(UserError, match=message):
    resize.fit(np.zeros(shape, np.uint8), make_data(**changes))


def test_transparency_is_white():
  image = Image.new('RGBA', (1, 2), (255, 0, 0, 255))
  image.putpixel((0, 1), (0, 0, 0, 0))
  np.testing.assert_array_equal(np.asarray(resize.on_white(image))[:, 0], [[255, 0, 0], [255, 255, 255]])
