"""Noise levels: of every schedule, inverse to its times, and drawn within those that it trains on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.diffusion import levels, schedules

LINEAR = schedules.make_schedule('linear')
COSINE = schedules.make_schedule('cosine')


@pytest.mark.parametrize('schedule', [LINEAR, COSINE])
def test_time_of_a_level_is_its_time(schedule):
  t = np.array([0.05, 0.2, 0.5, 0.9, 1.0])
  tau = schedule.sigma(t) / schedule.alpha(t)
  np.testing.assert_allclose(levels.time_of(jnp.asarray(tau, jnp.float32), schedule), t, atol=2e-5)


def test_levels_stay_within_the_trained_times():
  tau = levels.sample_level(jax.random.key(0), 4000, -1.1, 4.0, LINEAR)
  t = levels.time_of(tau, LINEAR)
  assert float(t.min()) == pytest.approx(1 / 1000, rel=1e-3) and float(t.max()) == pytest.approx(1, rel=1e-6)
  tau = levels.sample_level(jax.random.key(0), 40_000, -1.1, 0.5, LINEAR)
  assert float(jnp.log(tau).mean()) == pytest.approx(-1.1, abs=0.01)
  assert float(jnp.log(tau).std()) == pytest.approx(0.5, abs=0.01)


def test_the_same_is_hidden_at_every_resolution():
  """Of a map whose positions all say one number, the average of the noisy positions is as noisy as before."""
  means = [levels.at_resolution(1.0, side**2, 128**2) for side in (8, 128, 256)]
  np.testing.assert_allclose(means, [1.0 - np.log(16), 1.0, 1.0 + np.log(2)])
  left = [np.exp(mean) / side for mean, side in zip(means, (8, 128, 256), strict=True)]  # sd of the average
  np.testing.assert_allclose(left, left[0])
