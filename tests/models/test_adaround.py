import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.models import adaround, ranges

SETTINGS = adaround.Settings(num_steps=600, batch_size=16)


def block(kernels, x):
  """Two 3x3 convolutions with a SiLU between them, and the input carried past both."""
  convolve = lambda x, kernel: jax.lax.conv_general_dilated(
    x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  return x + convolve(jax.nn.silu(convolve(x, kernels['conv_1'])), kernels['conv_2'])


@pytest.fixture(scope='module')
def learned():
  keys = jax.random.split(jax.random.key(0), 4)
  names = ('conv_1', 'conv_2')
  kernels = {name: jax.random.normal(key, (3, 3, 4, 4)) / 6 for name, key in zip(names, keys, strict=False)}
  # channels that go together, as those of a network do: roundings can make up for each other
  x = jax.random.normal(keys[2], (64, 6, 6, 2)) @ jax.random.normal(keys[3], (2, 4))
  scales = {
    name: ranges.spread(ranges.kernel_scale(kernel, 4, 'mse'), kernel.shape)
    for name, kernel in kernels.items()
  }
  found = adaround.learn(block, kernels, scales, (x,), block(kernels, x), SETTINGS, jax.random.key(5), 4)
  return kernels, scales, x, found


def test_learned_roundings_lower_the_error_of_the_block(learned):
  kernels, scales, x, found = learned
  wanted = block(kernels, x)
  error = lambda whole: adaround.block_error(block({n: scales[n] * whole[n] for n in whole}, x), wanted)
  near = {name: ranges.nearest(kernels[name], scales[name], 4) for name in kernels}
  assert error(found.kernels) < 0.75 * error(near)
  assert found.error == pytest.approx(float(error(found.kernels)), rel=1e-4)
  assert found.nearest == pytest.approx(float(error(near)), rel=1e-4)


def test_each_weight_is_rounded_down_or_up(learned):
  kernels, scales, _, found = learned
  changed = 0
  for name, whole in found.kernels.items():
    assert whole.dtype == jnp.int8
    steps = np.asarray(kernels[name] / scales[name])
    down = np.clip(np.floor(steps), -7, 7)
    up = np.clip(np.floor(steps) + 1, -7, 7)
    assert ((whole == down) | (whole == up)).all()
    changed += np.count_nonzero(whole != ranges.nearest(kernels[name], scales[name], 4))
  assert changed > 0


def test_roundings_begin_at_the_weight_and_end_whole():
  kernel, scale = jax.random.normal(jax.random.key(0), (50, 3)), jnp.float32([[0.1, 0.2, 1.0]])
  inside = jnp.abs(kernel / scale) < 6
  a = adaround.start(kernel, scale)
  soft = adaround.soft(kernel, scale, adaround.rectified(a), 4)
  np.testing.assert_allclose(jnp.where(inside, soft, kernel), kernel, atol=1e-4)
  for end, move in ((0.0, -9.0), (1.0, 9.0)):
    assert (adaround.rectified(a + move) == end).all()
    hard = adaround.hard(kernel, scale, a + move, 4)
    np.testing.assert_allclose(scale * hard, adaround.soft(kernel, scale, jnp.full_like(a, end), 4))


def test_the_regulariser_ends_every_rounding():
  """Without an error to lower, all are pushed to the end that they are nearer to."""
  settings = adaround.Settings(num_steps=800, weight=1.0)
  assert [float(adaround.beta_at(step, settings)) for step in (0, 160, 480, 800)] == [20, 20, 11, 2]
  h = jnp.float32([0, 0.5, 1])
  assert float(adaround.regulariser(h, 2.0)) == 1 and float(adaround.regulariser(h[::2], 20.0)) == 0
  gradient = jax.grad(lambda h: adaround.regulariser(h, 2.0))(jnp.float32([0.3, 0.7]))
  assert gradient[0] > 0 > gradient[1]
