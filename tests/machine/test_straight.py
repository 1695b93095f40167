"""Loops that are written out compute what they computed; what a result depends on is seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.machine import straight


def names(function, *args):
  return [eqn.primitive.name for eqn in jax.make_jaxpr(function)(*args).eqns]


@pytest.mark.parametrize('reverse', [False, True])
def test_a_loop_written_out_returns_its_carry_and_its_rows(reverse):
  rows = {'a': np.float32([1, 2, 3]), 'b': np.float32([[1, 0], [0, 1], [2, 2]])}

  def function(given):
    def step(carry, row):
      carry = row['a'] * carry + jax.nn.silu(row['b'])[None]
      return carry, carry.sum()

    return jax.lax.scan(step, given['x'], rows, reverse=reverse)

  given = {'x': jnp.float32([[0.5, -1.0]])}
  flat = straight.straight(function, given)
  carry, sums = flat(given['x'])
  expected, wanted = np.float32([[0.5, -1.0]]), []
  order = [2, 1, 0] if reverse else [0, 1, 2]
  for k in order:
    b = rows['b'][k]
    expected = rows['a'][k] * expected + (b / (1 + np.exp(-b)))[None]
    wanted.append(expected.sum())
  np.testing.assert_allclose(carry, expected, rtol=1e-6)
  np.testing.assert_allclose(sums, wanted[::-1] if reverse else wanted, rtol=1e-6)
  left = names(flat, given['x'])
  assert 'scan' not in left
  # silu of the table is a number by then, of each step
  assert left.count('mul') == 3 and 'logistic' not in left


def test_what_is_large_is_not_computed_at_once():
  table = np.ones((2, straight.MOST_FOLDED + 1), np.float32)

  def function(x):
    return jax.lax.scan(lambda carry, row: (carry + jnp.sin(row), None), x, table)[0]

  assert names(straight.straight(function, table[0]), table[0]).count('sin') == 2


def test_which_arguments_a_result_depends_on():
  key = jax.random.key(0)
  x = jnp.ones((2, 3))
  assert straight.reads(lambda x, key: 2 * x, x, key) == (True, False)
  assert straight.reads(lambda x, key: x + jax.random.normal(key, x.shape), x, key) == (True, True)

  def by_steps(x, keys):
    noise = lambda key, k: jax.random.normal(jax.random.fold_in(key, k), (3,))
    step = lambda carry, k: (carry + jax.vmap(noise, (0, None))(keys['of'], k), None)
    return jax.lax.scan(step, jnp.zeros_like(x), jnp.arange(2))[0]

  assert straight.reads(by_steps, x, {'of': jax.random.split(key, 2)}) == (False, True)


def test_the_types_that_are_computed_with_also_in_loops():
  def function(x):
    half = lambda carry, _: ((carry.astype(jnp.bfloat16) * 2).astype(jnp.float32), None)
    return jax.lax.scan(half, x, None, length=2)[0]

  assert straight.types(function, jnp.ones(3)) == {'float32', 'bfloat16'}
  assert straight.types(lambda x: x + 1, jnp.ones(3)) == {'float32'}
