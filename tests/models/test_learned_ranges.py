"""Learned ranges: the gradient of a step, and the error of a block, which falls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vaediff.models import adaround, integers, learned_ranges
from vaediff.models.observed import Layer


def test_numbers_are_those_that_the_quantized_network_reads():
  x = jax.random.normal(jax.random.key(0), (50,)) * 3
  scale, zero = integers.affine(-1.0, 2.5)
  found = learned_ranges.rounded(x, scale, zero)
  np.testing.assert_array_equal(found, scale * (integers.quantize(x, scale, zero).astype(jnp.int32) - zero))
  assert learned_ranges.rounded(jnp.zeros(1), scale, zero)[0] == 0


def test_the_gradient_of_a_step_is_that_of_learned_step_sizes():
  """Esser et al. 2020, eq. 3: round(x / s) - x / s inside, and the end less the zero point beyond it."""
  scale, zero = jnp.float32(0.1), jnp.float32(27)
  x = jnp.float32([0.234, -1.07, 30.0, -40.0])
  found = jax.vmap(jax.grad(lambda s, x: learned_ranges.rounded(x, s, zero)), (None, 0))(scale, x)
  wanted = [2 - 2.34, -11 + 10.7, 127 - 27, -128 - 27]
  np.testing.assert_allclose(found, wanted, atol=1e-4)
  of_input = jax.vmap(jax.grad(lambda x: learned_ranges.rounded(x, scale, zero)))(x)
  np.testing.assert_allclose(of_input, [1, 1, 0, 0], atol=1e-6)


class Block(nn.Module):
  """Two linear maps with a SiLU between them; the first reads two halves."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(3, name='last')(nn.silu(nn.Dense(8, name='first')(x)))


LAYERS = {
  'first': Layer(path='block/first', kind='dense', shape=(4, 8), split=2, rank=2),
  'last': Layer(path='block/last', kind='dense', shape=(8, 3), rank=2),
}


@pytest.mark.slow
def test_the_error_of_a_block_falls_in_each_bucket_and_part():
  """Ranges much too wide, of one bucket and half, are narrowed; those that fit stay about where they are."""
  block, x = Block(), jax.random.normal(jax.random.key(0), (256, 4))
  params = block.init(jax.random.key(1), x)
  bucket = jnp.arange(256) % 2
  bounds = {'block/first': np.float32([[4, 4], [4, 400]]), 'block/last': np.float32([[4], [400]])}
  affine = {path: integers.affine(-x, x) for path, x in bounds.items()}
  scales, zeros = ({path: pair[i] for path, pair in affine.items()} for i in range(2))

  def apply(scales, bucket, x):
    return learned_ranges.with_rounded_inputs(lambda: block.apply(params, x), LAYERS, scales, zeros, bucket)

  settings = learned_ranges.Settings(num_steps=400, batch_size=64, learning_rate=0.03)
  found = learned_ranges.learn(
    apply, scales, (bucket, x), block.apply(params, x), settings, jax.random.key(2)
  )
  assert found.error < 0.1 * found.measured
  first, last = (found.factors[f'block/{name}'] for name in ('first', 'last'))
  assert first[1, 1] < 0.2 and last[1, 0] < 0.2 and (first[0] > 0.4).all()
  changed = {path: scales[path] * found.factors[path] for path in scales}
  error = adaround.block_error(apply(changed, bucket, x), block.apply(params, x))
  assert found.error == pytest.approx(float(error), rel=1e-4)


def test_without_an_update_that_helps_the_measured_ranges_stay():
  x, zero = jnp.linspace(-1, 1, 64)[:, None], jnp.zeros((1, 1))
  block = lambda scales, x: learned_ranges.rounded(x, scales['a'], zero)
  settings = learned_ranges.Settings(num_steps=1, batch_size=8, learning_rate=0.9)
  found = learned_ranges.learn(block, {'a': jnp.full((1, 1), 1 / 127)}, (x,), x, settings, jax.random.key(0))
  assert found.error == found.measured and (found.factors['a'] == 1).all()
