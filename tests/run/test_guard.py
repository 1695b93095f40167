"""Bad updates stop the run or are left out and counted; gradients are the same in parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from vaediff.experiments import base
from vaediff.run import guard
from vaediff.run.guard import GUARD, HEALTHY


def init(key):
  network = base.Network(params={'w': jnp.float32(0)}, opt_state=(), ema_params=None)
  return base.TrainState(step=jnp.int32(0), networks={'n': network}, extra={'other': jnp.int32(7)})


def train_step(state, frozen, batch, key):
  """Adds the batch's value to a parameter, and calls it the loss."""
  network = state.networks['n']
  network = network.replace(params={'w': network.params['w'] + batch['value']})
  state = state.replace(step=state.step + 1, networks={'n': network})
  return state, {'loss': batch['value'], 'grad_norm/n': batch['value'] ** 2}


def guarded(update=train_step, policy='stop', spike_factor=0.0):
  return guard.guarded(update, ConfigDict({'on_bad_step': policy, 'spike_factor': spike_factor}))


def run(values, policy='stop', spike_factor=0.0):
  state, seen = guard.with_counts(init)(jax.random.key(0)), []
  step = jax.jit(guarded(policy=policy, spike_factor=spike_factor))
  for value in values:
    state, metrics = step(state, {}, {'value': jnp.float32(value)}, jax.random.key(1))
    seen.append(bool(metrics[HEALTHY]))
  return state, metrics, seen


def test_everything_else_is_the_experiments_own():
  start, own = guard.with_counts(init)(jax.random.key(0)), init(jax.random.key(0))
  assert set(start.extra) == {'other', GUARD}
  assert jax.tree.structure(start.replace(extra=own.extra)) == jax.tree.structure(own)
  state, metrics, _ = run([1, 2])
  batch = {'value': jnp.float32(2)}
  same, same_metrics = train_step(train_step(own, {}, {'value': jnp.float32(1)}, None)[0], {}, batch, None)
  assert state.networks == same.networks and int(state.step) == int(same.step) == 2
  assert set(metrics) == {*same_metrics, HEALTHY}
  assert all(float(metrics[name]) == float(value) for name, value in same_metrics.items())


def test_an_update_that_makes_extra_anew_keeps_the_counts():
  """As a stage does that returns extra = {its own}: the guard's part is put back."""

  def forgets(state, frozen, batch, key):
    state, metrics = train_step(state, frozen, batch, key)
    return state.replace(extra={'other': state.extra['other'] + 1}), metrics

  for policy in guard.POLICIES:
    state = guard.with_counts(init)(jax.random.key(0))
    for _ in range(3):
      state, _ = guarded(forgets, policy)(state, {}, {'value': jnp.float32(1)}, jax.random.key(1))
    assert int(state.extra['other']) == 10 and int(state.extra[GUARD]['seen']) == 3


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_loss_that_is_not_finite_stops(bad):
  _, metrics, healthy = run([1, 2, bad])
  assert healthy == [True, True, False] and 'skipped_updates' not in metrics


def test_a_gradient_that_is_not_finite_stops_too():
  _, _, healthy = run([1, 1e30])  # its square overflows
  assert healthy == [True, False]


@pytest.mark.parametrize('bad', [np.nan, np.inf, 1e30])
def test_or_is_left_out_and_counted(bad):
  state, metrics, healthy = run([1, 2, bad, 4, bad], 'skip')
  assert healthy == [True] * 5 and int(metrics['skipped_updates']) == 2
  assert float(state.networks['n'].params['w']) == 7 and int(state.step) == 5
  assert int(state.extra['other']) == 7 and int(state.extra[GUARD]['seen']) == 3


def test_a_jump_is_looked_for_after_a_while():
  steady = [1.0] * guard.WARMUP
  assert run([1, 50], spike_factor=10.0)[2] == [True, True]
  assert run([*steady, 9.0], spike_factor=10.0)[2][-1]
  assert not run([*steady, 11.0], spike_factor=10.0)[2][-1]
  state, metrics, _ = run([*steady, 11.0, 1.0], 'skip', 10.0)
  assert int(metrics['skipped_updates']) == 1
  assert float(state.extra[GUARD]['loss_average']) == pytest.approx(1)


def test_the_policy_may_change_within_a_run():
  """The state has the same structure under every policy."""
  trees = [jax.tree.structure(run([1], policy)[0]) for policy in guard.POLICIES]
  assert trees[0] == trees[1]


# Microbatches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('parts', [2, 3, 6])
def test_gradients_are_the_same_in_parts(parts):
  batch = {'x': jax.random.normal(jax.random.key(0), (12, 5)), 'y': jnp.arange(12.0)}

  def loss_fn(params, batch, key):
    error = batch['x'] @ params['w'] - batch['y']
    return jnp.mean(error**2), {'loss': jnp.mean(error**2), 'bias': jnp.mean(error)}

  params = {'w': jnp.arange(5.0)}
  whole = base.gradients(loss_fn, params, batch, jax.random.key(1), 1)
  split = jax.jit(base.gradients, static_argnums=(0, 4))(loss_fn, params, batch, jax.random.key(1), parts)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, split)


def test_each_part_has_noise_of_its_own():
  def loss_fn(params, batch, key):
    return params['w'] * jax.random.normal(key), {'loss': params['w']}

  grads = [
    float(base.gradients(loss_fn, {'w': jnp.float32(1)}, {'x': jnp.zeros(8)}, jax.random.key(0), n)[0]['w'])
    for n in (1, 2, 4)
  ]
  assert len(set(grads)) == 3
