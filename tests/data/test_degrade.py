"""Degradations at random: against SciPy and `jax.image`, each image by its own key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage
from some_slow import some_slow

from vaediff.data import degrade

SIDE = 12


def images(count=6, channels=2):
  return jax.random.uniform(jax.random.key(1), (count, SIDE, SIDE, channels), minval=-1.0, maxval=1.0)


def keys(count=6, seed=0):
  return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize('sigma', [0.1, 0.5, 1.2])
def test_blur_is_that_of_scipy(sigma):
  x = images(1)[0]
  wanted = ndimage.gaussian_filter(np.asarray(x), (sigma, sigma, 0), radius=(1, 1, 0), mode='nearest')
  np.testing.assert_allclose(degrade.blurred(x, jnp.float32(sigma)), wanted, atol=1e-6)


@pytest.mark.parametrize('kernel', degrade.KERNELS)
@pytest.mark.parametrize(('before', 'after'), [(12, 7), (7, 12), (12, 12), (12, 6), (5, 11)])
def test_resizing_is_that_of_jax_where_the_length_is_an_argument(kernel, before, after):
  row = jax.random.normal(jax.random.key(2), (before,))
  matrix = jax.jit(degrade.resizing, static_argnums=(0, 3))(
    SIDE, jnp.float32(before), jnp.float32(after), kernel
  )
  got = matrix @ jnp.pad(row, (0, SIDE - before))
  np.testing.assert_allclose(got[:after], jax.image.resize(row, (after,), kernel), atol=1e-5)
  assert not np.any(got[after:])


def test_half_are_blurred_and_the_others_are_as_they_were():
  x = images(400, 1)
  same = np.asarray((degrade.blur(x, keys(400)) == x).all(axis=(1, 2, 3)))
  assert 0.4 < same.mean() < 0.6
  before, after = (np.asarray(y)[~same].std() for y in (x, degrade.blur(x, keys(400))))
  assert 0.6 * before < after < 0.95 * before


@pytest.mark.parametrize('name', some_slow(['blur', 'bsr'], 'bsr'))
def test_an_image_depends_on_its_own_key_alone(name):
  worse, x = jax.jit(getattr(degrade, name)), images()
  whole = worse(x, keys())
  # the pixels of a row that are computed in another batch may be rounded in another order
  np.testing.assert_allclose(whole[3:5], worse(x[3:5], keys()[3:5]), atol=1e-5)
  np.testing.assert_allclose(whole[:1], worse(x[:1], keys()[:1]), atol=1e-5)
  other = worse(x, keys(seed=7))
  assert np.any(np.abs(whole - other) > 1e-3)


@pytest.mark.slow
def test_bsr_makes_every_image_worse_and_keeps_its_range():
  x = images(64, 1)
  worse = degrade.bsr(x, keys(64))
  assert worse.shape == x.shape and float(jnp.abs(worse).max()) <= 1
  assert np.all(np.abs(worse - x).mean(axis=(1, 2, 3)) > 0.005)
  flat = jnp.zeros((64, SIDE, SIDE, 1))  # blur and resizing leave it as it is: what is left is the noise
  deviations = np.asarray(degrade.bsr(flat, keys(64))).std(axis=(1, 2, 3)) / 2 * 255
  assert deviations.max() < 27 and deviations.std() > 2
