import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vaediff.errors import UserError
from vaediff.models import codebook


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def arrays(state):
  return {name: np.asarray(getattr(state, name)) for name in ('codes', 'counts', 'sums')}


@pytest.mark.parametrize('chunk', [4096, 5, 8])
def test_nearest_is_the_least_distance(rng, monkeypatch, chunk):
  monkeypatch.setattr(codebook, 'CHUNK', chunk)
  z, codes = rng.normal(size=(3, 7, 5, 4)), rng.normal(size=(32, 4))
  distances = np.square(z[..., None, :] - codes).sum(axis=-1)
  actual = codebook.nearest(jnp.float32(z), jnp.float32(codes))
  np.testing.assert_array_equal(actual, distances.argmin(axis=-1))


@pytest.mark.parametrize('chunk', [4096, 3])
def test_the_first_of_equal_codes_is_chosen(monkeypatch, chunk):
  monkeypatch.setattr(codebook, 'CHUNK', chunk)
  codes = jnp.float32([[5.0], [1.0], [-1.0], [1.0], [1.0]])
  np.testing.assert_array_equal(codebook.nearest(jnp.float32([[0.9], [0.0], [9.0]]), codes), [1, 1, 0])


def test_gradient_passes_straight_through(rng):
  z, codes = jnp.float32(rng.normal(size=(2, 3, 4))), jnp.float32(rng.normal(size=(8, 4)))
  z_q, indices = codebook.quantize(z, codes)
  np.testing.assert_allclose(z_q, codebook.lookup(codes, indices), atol=1e-6)
  weight = jnp.float32(rng.normal(size=z.shape))
  to_z, to_codes = jax.grad(lambda z, e: (weight * codebook.quantize(z, e)[0]).sum(), argnums=(0, 1))(
    z, codes
  )
  np.testing.assert_allclose(to_z, weight, atol=1e-6)
  assert not np.any(to_codes)


def test_beta_is_on_the_commitment_term_and_each_loss_moves_one_side(rng):
  z, codes = jnp.float32(rng.normal(size=(6, 4))), jnp.float32(rng.normal(size=(8, 4)))
  indices = codebook.nearest(z, codes)
  error = np.square(np.asarray(z) - np.asarray(codes)[indices]).mean()

  def losses(z, codes):
    e = codebook.lookup(codes, indices)
    return jnp.stack([codebook.commitment_loss(z, e, beta=0.25), codebook.codebook_loss(z, e)])

  np.testing.assert_allclose(losses(z, codes), [0.25 * error, error], rtol=1e-5)
  to_z, to_codes = jax.jacrev(losses, argnums=(0, 1))(z, codes)
  difference = np.asarray(z) - np.asarray(codes)[indices]
  np.testing.assert_allclose(to_z[0], 0.25 * 2.0 * difference / z.size, atol=1e-6)
  assert not np.any(to_z[1]) and not np.any(to_codes[0])
  expected = np.zeros(codes.shape)
  np.add.at(expected, np.asarray(indices), -2.0 * difference / z.size)
  np.testing.assert_allclose(to_codes[1], expected, atol=1e-6)


def test_the_nearest_code_is_found_far_from_zero(rng):
  """Codes a thousand times as far from zero as from each other; squares alone are off in a third of them."""
  codes, z = 1000.0 + rng.normal(size=(64, 3)), 1000.0 + rng.normal(size=(200, 3))
  codes, z = np.float32(codes), np.float32(z)
  exact = np.square(z[:, None].astype(np.float64) - codes[None]).sum(axis=-1)
  found = np.asarray(codebook.nearest(jnp.asarray(z), jnp.asarray(codes)))
  np.testing.assert_allclose(exact[np.arange(200), found], exact.min(axis=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ('num_vectors', 'size', 'threshold'), [(64, 512, 1.0), (1023, 512, 1.0), (64, 512, 0.1)]
)
def test_more_codes_than_a_batch_can_feed_are_refused(num_vectors, size, threshold):
  message = (
    rf'loss.restart_below is {threshold:g}, but {size} codes \(model.codebook_size\) share the {num_vectors} '
    rf'vectors .* lower it to {num_vectors / (2 * size):.3g} or less'
  )
  with pytest.raises(UserError, match=message):
    codebook.check_restarts(num_vectors, size, threshold)


def test_what_a_batch_can_feed_restarts_few_codes(rng):
  """At the limit of what is allowed, and with codes that are used alike, hardly any start anew."""
  size = 64
  num_vectors = 2 * size
  codebook.check_restarts(num_vectors, size, 1.0)
  codebook.check_restarts(8, 1024, 0.0)

  def step(state, key):
    key_rows, key_restart = jax.random.split(key)
    rows = jax.random.randint(key_rows, (num_vectors,), 0, size)
    z = state.codes[rows]
    updated = codebook.ema_update(state, z, rows)
    dead = jnp.mean(updated.counts < 1.0)
    return codebook.restart_dead(updated, z, key_restart), dead

  start = codebook.init_codes(jax.random.key(0), size, 2)
  start = start.replace(counts=2.0 * start.counts, sums=2.0 * start.sums)
  _, dead = jax.lax.scan(step, start, jax.random.split(jax.random.key(1), 300))
  assert float(dead.mean()) < 0.01


def test_initial_codes(key, rng):
  key_codes, key_many, key_few = jax.random.split(key, 3)
  state = codebook.init_codes(key_codes, 50, 4)
  assert state.codes.shape == (50, 4) and 0.019 < np.abs(state.codes).max() <= 0.02
  np.testing.assert_array_equal(state.counts, np.ones(50))
  np.testing.assert_array_equal(state.sums, state.codes)

  z = jnp.float32(rng.normal(size=(4, 5, 5, 3)))
  state = codebook.data_init(z, key_many, 60)
  rows = {tuple(row) for row in np.asarray(z).reshape(-1, 3).tolist()}
  chosen = {tuple(row) for row in np.asarray(state.codes).tolist()}
  assert chosen <= rows and len(chosen) == 60
  assert {tuple(row) for row in np.asarray(codebook.data_init(z, key_few, 300).codes).tolist()} <= rows


def test_moving_average_is_the_formula(rng):
  size, dim, decay, eps = 6, 3, 0.9, 1e-2
  z, indices = rng.normal(size=(2, 5, dim)), rng.integers(0, size - 1, size=(2, 5))
  codes, counts, sums = (
    rng.normal(size=(size, dim)),
    rng.uniform(1, 2, size=size),
    rng.normal(size=(size, dim)),
  )
  state = codebook.Codebook(codes=jnp.float32(codes), counts=jnp.float32(counts), sums=jnp.float32(sums))
  actual = arrays(codebook.ema_update(state, jnp.float32(z), jnp.int32(indices), decay, eps))

  for k in range(size):
    mine = z[indices == k]
    counts[k] = decay * counts[k] + (1 - decay) * len(mine)
    sums[k] = decay * sums[k] + (1 - decay) * mine.sum(axis=0)
  n = counts.sum()
  smoothed = (counts + eps) / (n + size * eps) * n
  np.testing.assert_allclose(actual['counts'], counts, rtol=1e-5)
  np.testing.assert_allclose(actual['sums'], sums, atol=1e-6)
  np.testing.assert_allclose(actual['codes'], sums / smoothed[:, None], rtol=1e-4, atol=1e-6)


def test_moving_average_against_numbers_found_by_hand():
  codes = jnp.float32([[0, 0], [1, 0], [0, 2]])
  state = codebook.Codebook(codes=codes, counts=jnp.ones(3), sums=codes)
  z = jnp.float32([[0.1, 0], [0.2, 0.1], [0.9, 0.2], [0, 0]])
  indices = codebook.nearest(z, codes)
  np.testing.assert_array_equal(indices, [0, 0, 1, 0])
  after = arrays(codebook.ema_update(state, z, indices, 0.99, 1e-5))
  np.testing.assert_allclose(after['counts'], [1.02, 1, 0.99], rtol=1e-6)
  np.testing.assert_allclose(after['sums'], [[0.003, 0.001], [0.999, 0.002], [0, 1.98]], rtol=1e-5)
  wanted = [[0.00294117695, 0.000980392317], [0.998999967, 0.00199999993], [0, 1.99999973]]
  np.testing.assert_allclose(after['codes'], wanted, rtol=1e-5)
  counted = codebook.count(state, indices, 0.99)
  np.testing.assert_allclose(counted.counts, after['counts'], rtol=1e-6)
  np.testing.assert_array_equal(counted.codes, codes)
  np.testing.assert_array_equal(counted.sums, codes)


def test_perplexities_against_numbers_found_by_hand():
  indices = jnp.repeat(jnp.arange(5), jnp.array([8, 4, 2, 1, 1]), total_repeat_length=16)
  used, perplexity = codebook.usage(indices, 8)
  np.testing.assert_allclose([used, perplexity], [5 / 8, 3.66801617], rtol=1e-6)
  np.testing.assert_allclose(codebook.usage(jnp.arange(512), 512)[1], 511.9999738, rtol=1e-5)


def test_vectors_at_length_one(rng):
  z = jnp.float32(rng.normal(size=(3, 4, 5)))
  np.testing.assert_allclose(np.linalg.norm(codebook.unit(z), axis=-1), 1, rtol=1e-6)
  np.testing.assert_allclose(codebook.unit(1e-6 * z), codebook.unit(1e3 * z), rtol=1e-5)
  gradient = jax.grad(lambda z: codebook.unit(z).sum())(jnp.zeros((2, 3)))
  assert np.isfinite(gradient).all()


def test_entropies_of_codes():
  """log K less where every vector has its own code, nothing where none has, or all have one."""
  codes, loss = 3.0 * jnp.eye(4), jax.jit(codebook.entropy_loss, static_argnums=2)
  assert float(loss(codes, codes)) == pytest.approx(-np.log(4), abs=1e-5)
  assert float(loss(jnp.zeros((6, 4)), codes)) == pytest.approx(0, abs=1e-5)
  assert float(loss(codes[:1].repeat(5, 0), codes)) == pytest.approx(0, abs=1e-5)
  # two vectors between two codes at distances 0 and 1: p = (1, e^-1) / (1 + e^-1) at temperature 1
  p = 1 / (1 + np.exp(-1))
  own = -p * np.log(p) - (1 - p) * np.log(1 - p)
  found = loss(jnp.float32([[0.0], [1.0]]), jnp.float32([[0.0], [1.0]]), 1.0)
  assert float(found) == pytest.approx(own - np.log(2), abs=1e-5)


def test_only_dead_codes_restart(key, rng):
  z = jnp.float32(rng.normal(size=(20, 2)))
  codes = jnp.float32(10.0 + rng.normal(size=(4, 2)))
  state = codebook.Codebook(codes=codes, counts=jnp.float32([0.5, 1.0, 0.999, 7.0]), sums=2.0 * codes)
  after = codebook.restart_dead(state, z, key, threshold=1.0)
  np.testing.assert_array_equal(after.counts, [1.0, 1.0, 1.0, 7.0])
  rows = {tuple(row) for row in np.asarray(z).tolist()}
  for k in (0, 2):
    assert tuple(np.asarray(after.codes[k]).tolist()) in rows
    np.testing.assert_array_equal(after.sums[k], after.codes[k])
  for k in (1, 3):
    np.testing.assert_array_equal(after.codes[k], codes[k])
    np.testing.assert_array_equal(after.sums[k], 2.0 * codes[k])


def test_usage_and_perplexity():
  used, perplexity = codebook.usage(jnp.int32([[0, 1], [2, 3]]), 16)
  np.testing.assert_allclose([used, perplexity], [0.25, 4.0], rtol=1e-5)
  used, perplexity = codebook.usage(jnp.int32([5, 5, 5, 5]), 16)
  np.testing.assert_allclose([used, perplexity], [1 / 16, 1.0], rtol=1e-5)


SIZE, DIM, ROWS, STEPS = 512, 8, 2048, 300


def _batch(key):
  """Vectors around eight centres, far from each other compared with their spread."""
  key_label, key_noise = jax.random.split(key)
  centres = 3.0 * jax.random.normal(jax.random.key(77), (8, DIM))
  label = jax.random.randint(key_label, (ROWS,), 0, 8)
  return centres[label] + 0.3 * jax.random.normal(key_noise, (ROWS, DIM))


@functools.partial(jax.jit, static_argnames=('from_data', 'restart'))
def _train(key, from_data, restart):
  """Returns the perplexity of a batch after 300 steps."""
  key_init, key_data, key_steps, key_last = jax.random.split(key, 4)
  if from_data:
    state = codebook.data_init(_batch(key_data), key_init, SIZE)
  else:
    state = codebook.init_codes(key_init, SIZE, DIM)

  def step(state, key):
    key_batch, key_restart = jax.random.split(key)
    z = _batch(key_batch)
    state = codebook.ema_update(state, z, codebook.nearest(z, state.codes))
    return codebook.restart_dead(state, z, key_restart) if restart else state, None

  state, _ = jax.lax.scan(step, state, jax.random.split(key_steps, STEPS))
  return codebook.usage(codebook.nearest(_batch(key_last), state.codes), SIZE)[1]


@pytest.mark.slow
def test_data_init_and_restarts_keep_the_codebook_in_use(key):
  assert _train(key, True, True) > 400


@pytest.mark.slow
def test_codes_that_start_around_zero_are_one_per_cluster(key):
  assert 6 < _train(key, False, False) < 10


def test_counts_of_zero_would_make_unused_codes_explode(key):
  key_init, key_data = jax.random.split(key)
  z, state = _batch(key_data), codebook.init_codes(key_init, SIZE, DIM)
  indices = codebook.nearest(z, state.codes)
  largest = lambda state: float(np.abs(codebook.ema_update(state, z, indices).codes).max())
  assert largest(state) < 10 < 100 < largest(state.replace(counts=jnp.zeros(SIZE)))


def test_one_device_and_eight_are_the_same(rng):
  z = jnp.float32(rng.normal(size=(16, 4, 4, 3)))

  def run(z):
    key_init, key_restart = jax.random.split(jax.random.key(3))
    state = codebook.data_init(z[:, :2], key_init, 40)
    indices = codebook.nearest(z, state.codes)
    updated = codebook.ema_update(state, z, indices)
    restarted = codebook.restart_dead(updated, z, key_restart, threshold=1.03)
    z_q, again = codebook.quantize(z, restarted.codes)
    used, perplexity = codebook.usage(again, 40)
    e = codebook.lookup(restarted.codes, again)
    losses = codebook.commitment_loss(z, e), codebook.codebook_loss(z, e)
    return updated, restarted, z_q, indices, again, used, perplexity, losses

  results = []
  for count in (1, 8):
    mesh = jax.make_mesh((count,), ('data',), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
    sharded = jax.device_put(z, NamedSharding(mesh, PartitionSpec('data')))
    results.append(jax.tree.map(np.asarray, jax.jit(run)(sharded)))
  updated, restarted = results[0][:2]
  dead = (updated.counts < 1.03).sum()
  assert 0 < dead < 40 and (updated.codes != restarted.codes).any(axis=1).sum() == dead
  for one, eight in zip(*map(jax.tree.leaves, results), strict=True):
    np.testing.assert_allclose(one, eight, rtol=1e-5, atol=1e-6)


def test_bfloat16_vectors_are_summed_in_float32(rng):
  z = jnp.ones((4096, 2), jnp.bfloat16)
  state = codebook.init_codes(jax.random.key(0), 2, 2)
  after = codebook.ema_update(state, z, jnp.zeros(4096, jnp.int32), decay=0.0)
  assert after.codes.dtype == jnp.float32
  np.testing.assert_array_equal(after.sums[0], [4096.0, 4096.0])
