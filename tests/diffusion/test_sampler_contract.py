"""What every sampler promises its callers: keys, shapes, starts, counts and errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from some_slow import some_slow

from vaediff.diffusion import gaussian, samplers, schedules
from vaediff.errors import UserError

LINEAR = schedules.LinearBeta()
COSINE = schedules.Cosine()
SCHEDULES = [LINEAR, COSINE]
DETERMINISTIC = ['ddim', 'heun', 'dpmpp_2m']
STOCHASTIC = ['ddpm', 'ddim_half']
VARIANTS = samplers.SAMPLERS | {'ddim_half': functools.partial(samplers.SAMPLERS['ddim'], eta=0.5)}


def gaussian_denoiser(schedule, s):
  """The best denoiser of x0 ~ N(0, s^2)."""

  def denoise(y, t):
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return gaussian.per_example(alpha * s**2 / ((alpha * s) ** 2 + sigma**2), y) * y

  return denoise


def point_denoiser(x0):
  return lambda y, t: jnp.broadcast_to(x0, y.shape)


def keys_of(count, seed=7):
  return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(count))


def noise_of(count, shape, seed=3):
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys_of(count, seed))


@pytest.mark.parametrize('name', some_slow(VARIANTS, 'ddpm', 'ddim_half', 'dpmpp_2m', 'renoise'))
def test_example_i_is_the_same_for_every_batch_size(name):
  denoise = gaussian_denoiser(LINEAR, 0.5)
  y, keys = noise_of(16, (3, 3, 2)), keys_of(16)
  run = jax.jit(lambda y, keys: VARIANTS[name](denoise, LINEAR, y, keys, num_steps=5))
  whole = run(y, keys)
  np.testing.assert_allclose(run(y[:3], keys[:3]), whole[:3], atol=1e-6)
  np.testing.assert_allclose(run(y[9:10], keys[9:10]), whole[9:10], atol=1e-6)
  if name in STOCHASTIC:
    same_start = run(jnp.broadcast_to(y[:1], y.shape), keys)
    assert np.all(np.std(np.asarray(same_start), axis=0) > 1e-3)


def test_eight_devices_draw_what_one_device_draws():
  denoise = gaussian_denoiser(LINEAR, 0.5)
  y, keys = noise_of(16, (3, 3, 2)), keys_of(16)
  run = jax.jit(lambda y, keys: samplers.SAMPLERS['ddpm'](denoise, LINEAR, y, keys, num_steps=5))
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  over_data = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  sharded = run(jax.device_put(y, over_data), jax.device_put(keys, over_data))
  assert len(sharded.sharding.device_set) == 8
  np.testing.assert_allclose(sharded, run(y, keys), atol=1e-6)


@pytest.mark.parametrize('name', DETERMINISTIC)
def test_deterministic_samplers_ignore_the_keys(name):
  denoise, y = gaussian_denoiser(LINEAR, 0.5), noise_of(2, (3,))
  results = [VARIANTS[name](denoise, LINEAR, y, keys_of(2, seed), num_steps=5) for seed in (1, 2)]
  np.testing.assert_array_equal(*results)


@pytest.mark.parametrize('name', STOCHASTIC)
def test_noise_is_fresh_at_every_step(name):
  """With x0_hat = 0, states are sums of noise; equal noise would make increments collinear."""
  _, states = VARIANTS[name](
    point_denoiser(jnp.float32(0)),
    LINEAR,
    jnp.zeros((1, 4000)),
    keys_of(1),
    num_steps=4,
    trajectory=True,
  )
  states = np.asarray(states[:, 0])
  scale = np.array([states[k + 1] @ states[k] / (states[k] @ states[k]) for k in (1, 2)])
  increments = [states[k + 1] - scale[k - 1] * states[k] for k in (1, 2)]
  assert abs(np.corrcoef(increments[0], increments[1])[0, 1]) < 5 / np.sqrt(4000)


@pytest.mark.parametrize('name', VARIANTS)
def test_refine_start(name):
  """From x0_vae noised to t_start: an oracle of x0 still ends at x0, and the grid begins there."""
  x0, x0_vae, t_start = jnp.full((2, 4), 0.5), jnp.full((2, 4), 0.3), 0.4
  y = gaussian.q_sample(x0_vae, noise_of(2, (4,)), jnp.full(2, t_start), LINEAR)
  seen = []

  def denoise(y, t):
    jax.debug.callback(lambda t: seen.append(float(t[0])), t)
    return x0

  result, states = VARIANTS[name](
    denoise, LINEAR, y, keys_of(2), num_steps=4, t_start=t_start, trajectory=True
  )
  jax.effects_barrier()
  np.testing.assert_array_equal(result, x0)
  np.testing.assert_array_equal(states[0], y)
  assert states.shape == (5, 2, 4)
  assert max(seen) == pytest.approx(t_start)
  assert min(seen) == pytest.approx(0.1)


@pytest.mark.parametrize('name', sorted(samplers.SAMPLERS))
@pytest.mark.parametrize('num_steps', [1, 4])
@pytest.mark.parametrize('t_end', [0.0, 0.1])
def test_number_of_function_evaluations(name, num_steps, t_end):
  calls = []

  def denoise(y, t):
    jax.debug.callback(lambda: calls.append(1))
    return y

  y, keys = jnp.ones((1, 1)), keys_of(1)
  samplers.get_sampler(name)(denoise, LINEAR, y, keys, num_steps=num_steps, t_end=t_end)
  jax.effects_barrier()
  times = samplers.evaluation_times(name, LINEAR, num_steps=num_steps, t_end=t_end)
  expected = {'heun': 2 * num_steps - (t_end == 0)}.get(name, num_steps)
  assert len(calls) == len(times) == expected


@pytest.mark.parametrize('name', VARIANTS)
def test_denoiser_is_compiled_once_and_given_float32_times_per_example(name):
  """One scan: Python runs the denoiser at most a constant number of times, whatever num_steps."""
  traces = []

  def denoise(y, t):
    traces.append((y.dtype, t.shape, t.dtype))
    return y.astype(jnp.bfloat16)

  y, keys = jnp.ones((3, 2)), keys_of(3)
  result = VARIANTS[name](denoise, LINEAR, y, keys, num_steps=50)
  assert result.dtype == jnp.float32
  assert len(traces) <= 2
  assert set(traces) == {(jnp.dtype('float32'), (3,), jnp.dtype('float32'))}


@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('name', VARIANTS)
def test_more_steps_than_the_table_stay_finite(name, schedule):
  denoise = gaussian_denoiser(schedule, 0.5)
  result = VARIANTS[name](denoise, schedule, noise_of(1, (64,)), keys_of(1), num_steps=1500)
  assert np.all(np.isfinite(result))
  assert 0.3 < np.std(result) < 0.7


def test_errors():
  y, keys = jnp.ones((1, 1)), keys_of(1)
  denoise = lambda y, t: y
  for sample in samplers.SAMPLERS.values():
    with pytest.raises(UserError, match=r'sample\.num_steps must be >= 1, got 0'):
      sample(denoise, LINEAR, y, keys, num_steps=0)
  with pytest.raises(UserError, match=r"sample\.variance must be one of .*'small'.*got 'middle'"):
    samplers.SAMPLERS['ddpm'](denoise, LINEAR, y, keys, num_steps=2, variance='middle')
  for eta in (-0.1, 1.5):
    with pytest.raises(UserError, match=rf'sample\.eta must be in \[0, 1\], got {eta}'):
      samplers.SAMPLERS['ddim'](denoise, LINEAR, y, keys, num_steps=2, eta=eta)
  with pytest.raises(UserError, match=r"sample\.sampler must be one of .*'ddim'.*got 'unipc'"):
    samplers.get_sampler('unipc')
  with pytest.raises(UserError, match=r"got 'unipc'"):
    samplers.evaluation_times('unipc', LINEAR, num_steps=2)
  with pytest.raises(UserError, match=r'sample\.num_steps must be >= 1, got 0'):
    samplers.evaluation_times('ddim', LINEAR, num_steps=0)
