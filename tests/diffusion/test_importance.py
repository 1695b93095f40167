"""Training times drawn by the losses that were seen at them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.diffusion import importance


def test_golden_probabilities_and_factors():
  history = {
    'losses': jnp.arange(1.0, 5)[:, None] * jnp.ones((4, importance.MEMORY)),
    'counts': jnp.full(4, importance.MEMORY),
  }
  p = importance.probabilities(history)
  np.testing.assert_allclose(p, [0.10015, 0.20005, 0.29995, 0.39985], rtol=1e-6)
  index, factor = importance.draw(history, jax.random.key(0), 1000)
  factors = np.array([2.49625562, 1.24968758, 0.83347225, 0.62523446])
  np.testing.assert_allclose(factor, factors[index], rtol=1e-6)
  np.testing.assert_allclose(np.bincount(index, minlength=4) / 1000, p, atol=0.05)
  history['counts'] = history['counts'].at[2].add(-1)  # one index has not its ten losses yet
  np.testing.assert_allclose(importance.probabilities(history), 0.25)
  np.testing.assert_allclose(importance.draw(history, jax.random.key(0), 8)[1], 1)


def test_root_mean_square_of_the_last_losses():
  history = importance.start(2)
  for k in range(14):
    history = importance.update(history, jnp.array([0, 1]), jnp.array([k + 1.0, 2.0]))
  p = importance.probabilities(history)
  w = np.array([np.sqrt(np.mean(np.arange(5.0, 15) ** 2)), 2.0])
  np.testing.assert_allclose(p, 0.999 * w / w.sum() + 0.0005, rtol=1e-6)
  assert history['counts'].tolist() == [14, 14]


@pytest.mark.parametrize('batch', [1, 7, 64])
def test_losses_are_appended_in_the_order_of_the_batch(batch):
  """Against one example after the other, with many of one index in a batch."""
  rng = np.random.default_rng(batch)
  history, last = importance.start(3), [[] for _ in range(3)]
  for _ in range(5):
    index, losses = rng.choice(3, batch, p=[0.7, 0.2, 0.1]), rng.normal(size=batch)
    history = jax.jit(importance.update)(history, jnp.asarray(index), jnp.asarray(losses, jnp.float32))
    for i, loss in zip(index, losses, strict=True):
      last[i].append(loss)
  for i in range(3):
    kept = np.sort(np.float32(last[i][-importance.MEMORY :]))
    stored = np.asarray(history['losses'][i])
    np.testing.assert_array_equal(np.sort(stored)[np.sort(stored) != 0], kept[kept != 0])
    assert int(history['counts'][i]) == len(last[i])


def test_a_mean_so_weighted_is_that_of_uniform_times():
  losses = jnp.array([1.0, 10.0, 100.0])
  history = importance.start(3)
  for _ in range(importance.MEMORY):
    history = importance.update(history, jnp.arange(3), losses)
  index, factor = importance.draw(history, jax.random.key(1), 4000)
  weighted = np.asarray(factor * losses[index])
  assert weighted.mean() == pytest.approx(37, rel=0.02)
  assert weighted.std() < 0.2 * np.std(np.asarray(losses))


def test_eight_devices_keep_the_history_of_one():
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  rng = np.random.default_rng(0)
  index, losses = jnp.asarray(rng.integers(0, 4, 32)), jnp.asarray(rng.normal(size=32), jnp.float32)
  alone = jax.jit(importance.update)(importance.start(4), index, losses)
  together = jax.jit(importance.update)(
    importance.start(4), jax.device_put(index, over), jax.device_put(losses, over)
  )
  jax.tree.map(np.testing.assert_array_equal, alone, together)
