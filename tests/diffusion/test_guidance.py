"""Guidance: linear at fixed y in every prediction, the right weaker branches, the shift, thresholding."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from vaediff import checks
from vaediff.diffusion import gaussian, guidance, schedules
from vaediff.errors import UserError
from vaediff.experiments import diffusion
from vaediff.experiments.denoiser import Term

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from known_network import READ, denoiser  # noqa: E402

LINEAR = schedules.LinearBeta()


def never(y, t):
  raise AssertionError('the unconditional network must not be called')


def test_weight_zero_is_the_conditional_denoiser_and_calls_nothing_else():
  conditional = lambda y, t: 0.5 * y
  denoise = guidance.guided(conditional, [never], [0.0])
  y = jnp.ones((2, 3))
  np.testing.assert_array_equal(denoise(y, jnp.ones(2)), 0.5 * y)
  assert guidance.guided(conditional, [never, never], [0.0, 0.0]) is conditional
  assert guidance.guided(conditional, [], []) is conditional
  other = guidance.guided(conditional, [never, lambda y, t: 0.25 * y], [0.0, 1.0])
  np.testing.assert_allclose(other(y, jnp.ones(2)), 0.75)


def test_every_weaker_branch_has_a_weight():
  with pytest.raises(ValueError):
    guidance.guided(lambda y, t: y, [never, never], [0.0])


def test_weight_minus_one_is_the_unconditional_denoiser():
  denoise = guidance.guided(lambda y, t: 0.5 * y, [lambda y, t: 0.25 * y], [-1.0])
  np.testing.assert_allclose(denoise(jnp.ones((2, 3)), jnp.ones(2)), 0.25)


@pytest.mark.parametrize('prediction', gaussian.PREDICTIONS)
def test_guiding_x0_is_guiding_the_network_output(prediction, key):
  keys = jax.random.split(key, 3)
  y, out_c, out_u = (jax.random.normal(k, (3, 2, 2, 1)) for k in keys)
  t = jnp.array([0.1, 0.4, 0.7])
  to_x0 = lambda output: gaussian.to_x0(prediction, output, y, t, LINEAR)
  denoise = guidance.guided(lambda y, t: to_x0(out_c), [lambda y, t: to_x0(out_u)], [1.5])
  expected = to_x0(2.5 * out_c - 1.5 * out_u)
  np.testing.assert_allclose(denoise(y, t), expected, rtol=1e-3, atol=1e-4)


def test_formulation_2_unconditional_branch_reads_y():
  """For x0 ~ N(0, 1), and x0 ~ N(x0_vae, s^2) given x0_vae, both denoisers are known.

  The network reads x_t; given the null condition its shift is zero. Guidance of exact denoisers
  must then be the same function of y in both formulations.
  """
  s2, x0_vae = 0.25, jnp.full((1, 4), 0.8)
  t = jnp.full(1, 0.3)
  alpha, sigma = float(LINEAR.alpha(0.3)), float(LINEAR.sigma(0.3))

  def of(formulation):
    def network(x_t, t, values, drop):
      """The exact denoiser, as a function of what a network of this formulation would read."""
      y = x_t - values['x0_vae'] if formulation == 2 else x_t
      gain = alpha * s2 / (alpha**2 * s2 + sigma**2)
      given = values['x0_vae'] + gain * (y - alpha * values['x0_vae'])
      dropped = drop['x0_vae'] if 'x0_vae' in drop else jnp.zeros(1, bool)
      return jnp.where(dropped[:, None], alpha * x_t, given)

    shift = 'x0_vae' if formulation == 2 else ''
    terms = (Term(weight=2.0, without=('vae',)),)
    return denoiser(network, LINEAR, {'vae': ('x0_vae',)}, shift=shift, terms=terms).denoise(
      READ, {'x0_vae': x0_vae}
    )

  y = jnp.linspace(-2, 2, 4)[None]
  gain = alpha * s2 / (alpha**2 * s2 + sigma**2)
  expected = 3 * (0.8 + gain * (np.asarray(y) - alpha * 0.8)) - 2 * alpha * np.asarray(y)
  np.testing.assert_allclose(of(1)(y, t), expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(of(2)(y, t), expected, rtol=1e-5, atol=1e-6)


# The shift --------------------------------------------------------------------------------------------


def test_the_shift_is_that_of_the_formulation_and_of_the_examples_that_are_not_dropped(key):
  key_y, key_vae = jax.random.split(key)
  y, x0_vae = (jax.random.normal(k, (3, 2, 2, 1)) for k in (key_y, key_vae))
  values = {'x0_vae': x0_vae, 'z': jnp.ones((3, 4))}
  one, two = (denoiser(never, LINEAR, {'vae': ('x0_vae', 'z')}, shift=shift) for shift in ('', 'x0_vae'))
  some = {'x0_vae': jnp.array([True, False, True]), 'z': jnp.array([True, True, False])}
  for drop in ({}, some):
    np.testing.assert_array_equal(one.state(y, values, drop), y)
  np.testing.assert_array_equal(two.state(y, values, {}), y + x0_vae)
  shifted = two.state(y, values, some)
  np.testing.assert_array_equal(shifted[0::2], y[0::2])
  np.testing.assert_array_equal(shifted[1], (y + x0_vae)[1])
  # What else is dropped, such as a label, does not touch it.
  np.testing.assert_array_equal(two.state(y, values, {'z': jnp.ones(3, bool)}), y + x0_vae)


def test_the_network_reads_the_shifted_state_and_the_drop():
  seen = []

  def network(x_t, t, values, drop):
    seen.append((x_t, t, values, drop))
    return x_t

  two = denoiser(network, LINEAR, {'vae': ('x0_vae',)}, shift='x0_vae', prediction='eps')
  y, t, drop = jnp.ones((2, 3)), jnp.array([0.2, 0.4]), {'x0_vae': jnp.array([True, False])}
  two.output(READ, y, t, {'x0_vae': 0.5 * y, 'guidance': jnp.ones(2)}, drop)
  ((x_t, time, values, dropped),) = seen
  np.testing.assert_array_equal(x_t, [[1.0] * 3, [1.5] * 3])
  np.testing.assert_array_equal(time, t)
  assert set(values) == {'x0_vae'} and set(dropped) == {'x0_vae'}  # it has no port for the weight


def test_there_are_two_formulations():
  bounds = {'diffusion.condition': diffusion.BOUNDS['diffusion.condition']}
  message = "diffusion.condition is 'formulation3'; valid: none, formulation1, formulation2"
  with pytest.raises(UserError, match=message):
    checks.check(ConfigDict({'diffusion': {'condition': 'formulation3'}}), bounds)


# Several terms ----------------------------------------------------------------------------------------

WEIGHTS = [(1.5, 3.0), (0.0, 0.0), (1.0, 1.0), (1.0, 2.5), (2.0, 2.0), (0.5, -0.25)]


def nested(nothing, c, cv, w1, w2):
  """x(0) + w1 (x(c) - x(0)) + w2 (x(c, v) - x(c)): guided by c, and by v given c."""
  return nothing + w1 * (c - nothing) + w2 * (cv - c)


@pytest.mark.parametrize(('w1', 'w2'), WEIGHTS)
def test_two_terms_are_nested_guidance(w1, w2, key):
  nothing, c, cv = (np.asarray(jax.random.normal(k, (2, 3, 3, 1))) for k in jax.random.split(key, 3))
  branches = [lambda y, t: jnp.asarray(c), lambda y, t: jnp.asarray(nothing)]
  denoise = guidance.guided(lambda y, t: jnp.asarray(cv), branches, [w2 - w1, w1 - 1])
  actual = denoise(jnp.zeros((2, 3, 3, 1)), jnp.ones(2))
  np.testing.assert_allclose(actual, nested(nothing, c, cv, w1, w2), rtol=1e-5, atol=1e-5)


def test_two_terms_of_a_weight_per_example_are_nested_guidance(key):
  nothing, c, cv = (np.asarray(jax.random.normal(k, (6, 4))) for k in jax.random.split(key, 3))
  w1, w2 = (np.float32(side) for side in zip(*WEIGHTS, strict=True))
  branches = [lambda y, t: jnp.asarray(c), lambda y, t: jnp.asarray(nothing)]
  denoise = guidance.guided(
    lambda y, t: jnp.asarray(cv), branches, [jnp.asarray(w2 - w1), jnp.asarray(w1 - 1)]
  )
  expected = nested(nothing, c, cv, w1[:, None], w2[:, None])
  np.testing.assert_allclose(denoise(jnp.zeros((6, 4)), jnp.ones(6)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('w1', 'w2'), WEIGHTS)
@pytest.mark.parametrize('shift', ['', 'c'])
@pytest.mark.parametrize('prediction', gaussian.PREDICTIONS)
def test_a_denoiser_of_two_terms_is_nested_guidance(prediction, shift, w1, w2, key):
  """Two conditions, c and v; without v the network still reads c, and its state the shift of c."""
  calls = []

  def network(x_t, t, values, drop):
    """Not linear in anything, and with stand-ins of its own."""
    calls.append(set(drop))
    read = lambda name, null: null * jnp.ones_like(x_t) if name in drop else values[name]
    return jnp.tanh(0.3 * x_t + read('c', 0.7) * jnp.sin(read('v', -0.4))) + 0.1 * read('v', 0.2)

  terms = (Term(weight=w2 - w1, without=('v',)), Term(weight=w1 - 1, without=('c', 'v')))
  own = denoiser(network, LINEAR, {'c': ('c',), 'v': ('v',)}, prediction=prediction, shift=shift, terms=terms)
  y, c, v = (jax.random.normal(k, (2, 4)) for k in jax.random.split(key, 3))
  t, values = jnp.array([0.2, 0.6]), {'c': c, 'v': v}
  actual = own.denoise(READ, values)(y, t)
  # A branch of weight 0 is not asked.
  asked = [set(), *([{'v'}] if w1 != w2 else []), *([{'c', 'v'}] if w1 != 1 else [])]
  assert calls == asked and own.calls_per_step == len(asked)

  def branch(*dropped):
    state = y + c if shift and 'c' not in dropped else y
    output = network(state, t, values, dict.fromkeys(dropped))
    return gaussian.to_x0(prediction, output, y, t, LINEAR)

  expected = nested(branch('c', 'v'), branch('v'), branch(), w1, w2)
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


# Clipping ---------------------------------------------------------------------------------------------


def test_clip():
  denoise = guidance.clip(lambda y, t: 3 * y)
  y = jnp.array([[-2.0, -0.1, 0.2, 5.0]])
  np.testing.assert_allclose(denoise(y, jnp.ones(1)), [[-1, -0.3, 0.6, 1]], rtol=1e-6)
  denoise = guidance.clip(lambda y, t: y, low=0.0, high=0.1)
  np.testing.assert_allclose(denoise(y, jnp.ones(1)), [[0, 0, 0.1, 0.1]])


def test_threshold_is_per_example_and_leaves_data_range_alone():
  inside = np.linspace(-1, 1, 101)
  outside = np.linspace(-4, 4, 101)
  x0 = jnp.asarray(np.stack([inside, outside]))
  result = guidance.threshold(lambda y, t: y, percentile=100.0)(x0, jnp.ones(2))
  np.testing.assert_allclose(result[0], inside, atol=1e-6)
  np.testing.assert_allclose(result[1], outside / 4, atol=1e-6)
  # The median of |x| over 101 evenly spaced values of [-4, 4] is 2: half is clipped.
  result = guidance.threshold(lambda y, t: y, percentile=50.0)(x0, jnp.ones(2))
  np.testing.assert_allclose(result[1], np.clip(outside / 2, -1, 1), atol=1e-6)


@pytest.mark.parametrize('percentile', [0.0, -1.0, 100.5])
def test_threshold_rejects_bad_percentiles(percentile):
  with pytest.raises(UserError, match=f'got {percentile}'):
    guidance.threshold(lambda y, t: y, percentile=percentile)
