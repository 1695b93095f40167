"""Control images as a condition: what they show, how they are scaled, handed over and scored."""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vaediff.conditions import control
from vaediff.conditions.base import Conditions
from vaediff.conditions.control import Control, Files
from vaediff.data import edges, pixels, shapes
from vaediff.errors import UserError
from vaediff.run import draw
from vaediff.spaces.pixels import Pixels

SHAPE = (16, 16, 3)


def keys(count):
  return jax.random.split(jax.random.key(0), count)


def make(kind='edges', **fields):
  space = Pixels(shape=fields.pop('shape', SHAPE), factor=fields.pop('small', 1))
  return Control(kind=kind, image_shape=SHAPE, space=space, least=0.06, factor=4, **fields)


def images(count=6):
  return shapes.images('test', range(count), 16)


def test_the_hint_is_in_0_to_1_where_images_are_in_minus_1_to_1():
  bytes_of = jnp.asarray(np.stack([np.zeros(SHAPE, np.uint8), np.full(SHAPE, 255, np.uint8)]))
  x = pixels.to_unit_range(bytes_of)
  assert (float(x.min()), float(x.max())) == (-1, 1)
  hint = make('low_resolution').observe({}, {}, x, None)['control']
  np.testing.assert_array_equal(hint, bytes_of / 255)
  x = pixels.to_unit_range(jnp.asarray(images()))
  seen = make().observe({}, {}, x, None)['control']
  np.testing.assert_array_equal(seen, shapes.control(images()) / 255)


def test_a_low_resolution_is_means_repeated():
  x = jnp.linspace(-1, 1, 16 * 16 * 3).reshape(1, *SHAPE)
  hint = make('low_resolution').observe({}, {}, x, None)['control']
  assert hint.shape == (1, *SHAPE)
  np.testing.assert_allclose(hint[0, 4:8, 8:12, 1], float((x[0, 4:8, 8:12, 1].mean() + 1) / 2), rtol=1e-5)


def test_a_control_is_mirrored_with_its_image():
  """It is made of the image after that was mirrored."""
  x = pixels.to_unit_range(jnp.asarray(images()))
  of = lambda x: make().observe({}, {}, x, None)['control']
  np.testing.assert_array_equal(of(x[:, :, ::-1]), of(x)[:, :, ::-1])


def test_it_enters_no_port_and_is_borrowed():
  one = make()
  assert one.ports == {} and one.seen == one.borrowed == ('control',) and one.dropout == 0
  assert one.inputs['control'].shape == (16, 16, 1) and not one.bounds_images
  assert make('low_resolution').inputs['control'].shape == SHAPE
  other = make(name='control_other')
  assert list(other.inputs) == ['control_other'] == list(other.titles)


def test_the_network_reads_one_channel_or_three_of_the_same():
  hint = jnp.float32(shapes.control(images())) / 255
  assert make().values({}, {'control': hint})['control'].shape == (6, 16, 16, 1)
  three = make(channels=3).values({}, {'control': hint})['control']
  assert three.shape == (6, 16, 16, 3) == (6, *make(channels=3).hint_shape)
  np.testing.assert_array_equal(three, np.repeat(hint, 3, axis=3))


@pytest.mark.parametrize(
  ('hint', 'message'),
  [
    (jnp.zeros((2, 8, 8, 1)), 'the control edges must be 16 x 16 x 1, as in training, got 8 x 8 x 1'),
    (jnp.zeros((2, 16, 16, 3)), 'must be 16 x 16 x 1, as in training, got 16 x 16 x 3'),
    (jnp.zeros((2, 16, 16, 1), jnp.uint8), r'must be numbers in \[0, 1\], float32, got uint8: divide'),
  ],
)
def test_another_size_channels_or_range_is_refused(hint, message):
  with pytest.raises(UserError, match=message):
    make().values({}, {'control': hint})


@pytest.mark.parametrize(('value', 'said'), [(-0.1, '-0.1 to 0'), (255.0, '0 to 255'), (np.nan, 'nan')])
def test_a_hint_that_is_not_scaled_is_refused_before_it_is_drawn_with(value, said):
  limits = Conditions((make(),)).limits
  hint = np.zeros((2, 16, 16, 1), np.float32)
  draw.check_limits({'control': hint, 'noise': hint - 9}, limits)
  hint[1, 2, 3] = value
  with pytest.raises(UserError, match=rf'control must be numbers in \[0, 1\], got {said}'):
    draw.check_limits({'control': hint}, limits)


def test_it_is_shown_as_large_as_the_sample():
  hint = jnp.float32(shapes.control(images())) / 255
  shown = make().shown({'control': hint})['control']
  assert shown.shape == (6, *SHAPE) and set(np.unique(shown)) == {-1.0, 1.0}
  small = make(shape=(8, 8, 3), small=2).shown({'control': hint})['control']
  assert small.shape == (6, 8, 8, 3)


# Files -----------------------------------------------------------------------------------------------


def written(tmp_path, name, array):
  Image.fromarray(array).save(tmp_path / name)
  return str(tmp_path / name)


def test_files_are_followed_in_turn(tmp_path):
  first, second = (shapes.control(images())[i, :, :, 0] for i in (0, 1))
  paths = (written(tmp_path, 'a.png', first), written(tmp_path, 'b.png', np.stack([second] * 3, axis=-1)))
  found = Files(paths, (16, 16, 1))()
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found[..., 0], np.stack([first, second]) / 255)
  given = make().draw({control.FILES: jnp.asarray(found)}, keys(4), jnp.array([0, 1, 2, 5]))
  np.testing.assert_array_equal(given['control'], found[np.array([0, 1, 0, 1])])
  assert make().draw({}, keys(2), jnp.arange(2)) == {}
  assert make(name='control_other').draw({control.FILES: jnp.asarray(found)}, keys(2), jnp.arange(2)) == {}


def test_files_that_cannot_be_followed_are_refused(tmp_path):
  with pytest.raises(UserError, match='sample.control names .*none.png.*, where no file is'):
    Files((str(tmp_path / 'none.png'),), (16, 16, 1))()
  large = written(tmp_path, 'large.png', np.zeros((32, 16), np.uint8))
  with pytest.raises(UserError, match=f'{re.escape(large)}.*is 32 x 16 x 1; 16 x 16 x 1 are needed'):
    Files((large,), (16, 16, 1))()
  (tmp_path / 'text.png').write_text('no image')
  with pytest.raises(UserError, match='text.png cannot be read'):
    Files((str(tmp_path / 'text.png'),), (16, 16, 1))()


def test_a_constant_file_is_warned_of(tmp_path, caplog):
  with caplog.at_level(logging.WARNING, 'absl'):
    Files((written(tmp_path, 'grey.png', np.full((16, 16), 9, np.uint8)),), (16, 16, 1))()
  assert 'grey.png is 9 everywhere: it says nothing' in caplog.text


# Scores ----------------------------------------------------------------------------------------------


def test_images_follow_their_own_edges_and_few_of_another():
  x = pixels.to_unit_range(jnp.asarray(images(40)))
  one = make()
  hint = one.observe({}, {}, x, None)['control']
  own = one.followed(x, hint)
  assert set(own) == {edges.F1, edges.PRECISION, edges.RECALL}
  np.testing.assert_allclose(np.stack(list(own.values())), 1.0, rtol=1e-6)
  others = one.followed(x, jnp.roll(hint, 1, axis=0))
  assert float(others[edges.F1].mean()) < 0.6
  blank = one.followed(jnp.zeros_like(x), hint)
  np.testing.assert_array_equal(np.stack(list(blank.values())), 0)


def test_images_follow_a_low_resolution():
  x = pixels.to_unit_range(jnp.asarray(images(4)))
  one = make('low_resolution')
  hint = one.observe({}, {}, x, None)['control']
  np.testing.assert_allclose(one.followed(x, hint)[control.RMSE], 0, atol=1e-6)
  darker = one.followed(x - 0.2, hint)[control.RMSE]
  np.testing.assert_allclose(darker, 0.1, rtol=1e-4)
