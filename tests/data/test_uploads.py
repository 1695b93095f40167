"""Files of images that a user hands over: what they become, and what is refused."""

import importlib
import io

import numpy as np
import pytest
from PIL import Image

from vaediff.data import uploads
from vaediff.errors import UserError


def file_of(array, form='PNG'):
  content = io.BytesIO()
  Image.fromarray(array).save(content, form)
  return content.getvalue()


def read(content, name='a.png', max_bytes=10**6, max_pixels=10**4, **data):
  config = importlib.import_module('configs.digits').get_config('debug').data
  config.update(data)
  return uploads.read(name, content, config, max_bytes=max_bytes, max_pixels=max_pixels)


def test_an_image_of_the_size_of_the_data_is_read_as_it_is():
  image = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
  np.testing.assert_array_equal(read(file_of(image))[..., 0], image)


def test_a_smaller_one_is_repeated_and_a_larger_one_cropped_and_averaged():
  small = np.array([[0, 255], [100, 50]], np.uint8)
  np.testing.assert_array_equal(read(file_of(small))[..., 0], np.kron(small, np.ones((4, 4), np.uint8)))
  wide = np.zeros((40, 80), np.uint8)
  wide[:, 20:60] = 200  # the central square
  np.testing.assert_allclose(read(file_of(wide)), np.full((8, 8, 1), 200), atol=1)


def test_colour_and_grey_become_what_the_data_is():
  colour = np.zeros((8, 8, 3), np.uint8)
  colour[..., 0] = 255
  assert read(file_of(colour)).shape == (8, 8, 1)
  assert (read(file_of(colour))[..., 0] == 76).all()  # luma of red
  np.testing.assert_array_equal(read(file_of(colour[..., 0]), channels=3), np.repeat(colour[..., :1], 3, -1))


@pytest.mark.parametrize(
  ('content', 'limits', 'message'),
  [
    (b'GIF89a, or so it says', {}, r'\.\./x\?\.png is no image: give a PNG'),
    (b'', {}, 'is no image'),
    (b'<svg onload="alert(1)"/>', {}, 'is no image'),
    (file_of(np.zeros((8, 8), np.uint8)), {'max_bytes': 60}, 'at most 60 are read.*max_upload_bytes'),
    (file_of(np.zeros((101, 100), np.uint8)), {}, '100 x 101 pixels; at most 10,000 .*max_upload_pixels'),
    (file_of(np.arange(3600, dtype=np.uint32).reshape(60, 60).astype(np.uint8))[:-40], {}, 'cannot be read'),
  ],
)
def test_what_is_refused_is_named(content, limits, message):
  with pytest.raises(UserError, match=message):
    read(content, '../x\x00.png', **limits)


def test_pixels_are_counted_before_they_are_unpacked(monkeypatch):
  content = file_of(np.zeros((200, 200), np.uint8))
  monkeypatch.setattr(Image.Image, 'load', lambda self: pytest.fail('it was unpacked'))
  with pytest.raises(UserError, match='200 x 200 pixels'):
    read(content)
