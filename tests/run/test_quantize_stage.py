"""Ranges by time, and what a quantized stage is made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cifar10
from vaediff import experiments
from vaediff.machine import cost
from vaediff.models import observed
from vaediff.models.quantized import Quantized
from vaediff.run import quantize_stage


def test_buckets_hold_as_many_times_each_and_the_ranges_of_their_rows():
  times = [np.array([0.1, 0.2], np.float32), np.array([0.8, 1.0], np.float32)]
  ranges = [
    {'a': np.array([[[-1.0, 1.0]], [[-2.0, 0.5]]], np.float32)},
    {'a': np.array([[[0.0, 3.0]], [[-0.5, 2.0]]], np.float32)},
  ]
  edges, found = quantize_stage.by_time(times, ranges, 2)
  np.testing.assert_allclose(edges, [0.5])
  np.testing.assert_array_equal(found['a'], [[[-2.0, 1.0]], [[-0.5, 3.0]]])


def test_of_fewer_times_than_buckets_each_has_one_and_the_others_their_neighbours():
  times = [np.array([0.5, 1.0], np.float32)]
  ranges = [{'a': np.array([[[-1.0, 1.0]], [[-2.0, 2.0]]], np.float32)}]
  edges, found = quantize_stage.by_time(times, ranges, 4)
  np.testing.assert_allclose(edges, [0.75, 1, 1])
  assert len(found['a']) == 4
  for t, wanted in ((0.5, 1.0), (1.0, 2.0)):
    assert found['a'][np.searchsorted(edges, t), 0, 1] == wanted


def test_without_a_time_there_is_one_bucket():
  edges, found = quantize_stage.by_time([np.zeros(1)], [{'a': np.array([[[-1.0, 2.0]]], np.float32)}], 1)
  assert edges.shape == (0,) and found['a'].shape == (1, 1, 2)


@pytest.mark.slow
def test_on_disk_and_for_the_compiler_eight_bits_are_a_quarter_and_four_an_eighth_of_floats(tmp_path):
  model = experiments.build(cifar10.get_config(), 'refiner').networks['denoiser']
  random = np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  params = jax.tree.map(lambda leaf: jnp.asarray(random.standard_normal(leaf.shape, np.float32)), shapes)
  floats = quantize_stage.write(tmp_path / 'float32', {'denoiser': params}, 1, {})
  layers = observed.quantizable(observed.layers_of(model))
  for bits, most in ((8, 0.27), (4, 0.15)):
    whole = Quantized.of(model, layers=layers, bits=bits, quantized_inputs=True, buckets=8)
    ranges = {layer.path: np.tile(np.float32([-1, 1]), (8, layer.parts, 1)) for layer in layers}
    tree = whole.quantize(params, ranges=ranges, times=np.arange(1, 8) / 8)
    assert quantize_stage.write(tmp_path / str(bits), {'denoiser': tree}, 1, {}) < most * floats
    assert cost.device_bytes(tree) < most * cost.device_bytes(params)
