"""Ranges by time, and what a quantized stage is made of."""

import numpy as np

from vaediff.run import quantization


def test_buckets_hold_as_many_times_each_and_the_ranges_of_their_rows():
  times = [np.array([0.1, 0.2], np.float32), np.array([0.8, 1.0], np.float32)]
  ranges = [
    {'a': np.array([[[-1.0, 1.0]], [[-2.0, 0.5]]], np.float32)},
    {'a': np.array([[[0.0, 3.0]], [[-0.5, 2.0]]], np.float32)},
  ]
  edges, found = quantization.by_time(times, ranges, 2)
  np.testing.assert_allclose(edges, [0.5])
  np.testing.assert_array_equal(found['a'], [[[-2.0, 1.0]], [[-0.5, 3.0]]])


def test_of_fewer_times_than_buckets_each_has_one_and_the_others_their_neighbours():
  times = [np.array([0.5, 1.0], np.float32)]
  ranges = [{'a': np.array([[[-1.0, 1.0]], [[-2.0, 2.0]]], np.float32)}]
  edges, found = quantization.by_time(times, ranges, 4)
  np.testing.assert_allclose(edges, [0.75] * 3)
  assert len(found['a']) == 4
  for t, wanted in ((0.5, 1.0), (1.0, 2.0)):
    assert found['a'][np.searchsorted(edges, t), 0, 1] == wanted


def test_without_a_time_there_is_one_bucket():
  edges, found = quantization.by_time([np.zeros(1)], [{'a': np.array([[[-1.0, 2.0]]], np.float32)}], 1)
  assert edges.shape == (0,) and found['a'].shape == (1, 1, 2)
