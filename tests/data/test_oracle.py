import functools

import numpy as np
import pytest

from vaediff.data import oracle, shapes
from vaediff.errors import UserError

pytestmark = pytest.mark.xdist_group('oracle')  # one worker: the tests share what is dear
reader = functools.cache(oracle.Oracle)


def drawn(split, count, size, mini):
  image = shapes.images(split, range(count), size, mini=mini)
  return image, np.array([shapes.scene(split, i, mini=mini).attributes for i in range(count)])


@pytest.mark.parametrize(
  ('size', 'mini', 'count'),
  [
    (16, True, 400),
    (16, False, 100),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in [(16, False, 400), (32, False, 400), (64, False, 100)]
    ),
  ],
)
@pytest.mark.parametrize('split', ['test', 'held_out'])
def test_clean_images_are_read_exactly(size, mini, count, split):
  image, attributes = drawn(split, count, size, mini)
  reading = reader(size, mini=mini).read(image)
  np.testing.assert_array_equal(reading.attributes, attributes)
  assert reading.valid.all() and np.median(reading.rmse) < 0.035 and reading.rmse.max() < oracle.MOST_RMSE


@pytest.mark.slow
@pytest.mark.parametrize(('size', 'mini'), [(16, True), (16, False), (32, False), (64, False)])
def test_every_evaluation_image_is_read_exactly(size, mini):
  for split in ('test', 'held_out'):
    image, attributes = drawn(split, 2000, size, mini)
    np.testing.assert_array_equal(oracle.Oracle(size, mini=mini).read(image).attributes, attributes)


@pytest.mark.parametrize(('noise', 'least'), [(0.1, 0.99), (0.3, 0.94)])
@pytest.mark.slow
def test_noise_is_borne(noise, least):
  """Joint accuracy of 32 pixels was 1.0 and 0.98 of 1,000 images."""
  image, attributes = drawn('test', 200, 32, False)
  noisy = image / 255 + noise * np.random.RandomState(0).standard_normal(image.shape)
  reading = oracle.Oracle(32).read(np.rint(255 * noisy.clip(0, 1)).astype(np.uint8))
  assert (reading.attributes == attributes).all(axis=1).mean() >= least
  assert not reading.valid.all()


def test_what_is_no_shape_is_not_valid():
  random = np.random.RandomState(0)
  two = np.concatenate([shapes.render(shapes.Scene(attributes=(1, 0, 2, 4, 1)), 16)[:, 4:12]] * 2, axis=1)
  gradient = np.broadcast_to(np.linspace(0, 255, 16).astype(np.uint8)[:, None], (16, 16, 3)[:2])
  images = [random.randint(256, size=(16, 16, 3)), two, np.stack([gradient] * 3, axis=-1)]
  assert not reader(16, mini=False).read(np.stack(images).astype(np.uint8)).valid.any()


def test_the_fit_is_the_least_squares_solution():
  """The residual of the mask that is found is that of numpy's own solver, and no other mask has less."""
  image, _ = drawn('test', 3, 16, True)
  reader = oracle.Oracle(16, mini=True)
  reading = reader.read(image)
  for one, rmse in zip(image, reading.rmse, strict=True):
    pixels = one.reshape(-1, 3) / 255
    least = min(
      np.square(pixels - sides @ np.linalg.lstsq(sides, pixels, rcond=None)[0]).mean() ** 0.5
      for sides in (np.stack([mask, 1 - mask], axis=1) for mask in reader._masks)
    )
    assert rmse == pytest.approx(least, abs=1e-6)


@pytest.mark.slow
def test_the_number_of_images_at_a_time_does_not_matter(monkeypatch):
  image, _ = drawn('test', 20, 16, False)
  whole = oracle.Oracle(16).read(image)
  monkeypatch.setattr(oracle, 'CHUNK', 7)
  parts = oracle.Oracle(16).read(image)
  np.testing.assert_array_equal(parts.attributes, whole.attributes)
  np.testing.assert_allclose(parts.rmse, whole.rmse, atol=1e-6)
  assert len(oracle.Oracle(16).read(image[:0]).attributes) == 0


def test_correct_is_of_what_was_asked():
  asked, read = np.array([[1, -1], [2, 0]], np.int32), np.array([[1, 5], [3, 0]], np.int32)
  np.testing.assert_array_equal(oracle.correct(asked, read), [[1, np.nan], [0, 1]])


def test_other_sizes_are_refused():
  with pytest.raises(UserError, match='at least 16 pixels a side, got 8'):
    oracle.Oracle(8)
  with pytest.raises(UserError, match=r'\(16, 16, 3\)'):
    oracle.Oracle(16, mini=True).read(np.zeros((1, 32, 32, 3), np.uint8))
