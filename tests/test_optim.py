"""Learning rates, averages and updates against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from vaediff import optim
from vaediff.errors import UserError
from vaediff.experiments.base import Network, apply_gradients


def settings(**changes):
  return ConfigDict(
    {
      'learning_rate': 0.1,
      'schedule': 'constant',
      'end_learning_rate': 0.0,
      'warmup_steps': 0,
      'b1': 0.9,
      'b2': 0.999,
      'eps': 1e-8,
      'weight_decay': 0.0,
      'clip_norm': 0.0,
      'ema_decay': 0.9,
      'ema_warmup': False,
      **changes,
    }
  )


def rate(step, **changes):
  return float(optim.learning_rate(settings(**changes), 100)(step))


def test_warmup_is_linear_from_zero_then_constant():
  assert [rate(step, warmup_steps=10) for step in (0, 5, 10, 99)] == pytest.approx([0.0, 0.05, 0.1, 0.1])


def test_cosine_ends_at_zero_at_the_last_step():
  # half way between the end of the warm-up and the last step it is half the peak
  values = [rate(step, schedule='cosine', warmup_steps=20) for step in (10, 20, 60, 100)]
  assert values == pytest.approx([0.05, 0.1, 0.05, 0.0], abs=1e-8)


def test_linear_ends_at_its_end_at_the_last_step():
  values = [rate(step, schedule='linear', end_learning_rate=0.02) for step in (0, 50, 100, 200)]
  assert values == pytest.approx([0.1, 0.06, 0.02, 0.02])


@pytest.mark.parametrize('warmup', [False, True])
def test_average_is_the_recursion(warmup):
  optimizer = optim.make_optimizer(settings(ema_warmup=warmup), 100)
  average, expected = optimizer.init_ema({'w': jnp.zeros(())}), 0.0
  for step, value in enumerate([3.0, -1.0, 5.0]):
    average = optimizer.update_ema(average, {'w': jnp.float32(value)}, jnp.int32(step))
    decay = min(0.9, (1 + step) / (10 + step)) if warmup else 0.9
    expected = decay * expected + (1 - decay) * value
  assert float(average['w']) == pytest.approx(expected, rel=1e-6)


def test_no_average_is_kept_with_decay_zero():
  optimizer = optim.make_optimizer(settings(ema_decay=0.0), 100)
  params = {'w': jnp.ones(3)}
  assert optimizer.init_ema(params) is None
  network = Network(params=params, opt_state=optimizer.transform.init(params), ema_params=None)
  assert network.eval_params is params


def test_the_first_adam_update_is_the_rate_times_the_sign():
  optimizer = optim.make_optimizer(settings(), 100)
  params = {'w': jnp.zeros(3)}
  network = Network(
    params=params, opt_state=optimizer.transform.init(params), ema_params=optimizer.init_ema(params)
  )
  grads = {'w': jnp.array([2.0, -5.0, 1e-3])}
  network = apply_gradients(network, grads, optimizer, jnp.int32(0))
  np.testing.assert_allclose(network.params['w'], [-0.1, 0.1, -0.1], rtol=1e-4)
  np.testing.assert_allclose(network.ema_params['w'], 0.1 * network.params['w'], rtol=1e-5)


def test_clipping_bounds_the_norm_before_adam():
  """The second moment holds (1 - b2) g^2, so it shows the gradient that Adam was given."""
  optimizer = optim.make_optimizer(settings(clip_norm=1.0), 100)
  params = {'w': jnp.zeros(2)}
  _, state = optimizer.transform.update(
    {'w': jnp.array([30.0, 40.0])}, optimizer.transform.init(params), params
  )
  moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2,)]
  np.testing.assert_allclose(moments[1], 1e-3 * np.array([0.36, 0.64]), rtol=1e-4)


@pytest.mark.parametrize(
  ('field', 'value'), [('learning_rate', 0.0), ('b1', 1.0), ('warmup_steps', -1), ('ema_decay', -0.1)]
)
def test_bad_values_are_named(field, value):
  with pytest.raises(UserError, match=f'optim.{field} must be .* got {value}'):
    optim.make_optimizer(settings(**{field: value}), 100)


@pytest.mark.parametrize('largest', [0.5, 5.0, 50.0])
def test_clipping_is_that_of_optax(largest):
  grads = {'a': jnp.array([3.0, -4.0]), 'b': jnp.array([[12.0]])}  # of norm 13
  found, wanted = (
    clip.update(grads, clip.init(grads))[0]
    for clip in (optim.clip_by_global_norm(largest), optax.clip_by_global_norm(largest))
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, wanted)
  assert float(optim.global_norm(found)) == pytest.approx(min(13.0, largest), rel=1e-6)


def test_clipping_leaves_zeros_and_shows_what_is_not_finite():
  clip = optim.clip_by_global_norm(1.0)
  for value in (0.0, np.nan, np.inf):
    found = np.asarray(clip.update({'a': jnp.full(2, value)}, clip.init({}))[0]['a'])
    np.testing.assert_array_equal(found, [0.0, 0.0] if value == 0 else [np.nan, np.nan])
