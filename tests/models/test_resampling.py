import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.models import resampling

TAPS = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64


def direct(x, *, gain, before, after, up=1, down=1):
  """Zeros between and around the pixels, every sum of the filter written out, every `down`-th kept."""
  batch, height, width, channels = x.shape
  spread = np.zeros((batch, height * up, width * up, channels))
  spread[:, ::up, ::up] = x
  spread = np.pad(spread, ((0, 0), (before, after), (before, after), (0, 0)))
  rows, columns = spread.shape[1] - 3, spread.shape[2] - 3
  full = np.zeros((batch, rows, columns, channels))
  for i in range(rows):
    for j in range(columns):
      window = spread[:, i : i + 4, j : j + 4]
      full[:, i, j] = gain * (window * TAPS[None, :, :, None]).sum(axis=(1, 2))
  return full[:, ::down, ::down]


@pytest.fixture
def x():
  return jnp.float32(np.random.default_rng(0).normal(size=(2, 6, 4, 3)))


CASES = {
  'down': (resampling.fir_downsample, {'gain': 1, 'before': 1, 'after': 1, 'down': 2}),
  'up': (resampling.fir_upsample, {'gain': 4, 'before': 2, 'after': 1, 'up': 2}),
  'blur': (resampling.blur, {'gain': 1, 'before': 2, 'after': 2}),
}


@pytest.mark.parametrize('case', CASES)
def test_filters_are_the_direct_sum(x, case):
  function, options = CASES[case]
  actual, expected = jax.jit(function)(x), direct(x, **options)
  assert actual.shape == expected.shape == (2, *{'down': (3, 2), 'up': (12, 8), 'blur': (7, 5)}[case], 3)
  np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize('case', CASES)
def test_filters_are_the_depthwise_convolution(x, case):
  function, options = CASES[case]
  up, before = options.get('up', 1), options['before']
  kernel = jnp.float32(np.tile(options['gain'] * TAPS[:, :, None, None], (1, 1, 1, 3)))
  after = options['after'] + up - 1  # dilation puts no zero after the last pixel
  expected = jax.lax.conv_general_dilated(
    x,
    kernel,
    window_strides=(options.get('down', 1),) * 2,
    padding=((before, after),) * 2,
    lhs_dilation=(up, up),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=3,
  )
  np.testing.assert_allclose(jax.jit(function)(x), expected, atol=1e-6)


def test_constants_keep_their_value_inside():
  x = jnp.full((1, 8, 8, 1), 3.0)
  np.testing.assert_allclose(resampling.fir_downsample(x)[:, 1:-1, 1:-1], 3.0, rtol=1e-6)
  np.testing.assert_allclose(resampling.fir_upsample(x)[:, 1:-1, 1:-1], 3.0, rtol=1e-6)


def test_up_is_four_times_the_transpose_of_down():
  rng = np.random.default_rng(1)
  x, y = (jnp.float32(rng.normal(size=shape)) for shape in ((1, 8, 6, 2), (1, 4, 3, 2)))
  np.testing.assert_allclose(
    4.0 * jnp.vdot(resampling.fir_downsample(x), y), jnp.vdot(x, resampling.fir_upsample(y)), rtol=1e-5
  )


@pytest.mark.slow
def test_bfloat16_stays_bfloat16(x):
  for function, _ in CASES.values():
    y = function(jnp.asarray(x, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float32), function(x), atol=0.05)


def test_odd_sides_cannot_be_halved():
  with pytest.raises(ValueError, match='even height and width, got 4 x 5'):
    resampling.fir_downsample(jnp.zeros((1, 4, 5, 1)))
