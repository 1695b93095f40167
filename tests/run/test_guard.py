"""Bad updates stop the run or are left out and counted; gradients are the same in parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.errors import UserError
from vaediff.experiments import base
from vaediff.run import guard as guarded
from vaediff.run.guard import GUARD, HEALTHY, Guarded


@dataclasses.dataclass(frozen=True)
class Steps:
  """Adds the batch's value to a parameter, and calls it the loss."""

  latent_dim: int = 3
  networks, frozen, noise_shape, takes_x0_vae, num_function_evaluations = {}, {}, (), False, 0
  reads_image = False

  def eval_step(self, params, frozen, batch, key):
    return {}

  def sample(self, params, frozen, condition, keys):
    return {}

  def init(self, key):
    network = base.Network(params={'w': jnp.float32(0)}, opt_state=(), ema_params=None)
    return base.TrainState(step=jnp.int32(0), networks={'n': network}, extra={'other': jnp.int32(7)})

  def train_step(self, state, frozen, batch, key):
    network = state.networks['n']
    network = network.replace(params={'w': network.params['w'] + batch['value']})
    state = state.replace(step=state.step + 1, networks={'n': network})
    return state, {'loss': batch['value'], 'grad_norm/n': batch['value'] ** 2}


def run(values, policy='stop', spike_factor=0.0):
  experiment = Guarded(inner=Steps(), policy=policy, spike_factor=spike_factor)
  state, seen = experiment.init(jax.random.key(0)), []
  step = jax.jit(experiment.train_step)
  for value in values:
    state, metrics = step(state, {}, {'value': jnp.float32(value)}, jax.random.key(1))
    seen.append(bool(metrics[HEALTHY]))
  return state, metrics, seen


def test_everything_else_is_the_experiments_own():
  experiment = Guarded(inner=Steps(), policy='stop', spike_factor=0.0)
  assert experiment.latent_dim == 3
  with pytest.raises(AttributeError):
    _ = experiment.none
  assert set(experiment.init(jax.random.key(0)).extra) == {'other', GUARD}


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
  steady = [1.0] * guarded.WARMUP
  assert run([1, 50], spike_factor=10.0)[2] == [True, True]
  assert run([*steady, 9.0], spike_factor=10.0)[2][-1]
  assert not run([*steady, 11.0], spike_factor=10.0)[2][-1]
  state, metrics, _ = run([*steady, 11.0, 1.0], 'skip', 10.0)
  assert int(metrics['skipped_updates']) == 1
  assert float(state.extra[GUARD]['loss_average']) == pytest.approx(1)


def test_the_policy_may_change_within_a_run():
  """The state has the same structure under every policy."""
  trees = [jax.tree.structure(run([1], policy)[0]) for policy in guarded.POLICIES]
  assert trees[0] == trees[1]


def test_values_that_are_not_allowed():
  from ml_collections import ConfigDict

  for changes, message in (
    ({'on_bad_step': 'ignore'}, "on_bad_step is 'ignore'; valid: stop, skip"),
    ({'spike_factor': 0.5}, r'spike_factor must be 0 \(off\) or above 1, got 0.5'),
  ):
    train = ConfigDict({'on_bad_step': 'stop', 'spike_factor': 0.0, **changes})
    with pytest.raises(UserError, match=message):
      Guarded.around(Steps(), train)


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
