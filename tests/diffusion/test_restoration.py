"""Degradations, their projections, and denoisers that hold what a degraded image says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff.diffusion import restoration, samplers, schedules
from vaediff.errors import UserError
from vaediff.models import wavelets

LINEAR, COSINE = schedules.LinearBeta(), schedules.Cosine()
LINEAR_TASKS = [task for task in restoration.TASKS if task != 'denoise']


def degradation(task, **changes):
  fields = {'factor': 2, 'noise_std': 0.1, 'hole_fraction': 0.5, **changes}
  return restoration.Degradation(task=task, **fields)


def keys_of(count, seed=0):
  return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(count))


def image_of(count, size=8, channels=3, seed=1):
  return jax.random.uniform(jax.random.key(seed), (count, size, size, channels), minval=-1.0, maxval=1.0)


@pytest.mark.parametrize('hole', restoration.HOLES)
@pytest.mark.parametrize('task', LINEAR_TASKS)
def test_what_is_kept_comes_from_the_data_and_the_rest_stays(task, hole):
  one = degradation(task, hole=hole)
  truth, guess = image_of(3), image_of(3, seed=2)
  _, measured, known = one.degrade(truth, keys_of(3))
  project = lambda x: one.project(x, known)
  np.testing.assert_allclose(measured, project(truth), atol=1e-6)
  np.testing.assert_allclose(project(project(guess)), project(guess), atol=1e-6)
  agreed = one.agree(guess, measured, known)
  np.testing.assert_allclose(project(agreed), measured, atol=1e-6)
  np.testing.assert_allclose(agreed - project(agreed), guess - project(guess), atol=1e-6)
  np.testing.assert_allclose(one.agree(truth, measured, known), truth, atol=1e-6)
  # orthogonal: what is kept and what is not have no part of each other
  inner = jnp.sum((guess - project(guess)) * project(truth), axis=(1, 2, 3))
  np.testing.assert_allclose(inner, 0.0, atol=1e-4)
  assert float(jnp.abs(project(guess) - guess).max()) > 0.1


def test_super_resolution_keeps_block_means_and_loses_detail():
  flat = jnp.full((1, 8, 8, 1), 0.3)
  for value in degradation('super_resolution').degrade(flat, keys_of(1))[:2]:
    np.testing.assert_allclose(value, flat, atol=1e-6)
  checker = (np.indices((8, 8)).sum(0)[None, :, :, None] % 2 * 2.0 - 1).astype(np.float32)
  for value in degradation('super_resolution').degrade(jnp.asarray(checker), keys_of(1))[:2]:
    np.testing.assert_allclose(value, 0.0, atol=1e-6)  # every 2x2 block of it has mean 0
  steps = jnp.asarray(np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1) / 16)
  measured = degradation('super_resolution').degrade(steps, keys_of(1))[1]
  np.testing.assert_allclose(measured[0, :2, :2, 0], (0 + 1 + 4 + 5) / 64, atol=1e-6)
  np.testing.assert_allclose(measured[0, 2:, 2:, 0], (10 + 11 + 14 + 15) / 64, atol=1e-6)


def test_colourise_keeps_the_mean_over_channels():
  x = image_of(2)
  degraded, measured, _ = degradation('colourise').degrade(x, keys_of(2))
  np.testing.assert_allclose(degraded, np.repeat(np.asarray(x).mean(-1, keepdims=True), 3, -1), atol=1e-6)
  np.testing.assert_array_equal(degraded, measured)


def test_inpaint_holes_the_middle_quarter():
  x0 = jnp.ones((2, 8, 8, 3))
  degraded, _, known = degradation('inpaint').degrade(x0, keys_of(2))
  assert known.shape == (2, 8, 8, 1) and known[0].sum() == 64 - 16
  assert np.all(degraded[:, 2:6, 2:6] == 0) and degraded.sum() == 2 * 3 * 48


def test_random_holes_are_squares_anywhere_inside():
  known = np.asarray(degradation('inpaint', hole='random').known(jnp.zeros((64, 8, 8, 1)), keys_of(64)))
  holes = 1 - known[..., 0]
  assert (holes.sum((1, 2)) == 16).all()
  tops, lefts = (holes.max(axis).argmax(1) for axis in (2, 1))
  assert set(tops) == set(lefts) == set(range(5))
  for hole, top, left in zip(holes, tops, lefts, strict=True):
    assert hole[top : top + 4, left : left + 4].all()
  assert not np.array_equal(tops, lefts)  # a key each


def test_noise_has_the_given_deviation_and_is_of_each_image_alone():
  one, x = degradation('denoise'), jnp.zeros((16, 32, 32, 1))
  noisy = one.degrade(x, keys_of(16))[0]
  assert noisy.std() == pytest.approx(0.1, rel=0.02)
  np.testing.assert_array_equal(one.degrade(x[:3], keys_of(16)[:3])[0], noisy[:3])
  assert not np.array_equal(noisy[0], noisy[1])
  assert not np.array_equal(one.degrade(x, keys_of(16, seed=5))[0], noisy)
  loud = degradation('denoise', noise_std=3.0).degrade(x, keys_of(16))[0]
  assert loud.min() == -1 and loud.max() == 1  # as a file has it
  with pytest.raises(ValueError, match='denoise has no projection'):
    one.project(x, x)


@pytest.mark.parametrize(
  ('task', 'changes', 'channels', 'message'),
  [
    ('sharpen', {}, 3, "here.task is 'sharpen'; valid: super_resolution, inpaint, colourise, denoise"),
    ('super_resolution', {'factor': 3}, 3, 'here.factor must be >= 2 and divide the image size 8, got 3'),
    ('super_resolution', {'factor': 1}, 3, 'here.factor must be >= 2 and divide the image size 8, got 1'),
    ('denoise', {'noise_std': 0.0}, 3, 'here.noise_std must be > 0, got 0.0'),
    ('denoise', {'noise_std': float('nan')}, 3, 'here.noise_std must be > 0, got nan'),
    ('inpaint', {'hole_fraction': 1.0}, 3, r'here.hole_fraction must be in \(0, 1\), got 1.0'),
    ('inpaint', {'hole': 'left'}, 3, "here.hole is 'left'; valid: center, random"),
    ('colourise', {}, 1, 'here.task = colourise needs images with colours; .* have 1 channel'),
  ],
)
def test_what_cannot_be_done_to_images_is_refused(task, changes, channels, message):
  with pytest.raises(UserError, match=message):
    degradation(task, **changes).check(8, channels, 'here.')
  degradation('colourise').check(8, 3)


@pytest.mark.parametrize('task', LINEAR_TASKS)
@pytest.mark.parametrize('name', ['ddim', 'ddpm', 'heun', 'dpmpp_2m', 'euler_maruyama'])
def test_a_held_sample_has_the_data_s_range_and_the_network_s_null_space(name, task):
  one, x0, guess = degradation(task), image_of(2), image_of(2, seed=2)
  _, measured, known = one.degrade(x0, keys_of(2))
  seen = []

  def denoise(y, t):
    jax.debug.callback(lambda y: seen.append(np.asarray(y)), y)
    return guess

  held = restoration.consistent(denoise, lambda x: one.agree(x, measured, known))
  y = jax.random.normal(jax.random.key(3), x0.shape)
  result = samplers.get_sampler(name)(held, LINEAR, y, keys_of(2), num_steps=4)
  jax.effects_barrier()
  np.testing.assert_allclose(result, one.agree(guess, measured, known), atol=1e-5)
  assert np.isfinite(seen).all()


def test_what_a_denoiser_says_beside_x0_hat_stays():
  held = restoration.consistent(lambda y, t: (y, 2 * y), lambda x: x + 1)
  x0_hat, beside = held(jnp.ones((1, 2)), jnp.ones(1))
  assert x0_hat.tolist() == [[2, 2]] and beside.tolist() == [[2, 2]]


def test_holding_in_every_step_moves_the_rest_too():
  """With correlated pixels the given ones tell the network about the hole: the posterior mean is closer."""
  size, count = 8, 64
  place = np.arange(size)
  covariance = 0.25 * np.exp(-np.abs(place[:, None] - place) / 4.0) + 1e-4 * np.eye(size)
  root = np.linalg.cholesky(np.kron(covariance, covariance) / 0.25)
  x0 = np.random.default_rng(0).standard_normal((count, size**2)) @ root.T
  x0 = jnp.asarray(x0.reshape(count, size, size, 1), jnp.float32)
  full = jnp.asarray(root @ root.T, jnp.float32)

  def denoise(y, t):
    alpha, sigma = LINEAR.alpha(t)[0], LINEAR.sigma(t)[0]
    gain = alpha * full @ jnp.linalg.inv(alpha**2 * full + sigma**2 * jnp.eye(size**2))
    return (y.reshape(count, -1) @ gain.T).reshape(y.shape)

  one = degradation('inpaint', hole_fraction=0.25)
  _, measured, known = one.degrade(x0, keys_of(count))
  agree = lambda x: one.agree(x, measured, known)
  y = jax.random.normal(jax.random.key(3), x0.shape)
  run = jax.jit(
    lambda d, y: samplers.SAMPLERS['ddim'](d, LINEAR, y, keys_of(count), num_steps=50), static_argnums=0
  )
  error = lambda x: float(jnp.sqrt(jnp.sum((agree(x) - x0) ** 2) / jnp.sum(1 - known)))
  held, pasted = error(run(restoration.consistent(denoise, agree), y)), error(run(denoise, y))
  assert held < 0.7 * pasted, (held, pasted)


@pytest.mark.parametrize('schedule', [LINEAR, COSINE])
@pytest.mark.parametrize('level', [0.05, 0.2, 1.0, 10.0])
def test_the_time_of_a_level(schedule, level):
  t = restoration.time_of_level(schedule, level)
  assert schedule.sigma(t) / schedule.alpha(t) == pytest.approx(level, rel=1e-6)


def test_the_time_of_a_level_of_the_linear_table():
  assert restoration.time_of_level(LINEAR, 0.2) == pytest.approx(0.0585, abs=2e-4)
  for level in (1e-3, 1e3, float('nan')):
    with pytest.raises(UserError, match=r'the level .*; this schedule knows levels .* from 0.01 to 157.4'):
      restoration.time_of_level(LINEAR, level)


def test_white_noise_in_pixels_is_white_noise_of_half_the_level_in_halved_wavelets():
  noise = jax.random.normal(jax.random.key(0), (64, 8, 8, 1))
  rms = lambda x: float(jnp.sqrt(jnp.mean(x**2)))
  assert rms(wavelets.haar(noise) / 2) == pytest.approx(0.5 * rms(noise), rel=1e-5)
