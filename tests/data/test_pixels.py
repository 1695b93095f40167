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


def test_finite_rows_finds_what_to_bytes_hides():
  images = jnp.zeros((5, 2, 3, 1))
  images = images.at[1, 1, 2, 0].set(jnp.nan).at[2, 0, 0, 0].set(jnp.inf).at[4, 1, 0, 0].set(-jnp.inf)
  finite = jax.jit(pixels.finite_rows)(images)
  assert finite.tolist() == [True, False, False, True, False]
  assert pixels.finite_rows(images.astype(jnp.bfloat16)).tolist() == finite.tolist()


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


def batch_of(count: int) -> dict:
  """Images of two sizes, none of them symmetric, and what is no image."""
  image, low, noise = jax.random.split(jax.random.key(2), 3)
  return {
    'image': jax.random.randint(image, (count, 3, 4, 3), 0, 256).astype(jnp.uint8),
    'low': jax.random.randint(low, (count, 2, 2, 1), 0, 256).astype(jnp.uint8),
    'z': jax.random.normal(noise, (count, 5)),
    'label': jnp.arange(count, dtype=jnp.int32),
    'mask': jnp.ones(count),
  }


def test_prepare_scales_every_image_and_leaves_the_rest():
  batch = batch_of(3)
  prepared = pixels.prepare(batch, None)
  assert list(prepared) == list(batch)
  for name in ('image', 'low'):
    assert prepared[name].dtype == jnp.float32
    np.testing.assert_array_equal(prepared[name], pixels.to_unit_range(batch[name]))
  for name in ('z', 'label', 'mask'):
    assert prepared[name] is batch[name]
  assert batch['image'].dtype == jnp.uint8  # it is not changed in place


def test_prepare_turns_all_images_of_an_example_together():
  count = 64
  batch = batch_of(count)
  prepared = jax.jit(pixels.prepare)(batch, jax.random.key(3))
  turned = {}
  for name in ('image', 'low'):
    before, after = np.asarray(batch[name]), np.asarray(pixels.to_bytes(prepared[name]))
    same = np.all(after == before, axis=(1, 2, 3))
    turned[name] = np.all(after == before[:, :, ::-1], axis=(1, 2, 3))
    assert np.all(same ^ turned[name])
  np.testing.assert_array_equal(turned['image'], turned['low'])
  assert 0 < turned['image'].sum() < count
  for name in ('z', 'label', 'mask'):
    np.testing.assert_array_equal(prepared[name], batch[name])
  np.testing.assert_array_equal(turned['image'], pixels.random_flip(jax.random.key(3), count))


def test_prepare_reads_images_already_in_the_unit_range_as_they_are():
  batch = batch_of(2)
  once = pixels.prepare(batch, None)
  twice = pixels.prepare(once, None)
  np.testing.assert_array_equal(twice['image'], once['image'])
