"""Guidance of known densities against golden means and deviations, by our own samplers, in one dimension.

Where all densities are Gaussian the exact denoisers are known, and what guidance does to them: DDIM does not
reach the tilted density p(x) p(c | x)^s, and its bias towards the class at large s is real.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import ndtri

from vaediff.diffusion import guidance, samplers, schedules
from vaediff.errors import UserError
from vaediff.experiments.denoiser import Term

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from known_network import READ, denoiser  # noqa: E402

LINEAR = schedules.LinearBeta()
COUNT = 4000
TOLERANCE = 2e-3


def start():
  """The quantiles of N(0, 1): their mean and deviation are those of the density to 1e-3."""
  return ndtri((jnp.arange(COUNT) + 0.5) / COUNT)[:, None]


def drawn(denoise, sampler='ddim', num_steps=1000, y=None, **options):
  """Returns mean and deviation of samples."""
  y = start() if y is None else y
  keys = jax.random.split(jax.random.key(0), len(y))
  run = samplers.get_sampler(sampler)
  x = jax.jit(lambda y, keys: run(denoise, LINEAR, y, keys, num_steps=num_steps, **options))(y, keys)
  return float(x.mean()), float(x.std())


def gaussian(mean, variance):
  """Returns the denoiser of x0 ~ N(mean, variance)."""

  def denoise(y, t):
    alpha, sigma = LINEAR.alpha(t)[:, None], LINEAR.sigma(t)[:, None]
    return mean + alpha * variance / (alpha**2 * variance + sigma**2) * (y - alpha * mean)

  return denoise


def level(t):
  return float(np.exp(-0.5 * LINEAR.logsnr(t)))


# A classifier: x0 ~ N(0, 1), c | x0 ~ N(x0, 1/4), c = 1 ------------------------------------------------


def log_prob(y, t, shift=0.0):
  """log p(c | y): c given y is normal, with mean alpha y and variance 1/4 + sigma^2."""
  alpha, sigma = LINEAR.alpha(t), LINEAR.sigma(t)
  return -jnp.square(1.0 - alpha * (y[:, 0] + shift)) / (2 * (0.25 + sigma**2))


def by_classifier(scale, log_prob=log_prob, **options):
  return guidance.with_classifier(gaussian(0.0, 1.0), log_prob, scale, LINEAR, **options)


@pytest.mark.parametrize(
  ('scale', 'num_steps', 'mean', 'deviation'),
  [
    (0, 1000, 0.0, 0.9981),
    (1, 1000, 0.7977, 0.4457),
    pytest.param(2, 1000, 1.0558, 0.1987, marks=pytest.mark.slow),
    pytest.param(4, 1000, 1.1154, 0.0393, marks=pytest.mark.slow),
    (10, 1000, 1.0356, 0.0003),
    (1, 50, 0.7979, 0.4192),
    (2, 50, 1.0494, 0.1763),
    (4, 50, 1.0924, 0.0278),
    (10, 50, 1.0187, 0.0),
  ],
)
def test_a_classifier_guides_to_its_class(scale, num_steps, mean, deviation):
  found = drawn(by_classifier(scale), num_steps=num_steps)
  np.testing.assert_allclose(found, (mean, deviation), atol=TOLERANCE)


def test_a_classifier_of_y_that_is_given_the_shifted_state_guides_elsewhere():
  """The mistake of Formulation 2 that must show: the gradient at y + 0.8."""
  wrong = drawn(by_classifier(1, lambda y, t: log_prob(y, t, shift=0.8)))
  np.testing.assert_allclose(wrong, (0.3554, 0.4457), atol=TOLERANCE)


def test_the_other_sign_drives_away():
  found = drawn(by_classifier(1, lambda y, t: -log_prob(y, t)))
  np.testing.assert_allclose(found, (-2.20, 2.23), atol=1e-2)


@pytest.mark.parametrize(
  ('scale', 'num_steps', 'mean', 'deviation'),
  [pytest.param(1, 1000, 0.8, 0.4434, marks=pytest.mark.slow), (1, 25, 0.8, 0.3585), (4, 25, 0.9999, 0.0998)],
)
def test_ancestral_sampling_in_the_x0_form_is_right_in_few_steps(scale, num_steps, mean, deviation):
  """'mean += s Sigma g' gives 0.6030, 0.5469 for s = 1 in 25 steps; drawn noise: 20,000 samples."""
  y = jax.random.normal(jax.random.key(1), (20_000, 1))
  found = drawn(by_classifier(scale), 'ddpm', num_steps, y=y, variance='small')
  np.testing.assert_allclose(found, (mean, deviation), atol=1.2e-2)


def test_the_gradient_is_at_each_examples_own_state_and_time():
  y, t = jnp.array([[0.3], [-1.2], [2.0]]), jnp.array([0.02, 0.4, 1.0])
  alpha, sigma = LINEAR.alpha(t)[:, None], LINEAR.sigma(t)[:, None]
  gradient = alpha * (1 - alpha * y) / (0.25 + sigma**2)
  expected = gaussian(0.0, 1.0)(y, t) + 3 * sigma**2 / alpha * gradient
  np.testing.assert_allclose(by_classifier(3)(y, t), expected, rtol=1e-4)
  by_half = by_classifier(3)(y.astype(jnp.bfloat16), t)
  assert by_half.dtype == jnp.float32


def test_a_scale_of_zero_asks_no_classifier():
  denoise = gaussian(0.0, 1.0)
  assert guidance.with_classifier(denoise, log_prob, 0.0, LINEAR) is denoise


# Without a classifier: x0 | c ~ N(c, 1/4), c = +-1 equally likely ---------------------------------------


def mixture(y, t):
  """Denoiser of the unconditional density."""
  alpha, sigma = LINEAR.alpha(t)[:, None], LINEAR.sigma(t)[:, None]
  likely = jax.nn.sigmoid(2 * alpha * y / (alpha**2 / 4 + sigma**2))
  return likely * gaussian(1.0, 0.25)(y, t) + (1 - likely) * gaussian(-1.0, 0.25)(y, t)


def free(weight, weaker=mixture, **options):
  return guidance.guided(gaussian(1.0, 0.25), [weaker], [weight], LINEAR, **options)


@pytest.mark.parametrize(
  ('weight', 'mean', 'deviation'),
  [
    (0.0, 0.9968, 0.4985),
    (0.5, 1.1872, 0.4012),
    (1.0, 1.3197, 0.3577),
    (3.0, 1.6737, 0.2886),
    (7.0, 2.1185, 0.2463),
    (-1.0, 0.0, 1.1165),
  ],
)
def test_classifier_free_guidance(weight, mean, deviation):
  np.testing.assert_allclose(drawn(free(weight)), (mean, deviation), atol=TOLERANCE)


@pytest.mark.parametrize(('weight', 'mean'), [(1.0, -2.386), (3.0, -8.97)])
def test_a_null_branch_that_reads_the_shifted_state_is_another(weight, mean):
  found, _ = drawn(free(weight, lambda y, t: mixture(y + 0.8, t)))
  assert found == pytest.approx(mean, abs=1e-2)


@pytest.mark.parametrize(
  ('times', 'mean', 'deviation'),
  [((0.3, 0.7), 1.5695, 0.3079), ((0.0, 0.3), 1.2243, 0.3080), ((0.7, 1.0), 1.1123, 0.4933)],
)
def test_guidance_in_an_interval(times, mean, deviation):
  interval = (level(times[0]) if times[0] else 0.0, level(times[1]))
  np.testing.assert_allclose(drawn(free(3.0, interval=interval)), (mean, deviation), atol=TOLERANCE)


def test_a_worse_network_guides_without_moving_the_mean():
  """Autoguidance, strong N(1, 0.25) and weak N(1, 0.5): deviation v^((1 + w) / 2) v_weak^(-w / 2)."""
  for weight, mean, deviation in [(1.0, 0.9978, 0.3521), (2.0, 0.9984, 0.2487)]:
    found = drawn(free(weight, gaussian(1.0, 0.5)))
    np.testing.assert_allclose(found, (mean, deviation), atol=TOLERANCE)


# The interval -------------------------------------------------------------------------------------------


def counted(calls, name, denoise):
  def count(y, t):
    jax.debug.callback(lambda: calls.append(name))
    return denoise(y, t)

  return count


SAMPLERS = [('ddim', 'uniform'), ('heun', 'karras'), ('ddpm', 'quadratic')]


@pytest.mark.parametrize(('sampler', 'grid'), SAMPLERS)
def test_passes_outside_the_interval_are_not_made_and_are_counted_so(sampler, grid):
  calls, interval = [], (level(0.3), level(0.7))
  denoise = guidance.guided(
    counted(calls, 'own', gaussian(1.0, 0.25)), [counted(calls, 'weaker', mixture)], [1.0], LINEAR, interval
  )
  drawn(denoise, sampler, 20, grid=grid)
  jax.effects_barrier()
  times = samplers.evaluation_times(sampler, LINEAR, num_steps=20, grid=grid)
  within = guidance.inside(interval, LINEAR, times)
  assert calls.count('own') == len(times) == (39 if sampler == 'heun' else 20)
  assert 0 < calls.count('weaker') == within.sum() < 20


def test_a_classifier_outside_the_interval_is_not_asked():
  calls, interval = [], (level(0.3), level(0.7))
  drawn(by_classifier(1, counted(calls, 'class', log_prob), interval=interval), num_steps=10)
  jax.effects_barrier()
  assert len(calls) == 4  # t = 0.7, 0.6, 0.5, 0.4: the low end does not belong to it


def test_weights_are_those_of_each_examples_time():
  t, interval = jnp.array([0.3, 0.31, 0.7, 0.71]), (level(0.3), level(0.7))
  y = jnp.full((4, 1), 0.5)
  plain, full = gaussian(1.0, 0.25)(y, t), free(2.0)(y, t)
  limited = free(2.0, interval=interval)(y, t)
  np.testing.assert_array_equal(limited[::3], plain[::3])
  np.testing.assert_allclose(limited[1:3], full[1:3], rtol=1e-6)
  given = free(jnp.full(4, 2.0), interval=interval)(y, t)
  np.testing.assert_allclose(given, limited, rtol=1e-6)


def test_host_and_device_agree_at_every_time_of_the_table():
  """An end that is a time of the table is the same end in float32 and float64."""
  times = np.arange(1, 1001) / 1000
  for low, high in [(0.3, 0.7), (0.001, 0.002), (0.999, 1.0), (0.123, 0.456)]:
    interval = (level(low), level(high))
    on_host = guidance.inside(interval, LINEAR, times)
    on_device = jax.jit(lambda t, interval=interval: guidance.inside(interval, LINEAR, t))(jnp.float32(times))
    np.testing.assert_array_equal(on_host, on_device)
    np.testing.assert_array_equal(on_host, (times > low + 1e-9) & (times <= high + 1e-9))


@pytest.mark.parametrize('interval', [(1.0, 1.0), (2.0, 1.0), (-1.0, 1.0), (0.0, 0.009), (158.0, 200.0)])
def test_an_interval_must_be_one_of_the_schedules_levels(interval):
  with pytest.raises(UserError, match=r'levels from 0.01 to 157.*got ') as error:
    guidance.check_interval(interval, LINEAR)
  assert str(interval) in str(error.value)
  for allowed in ((), (0.0, 0.3), (0.28, 1.61), (100.0, 1e5)):
    guidance.check_interval(allowed, LINEAR)


# Formulation 2: the same densities, seen by a network that reads x_t = y_t + x0_vae ----------------------


@pytest.mark.parametrize('without', [('label',), ('vae', 'label')])
def test_formulation_2_guides_to_the_same_place(without):
  """Dropping the label alone keeps the shift in both branches; dropping all takes it away in one."""

  def network(x_t, t, values, drop):
    y = x_t if 'x0_vae' in drop else x_t - values['x0_vae']
    return mixture(y, t) if 'label' in drop else gaussian(1.0, 0.25)(y, t)

  own = denoiser(
    network,
    LINEAR,
    {'vae': ('x0_vae',), 'label': ('label',)},
    shift='x0_vae',
    terms=(Term(weight=1.0, without=without),),
  )
  values = {'x0_vae': jnp.full((COUNT, 1), 0.8), 'label': jnp.ones((COUNT, 1))}
  found = drawn(own.denoise(READ, values))
  np.testing.assert_allclose(found, (1.3197, 0.3577), atol=TOLERANCE)
