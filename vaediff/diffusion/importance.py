"""Importance sampling of the training time by the second moment of the losses seen at it.

Nichol & Dhariwal 2021, section 3.3 (arXiv:2102.09672): the terms of the bound differ by orders of magnitude,
and so does the noise of its gradient under uniform times. With w_k the root mean square of the last losses of
table index k,

    p_k = (1 - UNIFORM_SHARE) w_k / sum_j w_j + UNIFORM_SHARE / T,

and a loss drawn so counts 1 / (T p_k) times. Until every index has `MEMORY` losses, p is uniform. The history
is part of the training state: a resumed run draws on. Indices are k = i - 1 = 0 .. T - 1, as the rows of a
grid's steps in `likelihood`.

Imports jax, `vaediff.types` and nothing else of vaediff.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

History = dict[str, Array]
"""'losses' [T, MEMORY], the last of each index in a ring, and 'counts' [T], how many there ever were."""
MEMORY = 10
UNIFORM_SHARE = 0.001


def start(train_steps: int) -> History:
  """Returns the history of no loss."""
  return {
    'losses': jnp.zeros((train_steps, MEMORY), jnp.float32),
    'counts': jnp.zeros(train_steps, jnp.int32),
  }


def probabilities(history: History) -> Float[Array, ' T']:
  """Returns p_k; uniform until every index has its losses."""
  total = history['counts'].shape[0]
  weights = jnp.sqrt(jnp.mean(history['losses'] ** 2, axis=1))
  known = jnp.all(history['counts'] >= MEMORY) & (jnp.sum(weights) > 0)
  share = weights / jnp.where(known, jnp.sum(weights), 1.0)
  return jnp.where(known, (1 - UNIFORM_SHARE) * share + UNIFORM_SHARE / total, 1 / total)


def draw(history: History, key: jax.Array, batch: int) -> tuple[Int[Array, ' batch'], Float[Array, ' batch']]:
  """Returns an index of each example, and the factor 1 / (T p) of its loss."""
  p = probabilities(history)
  index = jax.random.choice(key, p.shape[0], (batch,), p=p)
  return index, 1 / (p.shape[0] * p[index])


def update(history: History, index: Int[Array, ' batch'], losses: Float[Array, ' batch']) -> History:
  """Returns the history with the losses of a whole batch appended, in the order of its examples.

  Of more than `MEMORY` losses of one index the last ones stay. Losses are those before the factor.
  """
  order = jnp.arange(len(index))
  same = index[:, None] == index[None, :]
  before = jnp.sum(same & (order[None, :] < order[:, None]), axis=1)
  after = jnp.sum(same & (order[None, :] > order[:, None]), axis=1)
  place = (history['counts'][index] + before) % MEMORY
  # an index beyond the table is dropped: no two examples write to the same place
  row = jnp.where(after < MEMORY, index, history['counts'].shape[0])
  return {
    'losses': history['losses'].at[row, place].set(losses.astype(jnp.float32), mode='drop'),
    'counts': history['counts'].at[index].add(1),
  }
