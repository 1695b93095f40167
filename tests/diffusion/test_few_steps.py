"""The few-step diffusion against published arrays, and against the marginals that it must keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from some_slow import some_slow

from vaediff.diffusion import few_steps
from vaediff.errors import UserError

GOLDEN = {
  1: {'of_x0': [1], 'of_x_next': [0], 'posterior_std': [0]},
  2: {
    'cumulative_scale': [1, 0.280492, 0.006572],
    'cumulative_noise': [1e-4, 0.959856, 0.999978],
    'of_x0': [1, 0.280350],
    'of_x_next': [0, 0.021588],
    'posterior_std': [0, 0.920858**0.5],
  },
  4: {
    'scale': [1, 0.722319, 0.388322, 0.208764, 0.112232],
    'cumulative_scale': [1, 0.722319, 0.280492, 0.058557, 0.006572],
    'cumulative_noise': [1e-4, 0.69156, 0.959856, 0.998284, 0.999978],
    'of_x0': [1, 0.665778, 0.269191, 0.057822],
    'of_x_next': [0, 0.201576, 0.193001, 0.111852],
    'posterior_std': [0, 0.440819**0.5, 0.884202**0.5, 0.984061**0.5],
  },
  8: {
    'cumulative_scale': [1, 0.918452, 0.722319, 0.486426, 0.280492, 0.138497, 0.058557, 0.0212, 0.006572],
    'of_x0': [1, 0.732627, 0.517099, 0.35241, 0.216256, 0.114131, 0.050905, 0.019163],
    'of_x_next': [0, 0.257262, 0.421893, 0.477791, 0.463813, 0.416117, 0.360956, 0.309878],
  },
}


@pytest.mark.parametrize('num_steps', GOLDEN)
def test_published_arrays(num_steps):
  steps = few_steps.make_steps(num_steps)
  for name, values in GOLDEN[num_steps].items():
    np.testing.assert_allclose(getattr(steps, name), values, atol=1e-5)


def test_betas():
  np.testing.assert_allclose(few_steps.make_steps(1).noise ** 2, [1e-8, 0.999957], atol=1e-6)
  np.testing.assert_allclose(few_steps.make_steps(2).noise ** 2, [1e-8, 0.921324, 0.999451], atol=1e-6)
  betas = few_steps.make_steps(4).noise ** 2
  np.testing.assert_allclose(betas, [1e-8, 0.478255, 0.849206, 0.956418, 0.987404], atol=1e-6)


@pytest.mark.parametrize('num_steps', some_slow([1, 2, 4, 8], 1, 2))
def test_posterior_of_a_joint_pair_has_the_marginal(num_steps):
  steps = few_steps.make_steps(num_steps)
  for k in range(num_steps):
    x0, t = jnp.full((1, 400, 400, 1), 0.7), jnp.full(1, float(k))
    key_pair, key_noise = jax.random.split(jax.random.key(k))
    x_t, x_next = few_steps.q_sample_pair(x0, t, key_pair, steps)
    drawn = few_steps.posterior_sample(x0, x_next, t, jax.random.normal(key_noise, x0.shape), steps)
    for x in (x_t, drawn):
      assert float(x.mean()) == pytest.approx(0.7 * steps.cumulative_scale[k], abs=8e-3)
      assert float(x.std()) == pytest.approx(steps.cumulative_noise[k], abs=8e-3)
    # the pair is joint: what x_{t+1} adds to x_t is independent noise of the step's size
    rest = x_next - steps.scale[k + 1] * x_t
    assert float(rest.std()) == pytest.approx(steps.noise[k + 1], abs=8e-3)
    correlation = float(jnp.corrcoef(rest.ravel(), x_t.ravel())[0, 1])
    assert abs(correlation) < 0.01


def test_sampling_with_the_true_x0_returns_it_and_passes_the_marginals():
  steps, seen = few_steps.make_steps(4), []
  x0 = jnp.full((2, 128, 128, 1), -0.3)

  def generate(x, t, z):
    assert z.shape == (2, 5)
    jax.debug.callback(lambda x, t: seen.append((float(t[0]), float(x.std()))), x, t)
    return x0

  keys = jax.random.split(jax.random.key(0), 2)
  noise = jax.random.normal(jax.random.key(1), x0.shape)
  drawn = jax.jit(lambda noise, keys: few_steps.sample(generate, steps, noise, keys, 5))(noise, keys)
  np.testing.assert_allclose(drawn, x0, atol=1e-6)
  assert [t for t, _ in seen] == [3.0, 2.0, 1.0, 0.0]
  for t, std in seen[1:]:
    assert std == pytest.approx(steps.cumulative_noise[int(t) + 1], abs=0.02)


def test_image_depends_on_its_own_key_alone():
  steps = few_steps.make_steps(2)
  keys, noise = jax.random.split(jax.random.key(3), 3), jnp.zeros((3, 2, 2, 1))

  def draw(chosen):
    return few_steps.sample(
      lambda x, t, z: jnp.tanh(x + z[:, None, None, :1]), steps, noise[chosen], keys[chosen], 4
    )

  np.testing.assert_array_equal(draw(np.array([0, 1, 2]))[2], draw(np.array([2]))[0])


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [((0,), 'num_steps must be >= 1, got 0'), ((2, 3.0, 1.0), 'got 3.0 and 1.0')],
)
def test_bad_settings(arguments, message):
  with pytest.raises(UserError, match=message):
    few_steps.make_steps(*arguments)
