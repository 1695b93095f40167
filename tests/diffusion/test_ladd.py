"""Adversarial distillation's times, losses and measures against their definitions and the samplers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.diffusion import ladd, samplers, schedules

LINEAR, COSINE = schedules.make_schedule('linear'), schedules.make_schedule('cosine')


def teacher(y, t):
  """Something that is neither linear in y nor constant in t."""
  return jnp.tanh(1.3 * y - t[:, None, None, None]) + 0.2 * y


def test_hinge_losses_are_means_over_positions_and_then_over_heads():
  real = [jnp.array([[-1.5, 0.0, 2.0, 0.5]]), jnp.array([[3.0]])]
  fake = [jnp.array([[0.3, -4.0, 1.0, -1.0]]), jnp.array([[-0.5]])]
  first = (2.5 + 1.3) + (1.0 + 0.0) + (0.0 + 2.0) + (0.5 + 0.0)
  np.testing.assert_allclose(ladd.discriminator_loss(real, fake), [(first / 4 + 0.5) / 2], rtol=1e-6)
  np.testing.assert_allclose(ladd.generator_loss(fake), [-(-3.7 / 4 - 0.5) / 2], rtol=1e-6)


def test_r1_is_the_squared_slope_of_each_heads_logits():
  shapes = [(3, 4, 4, 2), (3, 2, 2, 5)]
  maps, others = (
    [jax.random.normal(jax.random.key(10 * seed + k), shape) for k, shape in enumerate(shapes)]
    for seed in (0, 1)
  )

  def judge(maps):
    return [jnp.sum(jnp.sin(x) * a, axis=-1).reshape(3, -1) for x, a in zip(maps, others, strict=True)]

  expected = [np.sum((np.cos(x) * a) ** 2, axis=(1, 2, 3)) for x, a in zip(maps, others, strict=True)]
  np.testing.assert_allclose(ladd.r1_of_heads(judge, maps), np.mean(expected, axis=0), rtol=1e-5)


@pytest.mark.parametrize('schedule', [LINEAR, COSINE])
def test_renoising_levels_are_those_of_a_rectified_flow_at_logit_normal_times(schedule):
  """Whatever the schedule calls its times: at t = sigmoid(1) the linear one holds next to no image."""
  t = np.asarray(ladd.sample_renoising_time(jax.random.key(0), 20_000, 1.0, 0.5, schedule), np.float64)
  alpha, sigma = schedule.alpha(t), schedule.sigma(t)
  logit = np.log(sigma / alpha)  # of the t that has sigma / alpha = t / (1 - t)
  assert np.mean(logit) == pytest.approx(1.0, abs=0.02) and np.std(logit) == pytest.approx(0.5, abs=0.02)
  # wide enough to leave both ends
  wide = np.asarray(ladd.sample_renoising_time(jax.random.key(1), 1000, 0.0, 50.0, schedule))
  assert wide.min() == pytest.approx(1e-3) and wide.max() == 1.0
  if schedule.train_steps:
    np.testing.assert_allclose(t * 1000, np.round(t * 1000), atol=1e-3)
  else:
    assert np.abs(t * 1000 - np.round(t * 1000)).max() > 0.4


@pytest.mark.parametrize('schedule', [LINEAR, COSINE])
@pytest.mark.parametrize('num_calls', [1, 2, 4])
def test_finishing_is_the_ddim_sampler_from_each_examples_time(schedule, num_calls):
  y = jax.random.normal(jax.random.key(0), (3, 4, 4, 1))
  times = [1.0, 0.6, 0.2]
  x0 = jax.jit(lambda y, t: ladd.finish(teacher, y, t, num_calls, schedule))(y, jnp.asarray(times))
  keys = jax.random.split(jax.random.key(1), 1)
  for k, t in enumerate(times):
    row = y[k : k + 1]
    expected = samplers.SAMPLERS['ddim'](teacher, schedule, row, keys, num_steps=num_calls, t_start=t)
    np.testing.assert_allclose(x0[k : k + 1], expected, atol=2e-5)


def test_finishing_from_the_first_times_of_a_table_stays_on_it():
  seen = []

  def denoise(y, t):
    jax.debug.callback(lambda t: seen.append(np.asarray(t)), t)
    return 0 * y

  y = jnp.ones((2, 2, 2, 1))
  x0 = ladd.finish(denoise, y, jnp.asarray([0.001, 0.002]), 4, LINEAR)
  jax.effects_barrier()
  np.testing.assert_array_equal(x0, np.zeros(y.shape))
  assert set(np.round(np.concatenate(seen) * 1000, 3)) <= {1.0, 2.0}


def test_distance_is_a_mean_over_all_but_the_batch():
  a = jnp.zeros((2, 2, 2, 1))
  np.testing.assert_allclose(ladd.squared_distance(a, a.at[1, 0].set(3.0)), [0.0, 4.5])
