import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.errors import UserError
from vaediff.models import layers
from vaediff.models.ncsnpp_blocks import AdaptiveGroupNorm
from vaediff.models.uvit import ModulatedLayerNorm


@pytest.mark.parametrize(
  ('channels', 'groups'),
  [(128, 32), (160, 32), (256, 32), (64, 16), (32, 8), (48, 12), (8, 2), (7, 1), (37, 1)],
)
def test_number_of_groups(channels, groups):
  assert layers.num_groups(channels) == groups


@pytest.mark.parametrize('epsilon', [1e-5, 1e-1])
def test_group_norm_is_the_formula(key, epsilon):
  channels = 64
  x = 3.0 + 2.0 * jax.random.normal(key, (2, 3, 5, channels))
  gamma, beta = np.linspace(-1, 2, channels), np.linspace(0, 1, channels)
  params = {'scale': jnp.float32(gamma), 'bias': jnp.float32(beta)}
  actual = layers.GroupNorm(epsilon=epsilon).apply({'params': params}, x)

  grouped = np.asarray(x, np.float64).reshape(2, 3, 5, 16, 4)
  mean = grouped.mean(axis=(1, 2, 4), keepdims=True)
  variance = grouped.var(axis=(1, 2, 4), keepdims=True)
  expected = ((grouped - mean) / np.sqrt(variance + epsilon)).reshape(x.shape) * gamma + beta
  np.testing.assert_allclose(actual, expected, atol=2e-5)


def apply_group_norm(x):
  params = {'scale': jnp.ones(x.shape[-1]), 'bias': jnp.zeros(x.shape[-1])}
  return layers.GroupNorm(epsilon=1e-5).apply({'params': params}, x)


def apply_adaptive(x):
  module, style = AdaptiveGroupNorm(), jnp.zeros((x.shape[0], 4))
  return module.apply(module.init(jax.random.key(0), x, style), x, style)


def apply_layer_norm(x):
  module, tokens, style = ModulatedLayerNorm(), x.reshape(x.shape[0], -1, x.shape[-1]), jnp.zeros((2, 4))
  return module.apply(module.init(jax.random.key(0), tokens, style), tokens, style).reshape(x.shape)


def normalised(x, norm):
  """In float64; layer norm has a group for each pixel."""
  x = np.asarray(x, np.float64)
  grouped = x.reshape(*x.shape[:3], 16, 4)
  axes = (3, 4) if norm is apply_layer_norm else (1, 2, 4)
  mean, variance = grouped.mean(axis=axes, keepdims=True), grouped.var(axis=axes, keepdims=True)
  epsilon = 1e-5 if norm is apply_group_norm else 1e-6
  return ((grouped - mean) / np.sqrt(variance + epsilon)).reshape(x.shape)


NORMS = [apply_group_norm, apply_adaptive, apply_layer_norm]


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize(('ratio', 'tolerance'), [(0, 5e-6), (100, 2e-5), (-100, 2e-5), (1000, 1.5e-4)])
def test_norms_are_exact_where_the_mean_is_many_deviations(key, norm, ratio, tolerance):
  """As PyTorch's, 1e-5 and 7e-5; E[x^2] - E[x]^2 in float32 is off by 4e-3 and 0.4."""
  x = ratio + jax.random.normal(key, (2, 8, 8, 64))
  np.testing.assert_allclose(jax.jit(norm)(x), normalised(x, norm), atol=tolerance)


@pytest.mark.parametrize('norm', NORMS)
def test_norms_of_bfloat16_are_those_of_its_numbers(key, norm):
  x = (1000.0 + 8.0 * jax.random.normal(key, (2, 8, 8, 64))).astype(jnp.bfloat16)
  y = jax.jit(norm)(x)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(y, np.float32), normalised(x, norm), atol=0.02)


@pytest.mark.parametrize('norm', NORMS)
def test_the_gradient_of_a_norm_does_not_see_the_mean(key, norm):
  key_x, key_weight = jax.random.split(key)
  x, weight = (jax.random.normal(k, (2, 8, 8, 64)) for k in (key_x, key_weight))
  slope = jax.jit(jax.grad(lambda x: jnp.sum(weight * norm(x))))
  np.testing.assert_allclose(slope(x + 100.0), slope(x), atol=2e-3)


def test_an_odd_pixel_in_the_middle_changes_no_statistics(key):
  x = 1000.0 + jax.random.normal(key, (2, 8, 8, 64))
  x = x.at[:, 4, 4].set(0.0)
  np.testing.assert_allclose(
    apply_group_norm(x), normalised(x, apply_group_norm), atol=1e-4, rtol=1e-4
  )


def test_group_norm_of_a_constant_is_its_bias():
  x = jnp.full((1, 4, 4, 8), 1000.1)
  params = {'scale': jnp.ones(8), 'bias': jnp.full(8, 0.5)}
  y = layers.GroupNorm(epsilon=1e-5).apply({'params': params}, x)
  # x and its mean are multiplied by 316, 1 / sqrt(epsilon), before they are subtracted.
  np.testing.assert_allclose(y, 0.5, atol=0.05)


def test_group_norm_keeps_float32_statistics_in_bfloat16(key):
  x = (100.0 + jax.random.normal(key, (2, 16, 16, 8))).astype(jnp.bfloat16)
  params = {'scale': jnp.ones(8), 'bias': jnp.zeros(8)}
  module = layers.GroupNorm(epsilon=1e-5)
  y = module.apply({'params': params}, x)
  assert y.dtype == jnp.bfloat16
  exact = module.apply({'params': params}, x.astype(jnp.float32))
  np.testing.assert_allclose(np.asarray(y, np.float32), exact, atol=0.02)


@pytest.mark.parametrize('sin_first', [True, False])
@pytest.mark.parametrize('last_included', [True, False])
def test_time_embedding_is_the_formula(sin_first, last_included):
  position, half = np.array([0.0, 1.0, 499.5, 999.0]), 8
  actual = layers.sinusoidal_embedding(
    jnp.float32(position), 2 * half, sin_first=sin_first, last_frequency_included=last_included
  )
  for row, value in enumerate(position):
    for i in range(half):
      angle = value * 10_000 ** (-i / (half - 1 if last_included else half))
      sin, cos = actual[row, i], actual[row, half + i]
      if not sin_first:
        sin, cos = cos, sin
      np.testing.assert_allclose([sin, cos], [math.sin(angle), math.cos(angle)], atol=2e-4)


def test_attention_is_the_formula_for_each_head(key):
  query, k, value = jax.random.normal(key, (3, 2, 5, 3, 4))
  actual = layers.attention(query, k, value, scale=0.5)
  query, k, value = (np.asarray(x, np.float64) for x in (query, k, value))
  for b in range(2):
    for head in range(3):
      for i in range(5):
        weights = np.array([np.exp(0.5 * query[b, i, head] @ k[b, j, head]) for j in range(5)])
        expected = sum(w * value[b, j, head] for j, w in enumerate(weights / weights.sum()))
        np.testing.assert_allclose(actual[b, i, head], expected, atol=1e-5)


def test_upsampling_repeats_pixels_and_pooling_undoes_it(key):
  x = jax.random.normal(key, (2, 3, 4, 5))
  up = layers.upsample_nearest(x, 3)
  for i in range(9):
    for j in range(12):
      np.testing.assert_array_equal(up[:, i, j], x[:, i // 3, j // 3])
  np.testing.assert_allclose(layers.average_pool(up, 3), x, rtol=1e-6)


def test_pooling_averages_windows():
  x = jnp.arange(16.0).reshape(1, 4, 4, 1)
  np.testing.assert_array_equal(layers.average_pool(x, 2)[0, :, :, 0], [[2.5, 4.5], [10.5, 12.5]])


def test_unknown_dtype_is_a_user_error():
  with pytest.raises(UserError, match="model.dtype is 'float16'.*float32, bfloat16"):
    layers.check_dtype('float16')


def test_positions_are_sines_of_row_and_column():
  known = layers.positions(3, 2, 10)
  assert known.shape == (3, 2, 10)
  np.testing.assert_allclose(known[2, 1, :4], [np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02)], atol=1e-6)
  np.testing.assert_allclose(known[2, 1, 4:8], [np.sin(1), np.sin(0.01), np.cos(1), np.cos(0.01)], atol=1e-6)
  np.testing.assert_array_equal(known[..., 8:], 0)
  assert len({tuple(np.round(row, 5)) for row in np.asarray(known).reshape(6, 10)}) == 6
  np.testing.assert_array_equal(layers.positions(2, 2, 3), 0)


def test_positions_on_another_grid_are_counted_in_its_cells():
  known, fine = layers.positions(2, 3, 8), layers.positions(6, 3, 8, (2, 3))
  # the middle one of three rows lies in the middle of the cell
  np.testing.assert_allclose(fine[1::3], known, atol=1e-6)
  np.testing.assert_allclose(fine[0, 0, :2], [np.sin(-1 / 3), np.sin(-1 / 3 / 100)], atol=1e-6)
