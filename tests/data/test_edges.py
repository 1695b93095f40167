"""Edges and their agreement, in closed form on drawn ones."""

import jax.numpy as jnp
import numpy as np

from vaediff.data import edges, shapes


def lines(*columns, size=12):
  """Edges at whole columns."""
  found = np.zeros((1, size, size, 1), np.float32)
  found[:, :, list(columns)] = 1
  return jnp.asarray(found)


def figures(e, c):
  return [float(edges.agreement(e, c)[name][0]) for name in (edges.PRECISION, edges.RECALL, edges.F1)]


def test_edges_are_the_control_images_of_shapes():
  images = shapes.images('test', range(40), 16)
  found = np.asarray(edges.edges(jnp.float32(images) / 255))
  np.testing.assert_array_equal(255 * found, shapes.control(images))
  assert 0.05 < found.mean() < 0.6


def test_an_edge_of_one_channel_alone_is_one():
  x = np.full((1, 8, 8, 3), 0.5, np.float32)
  x[:, :, 4:, 1] += 0.2  # a change of 0.1 a pixel, on both sides of it
  x = jnp.asarray(x)
  assert np.asarray(edges.edges(x))[0, :, :, 0].sum(axis=0).tolist() == [0, 0, 0, 8, 8, 0, 0, 0]
  assert not edges.edges(x, 0.11).any()
  assert not edges.edges(jnp.full_like(x, 0.3)).any()


def test_agreement_of_drawn_edges():
  one = lines(4)
  np.testing.assert_allclose(figures(one, one), [1, 1, 1])
  np.testing.assert_allclose(figures(one, lines(5)), [1, 1, 1])  # a pixel off
  np.testing.assert_allclose(figures(one, lines(6)), [0, 0, 0])
  np.testing.assert_allclose(figures(lines(4, 9), one), [1 / 2, 1, 2 / 3], rtol=1e-6)  # half of its edges
  np.testing.assert_allclose(figures(one, lines(4, 8, 11)), [1, 1 / 3, 1 / 2], rtol=1e-6)
  nothing = jnp.zeros_like(one)
  np.testing.assert_allclose(figures(nothing, one), [0, 0, 0])
  np.testing.assert_allclose(figures(one, nothing), [0, 0, 0])
  np.testing.assert_allclose(figures(nothing, nothing), [1, 1, 1])


def test_a_point_is_near_its_eight_neighbours():
  point = np.zeros((1, 5, 5, 1), np.float32)
  point[0, 0, 2] = 1
  expected = np.zeros((5, 5))
  expected[:2, 1:4] = 1
  np.testing.assert_array_equal(edges.near(jnp.asarray(point))[0, :, :, 0], expected)
