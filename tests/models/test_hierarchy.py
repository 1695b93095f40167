"""The network of VQ-VAE-2: its published sizes, its grids, and what each level is made of."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from some_slow import some_slow

from vaediff.errors import UserError
from vaediff.models import hierarchy
from vaediff.models.functional import Model


def model(size=64, **fields):
  module = hierarchy.Hierarchy(**{'image_channels': 3, **fields})
  shape = (1, size, size, module.image_channels)
  return Model(module=module, inputs=(jax.ShapeDtypeStruct(shape, jnp.float32),))


def counts(model):
  params = jax.eval_shape(model.init, jax.random.key(0))
  return {name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part)) for name, part in params.items()}


@pytest.mark.parametrize(
  ('levels', 'trained', 'whole'),
  [(1, 662_723, 695_491), (2, 1_388_867, 1_454_403), (3, 2_385_411, 2_483_715)],
)
def test_the_sizes_are_those_of_the_published_network(levels, trained, whole):
  found = counts(model(num_levels=levels))
  codes = {name: size for name, size in found.items() if name.startswith('codes_')}
  assert sum(found.values()) == whole and sum(found.values()) - sum(codes.values()) == trained
  assert codes == {f'codes_{name}': 512 * 64 for name in hierarchy.NAMES[levels - 1]}


def test_the_parts_of_two_levels_are_those_of_the_published_network():
  found = counts(model())
  assert {name: size for name, size in found.items() if not name.startswith('codes_')} == {
    'encoders_1': 364_160,  # of the bottom
    'encoders_0': 287_232,
    'to_codes_0': 8_256,
    'hints_0': 287_232,  # the decoder of the top
    'to_codes_1': 12_352,
    'ups_0': 65_600,
    'decoder': 364_035,
  }


@pytest.mark.parametrize('levels', some_slow([1, 2, 3, 4], 1, 3))
@pytest.mark.parametrize('dtype', some_slow(['float32', 'bfloat16'], 'bfloat16'))
def test_each_level_has_half_the_sides_of_the_one_below(levels, dtype):
  """Vectors, what the decoder takes and images are float32 whatever the arithmetic."""
  built = model(32, num_levels=levels, channels=8, res_channels=4, latent_channels=5, dtype=dtype)

  def passed(x):
    params, carried, vectors = built.init(jax.random.key(0)), None, []
    for level, encoded in enumerate(built.apply(params, x, method='encode')):
      vectors.append(built.apply(params, level, encoded, carried, method='vectors'))
      carried = built.apply(params, level, carried, vectors[-1], method='carry')
    return vectors, carried, built.apply(params, carried, method='decode')

  vectors, carried, image = jax.eval_shape(passed, jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32))
  sides = [8 // 2**above for above in reversed(range(levels))]
  assert [z.shape for z in vectors] == [(2, side, side, 5) for side in sides]
  assert [32 // stride for stride in built.module.strides()] == sides
  assert carried.shape == (2, 8, 8, 5 * levels) and image.shape == (2, 32, 32, 3)
  assert {value.dtype for value in (*vectors, carried, image)} == {jnp.dtype('float32')}


def test_a_transposed_convolution_doubles_the_sides_around_each_pixel():
  """Output pixels 2i - 1 ... 2i + 2 read input pixel i, as with a padding of 1 elsewhere."""
  module = hierarchy.transposed(1, 'out', jnp.float32)
  params = {'params': {'kernel': jnp.ones((4, 4, 1, 1)), 'bias': jnp.zeros(1)}}
  x = jnp.zeros((1, 4, 4, 1)).at[0, 1, 2, 0].set(1.0)
  seen = np.argwhere(np.asarray(module.apply(params, x))[0, :, :, 0])
  assert seen.min(axis=0).tolist() == [1, 3] and seen.max(axis=0).tolist() == [4, 6] and len(seen) == 16


def test_residual_blocks_add_to_what_comes_in_and_end_in_a_relu():
  module = hierarchy.Residuals(2, 3, jnp.float32)
  x = jax.random.normal(jax.random.key(0), (1, 4, 4, 2))
  params = jax.tree.map(jnp.zeros_like, module.init(jax.random.key(1), x))
  np.testing.assert_array_equal(module.apply(params, x), jnp.maximum(x, 0.0))


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'num_levels': 0}, r'model.num_levels is 0; it must be in 1 \.\.\. 4'),
    ({'num_levels': 5}, r'model.num_levels is 5; it must be in 1 \.\.\. 4'),
    ({'channels': 1}, 'model.channels is 1; it must be at least 2'),
    ({'codebook_size': 0}, 'model.codebook_size is 0; it must be at least 1'),
    ({'dtype': 'float16'}, "model.dtype is 'float16'"),
  ],
)
def test_fields_out_of_range_are_refused(fields, message):
  with pytest.raises(UserError, match=message):
    model(**fields)
