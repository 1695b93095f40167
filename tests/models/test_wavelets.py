import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.models import wavelets


@pytest.fixture
def x():
  return jnp.float32(np.random.default_rng(0).normal(size=(2, 6, 4, 3)))


def test_bands_are_the_formulas(x):
  bands = wavelets.haar(x)
  assert bands.shape == (2, 3, 2, 12)
  a, b, c, d = (np.asarray(x)[:, i::2, j::2] for i in (0, 1) for j in (0, 1))
  expected = [(a + b + c + d) / 2, (a - b + c - d) / 2, (a + b - c - d) / 2, (a - b - c + d) / 2]
  np.testing.assert_allclose(bands, np.concatenate(expected, axis=-1), atol=1e-6)
  for actual, band in zip(wavelets.split_bands(x), expected, strict=True):
    np.testing.assert_allclose(actual, band, atol=1e-6)


def test_each_band_sees_its_own_pattern():
  flat = jnp.ones((1, 4, 4, 1))
  columns = jnp.tile(jnp.float32([1, -1]), 2)[None, None, :, None] * flat
  rows = columns.swapaxes(1, 2)
  for i, pattern in enumerate((flat, columns, rows, rows * columns)):
    energy = jnp.square(wavelets.haar(pattern)).sum(axis=(0, 1, 2))
    np.testing.assert_allclose(energy, 16.0 * np.eye(4)[i])


def test_inverse_undoes_the_transform_both_ways(x):
  np.testing.assert_allclose(wavelets.inverse_haar(wavelets.haar(x)), x, atol=1e-6)
  bands = jnp.float32(np.random.default_rng(1).normal(size=(2, 3, 2, 12)))
  np.testing.assert_allclose(wavelets.haar(wavelets.inverse_haar(bands)), bands, atol=1e-6)
  np.testing.assert_allclose(wavelets.merge_bands(*wavelets.split_bands(x)), x, atol=1e-6)


def test_the_transform_is_orthonormal():
  basis = jnp.eye(16).reshape(16, 4, 4, 1)
  matrix = wavelets.haar(basis).reshape(16, 16)
  np.testing.assert_allclose(matrix @ matrix.T, np.eye(16), atol=1e-6)
  inverse = wavelets.inverse_haar(jnp.eye(16).reshape(16, 2, 2, 4)).reshape(16, 16)
  np.testing.assert_allclose(inverse, matrix.T, atol=1e-6)


def test_pixels_give_bands_within_two(key):
  x = jax.random.uniform(key, (1, 8, 8, 3), minval=-1.0, maxval=1.0)
  assert jnp.abs(wavelets.haar(jnp.sign(x))).max() <= 2.0


def test_sizes_that_do_not_fit_are_errors():
  with pytest.raises(ValueError, match='even height and width, got 5 x 4'):
    wavelets.haar(jnp.zeros((1, 5, 4, 1)))
  with pytest.raises(ValueError, match='multiple of 4 channels, got 6'):
    wavelets.inverse_haar(jnp.zeros((1, 5, 4, 6)))
