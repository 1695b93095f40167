import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.models import ranges

HALVES = (slice(0, 3), slice(3, 8))


def test_largest_weight_of_each_part_and_channel_is_the_last_step(key):
  kernel = (
    jax.random.normal(key, (3, 3, 8, 5)) * jnp.where(jnp.arange(8) < 3, 1.0, 100.0)[None, None, :, None]
  )
  scale = ranges.kernel_scale(kernel, 8, 'max', HALVES)
  for part, row in zip(HALVES, scale, strict=True):
    np.testing.assert_allclose(row, np.abs(kernel[:, :, part]).max(axis=(0, 1, 2)) / 127, rtol=1e-6)
  whole = ranges.nearest(kernel, ranges.spread(scale, kernel.shape, HALVES), 8)
  assert whole.dtype == jnp.int8
  for part in HALVES:
    assert (np.abs(whole[:, :, part].astype(int)).max(axis=(0, 1, 2)) == 127).all()
  back = ranges.spread(scale, kernel.shape, HALVES) * whole
  assert (np.abs(back - kernel) <= ranges.spread(scale, kernel.shape, HALVES) * 0.5001).all()


def test_zeros_have_a_scale():
  for rule in ranges.WEIGHTS:
    scale = ranges.kernel_scale(jnp.zeros((4, 2)), 4, rule)
    assert (scale > 0).all() and np.isfinite(scale).all()
    assert not ranges.nearest(jnp.zeros((4, 2)), scale, 4).any()


def test_searched_scale_is_the_best_of_the_grid(key):
  """Against the definition, in float64; of heavy tails in four bits it is not the widest."""
  kernel = jax.random.t(key, 3.0, (2000, 3))
  found = ranges.kernel_scale(kernel, 4, 'mse')[0]
  exact = np.asarray(kernel, np.float64)

  def error(scale):
    back = scale * np.clip(np.rint(exact / scale), -7, 7)
    return np.sum(np.abs(exact - back) ** 2.4, axis=0)

  widest = np.abs(exact).max(axis=0) / 7
  least = np.min([error(widest * (1 - 0.01 * i)) for i in range(80)], axis=0)
  np.testing.assert_allclose(error(np.asarray(found, np.float64)), least, rtol=1e-3)
  assert (found < 0.9 * widest).all()


@pytest.mark.parametrize('rule', ranges.ACTIVATIONS)
def test_a_range_holds_zero_and_lies_within_all(rule):
  values = np.random.default_rng(0).normal(5.0, 1.0, 4000)
  low, high = ranges.activation_range(values, float(values.min()), float(values.max()), rule, 99.0)
  assert low == 0 and values.mean() < high <= values.max()
  assert ranges.activation_range(np.zeros(9), 0.0, 0.0, rule, 99.0) == (0.0, 0.0)


def test_percentile_cuts_a_share_at_each_end():
  values = np.arange(-500, 501) / 10
  assert ranges.activation_range(values, -50.0, 50.0, 'minmax') == (-50, 50)
  low, high = ranges.activation_range(values, -50.0, 50.0, 'percentile', 90.0)
  assert (low, high) == pytest.approx((-40, 40))


def test_least_error_shrinks_a_range_of_outliers():
  values = np.concatenate([np.random.default_rng(0).normal(size=100_000), [20.0, -20.0]])
  low, high = ranges.activation_range(values, -20.0, 20.0, 'mse')
  assert high < 20 and low == -high
  errors = [ranges.affine_error(values, *ends, 8) for ends in ((low, high), (-20.0, 20.0))]
  assert errors[0] < 0.95 * errors[1]
