"""Discriminator heads: their logits, where they read the time, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.errors import UserError
from vaediff.models.functional import Model
from vaediff.models.heads import Heads

MAPS = [(8, 8, 12), (4, 4, 20), (4, 4, 20)]


def build(**changes):
  shapes = [jax.ShapeDtypeStruct((1, *shape), jnp.float32) for shape in MAPS]
  module = Heads(**{'channels': 8, 'dtype': 'float32', **changes})
  return Model(module=module, inputs=(jax.ShapeDtypeStruct((1,), jnp.float32), *shapes))


def maps(count=2, seed=0):
  keys = jax.random.split(jax.random.key(seed), len(MAPS))
  return [jax.random.normal(key, (count, *shape)) for key, shape in zip(keys, MAPS, strict=True)]


@pytest.fixture(scope='module')
def params():
  return jax.jit(build().init)(jax.random.key(1))


def test_one_logit_per_position_of_each_map(params):
  logits = jax.jit(build().apply)(params, jnp.array([0.3, 1.0]), *maps())
  assert [x.shape for x in logits] == [(2, 64), (2, 16), (2, 16)]
  assert {x.dtype for x in logits} == {jnp.dtype('float32')}
  assert set(params) == {'time_mlp', 'head_0', 'head_1', 'head_2'}
  assert set(params['head_0']) == {'norm', 'conv', 'film', 'out'}
  assert params['head_1']['conv']['kernel'].shape == (3, 3, 20, 8)


def test_a_head_reads_its_own_map_its_own_example_and_the_time(params):
  t, given = jnp.array([0.3, 0.9]), maps()
  run = jax.jit(build().apply)
  before = run(params, t, *given)
  after = run(params, t, given[0], given[1].at[0].multiply(jnp.arange(20.0)[None, None, :]), given[2])
  same = [np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
  assert same == [True, False, True]
  np.testing.assert_allclose(before[1][1], after[1][1], atol=1e-6)
  later = run(params, t.at[0].set(0.5), *given)
  for a, b in zip(before, later, strict=True):
    assert np.abs(a[0] - b[0]).max() > 1e-4
    np.testing.assert_allclose(a[1], b[1], atol=1e-6)


@pytest.mark.slow
def test_bfloat16_is_close_and_returns_float32(params):
  t, given = jnp.array([0.3, 0.9]), maps()
  exact, rough = (build(dtype=dtype).apply(params, t, *given) for dtype in ('float32', 'bfloat16'))
  for a, b in zip(exact, rough, strict=True):
    assert b.dtype == jnp.float32
    assert 0 < np.abs(a - b).max() < 0.1 * np.abs(a).max()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'channels': 7}, 'discriminator.channels is 7'),
    ({'channels': 2}, 'discriminator.channels is 2'),
    ({'dtype': 'float16'}, "dtype is 'float16'"),
  ],
)
def test_mistakes_are_user_errors(changes, message):
  with pytest.raises(UserError, match=message):
    build(**changes)
