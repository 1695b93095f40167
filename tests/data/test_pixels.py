import jax
import jax.numpy as jnp
import numpy as np

from vaediff.data import pixels


def test_unit_range_ends_and_round_trip():
  every = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1)
  scaled = pixels.to_unit_range(every)
  assert scaled.dtype == jnp.float32
  assert scaled[0, 0, 0, 0] == -1.0 and scaled[0, -1, -1, 0] == 1.0
  np.testing.assert_array_equal(pixels.to_bytes(scaled), every)


def test_to_bytes_rounds_and_clips():
  values = jnp.array([-7.0, -1.0, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 1.0, 7.0, jnp.nan])
  np.testing.assert_array_equal(
    pixels.to_bytes(values[None, :, None, None])[0, :, 0, 0], [0, 0, 0, 1, 255, 255, 0]
  )


def test_flip_mirrors_the_chosen_examples_only():
  images = jnp.arange(2 * 2 * 3, dtype=jnp.uint8).reshape(2, 2, 3, 1)
  flipped = pixels.flip(images, jnp.array([False, True]))
  assert flipped.dtype == jnp.uint8
  np.testing.assert_array_equal(flipped[0], images[0])
  np.testing.assert_array_equal(flipped[1, ..., 0], [[8, 7, 6], [11, 10, 9]])


def test_random_flip_is_fair():
  mask = pixels.random_flip(jax.random.key(1), 4000)
  # Four standard deviations of a fair coin: 0.5 / sqrt(4000) = 0.008.
  assert abs(float(mask.mean()) - 0.5) < 0.032
