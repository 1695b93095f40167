"""The correction of a quantized denoiser: its fit in closed form, and that samplers keep their marginals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.diffusion import gaussian, noise_correction, samplers, schedules

LINEAR = schedules.LinearBeta()
TIMES = np.array([1.0, 0.5, 0.1])


def outputs_and_error(seed=0):
  """Returns f, and an error that no k f + b_c explains any part of."""
  rng = np.random.default_rng(seed)
  f, left = rng.normal(size=(2, 30, 4, 4, 3))
  f += [0.0, 5.0, -2.0]  # means that differ between channels would be taken for a slope
  centred, left = f - f.mean(axis=(0, 1, 2)), left - left.mean(axis=(0, 1, 2))
  return f, left - centred * np.sum(centred * left) / np.sum(centred**2)


def test_fit_finds_slope_bias_and_what_is_left():
  f, left = outputs_and_error()
  bias = np.array([0.1, -0.2, 0.3])
  slope, found, std = noise_correction.fit(f, 1.25 * f + bias + 0.5 * left)
  assert slope == pytest.approx(0.25, abs=1e-12)
  np.testing.assert_allclose(found, bias, atol=1e-12)
  assert std == pytest.approx(0.5 * np.sqrt(np.mean(left**2)) / 1.25, rel=1e-12)


def test_fit_is_the_least_squares_of_numpy():
  rng = np.random.default_rng(1)
  f, q = rng.normal(size=(2, 200, 2)) + [0.0, 3.0]
  q += f
  unknown = np.concatenate([f.reshape(-1, 1), np.tile(np.eye(2), (200, 1))], axis=1)
  wanted = np.linalg.lstsq(unknown, (q - f).ravel())[0]
  slope, bias, _ = noise_correction.fit(f, q)
  assert wanted[0] > 0
  np.testing.assert_allclose([slope, *bias], wanted, rtol=1e-10, atol=1e-12)


def test_a_negative_slope_is_clamped_before_the_bias_is_taken():
  f, _ = outputs_and_error()
  slope, bias, std = noise_correction.fit(f, 0.5 * f)
  assert slope == 0
  np.testing.assert_allclose(bias, -0.5 * f.mean(axis=(0, 1, 2)), atol=1e-12)
  assert std == pytest.approx(0.5 * np.sqrt(np.mean((f - f.mean(axis=(0, 1, 2))) ** 2)))


def test_others_are_left_alone():
  table = noise_correction.stacked(TIMES[:1], [(0.5, np.array([1.0, 2.0]), 0.1)], others=2)
  np.testing.assert_array_equal(table['gain'], np.float32([[0.5, 0.5, 0, 0]]))
  np.testing.assert_array_equal(table['bias'], np.float32([[1, 2, 0, 0]]))


@pytest.mark.parametrize('prediction', gaussian.PREDICTIONS)
def test_std_of_x0_is_that_of_the_conversion(prediction):
  """An error of the output, carried through to x0."""
  table = {'times': np.float32([0.9, 0.3]), 'std': np.float32([0.01, 0.02])}
  times = np.array([0.85, 0.35])
  found = noise_correction.std_of_x0(table, prediction, LINEAR, times)
  t, zero = jnp.float32(times), jnp.zeros(2)
  error = gaussian.to_x0(prediction, jnp.asarray(table['std']), zero, t, LINEAR)
  np.testing.assert_allclose(found, jnp.abs(error), rtol=1e-5)


def columns_of(sampler, times, **options):
  table = sampler.table(LINEAR, times, **options)
  return {name: getattr(table, name) for name in ('time', 'keep', 'current', 'noise')}


def test_the_variance_of_ddim_is_that_of_the_paper():
  times, std = np.linspace(1, 0, 6), 0.004
  columns = columns_of(samplers.SAMPLERS['ddim'], times, eta=0.7)
  t, s = times[:-1], times[1:]
  noise = columns['noise']
  alpha_bar_t, alpha_bar_s = LINEAR.alpha(t) ** 2, LINEAR.alpha(s) ** 2
  m = np.sqrt(1 - alpha_bar_s - noise**2) - np.sqrt(alpha_bar_s * (1 - alpha_bar_t) / alpha_bar_t)
  wanted = np.sqrt(np.maximum(0, noise**2 - (m * std) ** 2))
  table = {'times': np.float32([0.5]), 'std': np.float32([std])}
  of_x0 = functools.partial(noise_correction.std_of_x0, table, 'eps', LINEAR)
  assert (wanted == 0).any() and (wanted > 0).any() and (wanted < noise).any()
  found = noise_correction.less_noise(LINEAR, of_x0)(columns)
  np.testing.assert_allclose(found['noise'], wanted, rtol=1e-4, atol=1e-7)
  assert set(found) == {'noise'}

  found = noise_correction.less_noise(LINEAR, of_x0, direction=True)(columns)
  keep = np.sqrt(1 - alpha_bar_s - wanted**2) / LINEAR.sigma(t)
  keep[-1] = 0  # onto t = 0, where nothing is added
  np.testing.assert_allclose(found['keep'], keep, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(
    found['current'][:-1], (LINEAR.alpha(s) - LINEAR.alpha(t) * keep)[:-1], rtol=1e-3, atol=1e-5
  )
  assert found['current'][-1] == columns['current'][-1] == 1


@pytest.mark.parametrize('direction', [False, True])
@pytest.mark.parametrize('eta', [0.6, 1.0])
def test_ddim_with_the_eps_of_the_network_is_corrected_as_that_with_the_implied_one(eta, direction):
  """Where nothing is clipped they are one sampler, and what is read twice has one error."""
  times, found = np.linspace(1, 0, 51), {}
  change = noise_correction.less_noise(LINEAR, lambda t: jnp.full(len(t), 0.05), direction=direction)
  for recompute_eps in (True, False):
    table = samplers.SAMPLERS['ddim'].table(LINEAR, times, eta=eta, recompute_eps=recompute_eps)
    of_eps = 'current' if recompute_eps else 'unclipped'
    columns = {name: getattr(table, name) for name in {'time', 'keep', 'current', 'noise', of_eps}}
    changed = change(columns)
    assert set(changed) == {'noise', *(('keep', of_eps) if direction else ())}
    rows = {**columns, **changed}
    found[recompute_eps] = {
      'keep': rows['keep'],
      'both': rows['current'] + rows.get('unclipped', 0.0),
      'noise': rows['noise'],
    }
    assert np.max(columns['noise'] - rows['noise']) > 1e-3
    assert (np.max(np.abs(columns['keep'] - rows['keep'])) > 1e-3) == direction
  for name, column in found[True].items():
    np.testing.assert_allclose(found[False][name], column, atol=1e-6, err_msg=name)


@pytest.mark.parametrize('direction', [False, True])
def test_both_ddims_draw_the_same_with_a_correction(direction):
  y = jax.random.normal(jax.random.key(0), (4, 3))
  keys = lambda: jax.random.split(jax.random.key(1), 4)
  change = noise_correction.less_noise(LINEAR, lambda t: jnp.full(len(t), 0.05), direction=direction)
  run = functools.partial(samplers.SAMPLERS['ddim'], schedule=LINEAR, y=y, num_steps=50, eta=1.0)
  implied = run(lambda y, t: 0.4 * y, keys=keys(), change=change)
  own = run(lambda y, t: (0.4 * y, 0.4 * y), keys=keys(), change=change, recompute_eps=False)
  np.testing.assert_allclose(own, implied, atol=1e-5)
  assert np.max(np.abs(implied - run(lambda y, t: 0.4 * y, keys=keys()))) > 1e-3


@pytest.mark.slow
def test_no_error_changes_no_bit():
  keys = jax.vmap(jax.random.key)(jnp.arange(4))
  y = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
  denoise = lambda y, t: 0.9 * jnp.tanh(y)
  options = {'num_steps': 7, 'grid': 'quadratic'}
  for sampler in (
    samplers.SAMPLERS['ddpm'],
    functools.partial(samplers.SAMPLERS['ddpm'], variance='large'),
    functools.partial(samplers.SAMPLERS['ddim'], eta=0.5),
    samplers.SAMPLERS['there_and_back'],
  ):
    plain = jax.jit(lambda: sampler(denoise, LINEAR, y, keys, **options))()  # noqa: B023
    for direction in (False, True):
      change = noise_correction.less_noise(LINEAR, lambda t: jnp.zeros(len(t)), direction=direction)
      run = jax.jit(lambda: sampler(denoise, LINEAR, y, keys, change=change, **options))  # noqa: B023
      np.testing.assert_array_equal(run(), plain)


def test_samples_of_a_noisy_network_have_the_variance_of_a_clean_one():
  """x0_hat with an error of its own at every step: less noise makes up for it, and nothing else does."""
  count, error = 40_000, 1.0
  keys = jax.random.split(jax.random.key(0), count)
  y = jax.random.normal(jax.random.key(1), (count, 1))

  def denoise(y, t, size):
    key = jax.random.fold_in(jax.random.key(2), jnp.int32(1e6 * t[0]))
    return 0.5 * y + size * jax.random.normal(key, y.shape)

  def std(size, change=None):
    run = functools.partial(samplers.SAMPLERS['ddpm'], num_steps=5, t_end=0.3, change=change)
    return float(jnp.std(run(lambda y, t: denoise(y, t, size), LINEAR, y, keys)))

  of_error = lambda times: jnp.full(len(times), error)
  clean = std(0.0)
  assert std(error) > 1.05 * clean
  assert std(error, noise_correction.less_noise(LINEAR, of_error)) == pytest.approx(clean, rel=0.015)
  published = noise_correction.less_noise(LINEAR, of_error, direction=True)
  assert std(error, published) > 1.02 * clean
