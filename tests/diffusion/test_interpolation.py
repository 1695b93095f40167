"""Ways on the sphere: known points, ends, what is refused; noise keeps its variance."""

import numpy as np
import pytest

from vaediff.diffusion import interpolation
from vaediff.errors import UserError

A, B = np.array([1.0, 0.0, 0.0]), np.array([0.6, 0.8, 0.0])


def test_known_points():
  found = interpolation.on_sphere(A, B, np.array([0.0, 0.25, 0.5, 1.0]))
  wanted = [[1, 0, 0], [0.97325, 0.22975, 0], [0.89443, 0.44721, 0], [0.6, 0.8, 0]]
  np.testing.assert_allclose(found, wanted, atol=5e-6)
  assert found.dtype == np.float32
  np.testing.assert_allclose(
    interpolation.on_sphere(3 * A, 0.1 * B, np.array([0.25]))[0], wanted[1], atol=5e-6
  )


def test_equal_parts_of_the_angle_of_any_two_vectors():
  a, b = np.random.default_rng(0).standard_normal((2, 16))
  points = interpolation.on_sphere(a, b, np.linspace(0, 1, 9)).astype(np.float64)
  np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, rtol=1e-6)
  np.testing.assert_allclose(np.diff(np.sum(points[1:] * points[:-1], axis=1)), 0, atol=1e-6)


def test_vectors_that_are_all_but_equal_are_joined_by_a_line():
  near = np.array([1.0, 2e-5, 0.0])
  found = interpolation.on_sphere(A, near, np.array([0.0, 0.5, 1.0]))
  np.testing.assert_allclose(found[:, 1], [0, 1e-5, 2e-5], rtol=1e-4)
  np.testing.assert_array_equal(
    interpolation.on_sphere(B, B, np.array([0.3])), interpolation.unit(B)[None].astype('f4')
  )


@pytest.mark.parametrize('off', [0.0, 5e-4])
def test_opposite_vectors_are_refused(off):
  other = np.array([-np.cos(off), np.sin(off), 0.0])
  with pytest.raises(UserError, match='the two vectors are opposite'):
    interpolation.on_sphere(A, other, np.array([0.5]))
  almost = np.array([-np.cos(2e-3), np.sin(2e-3), 0.0])
  np.testing.assert_allclose(interpolation.on_sphere(A, almost, np.array([0.5]))[0, 1], 1, atol=1e-5)
