"""Ex-post density estimation on a mixture that is known."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from vaediff.conditions import prior
from vaediff.errors import UserError

MEANS = np.array([[4.0, 0.0], [-4.0, 0.0], [0.0, 4.0]])


def settings(**changes):
  return ConfigDict(
    {
      'kind': 'gmm',
      'covariance': 'full',
      'num_components': (1, 3, 12),
      'holdout_fraction': 0.2,
      'num_encoded': 1000,
      **changes,
    }
  )


def mixture(count=1500):
  rng = np.random.default_rng(0)
  return MEANS[rng.integers(0, 3, count)] + rng.normal(size=(count, 2)) @ np.array([[0.5, 0.3], [0.0, 0.4]])


def draws(arrays, count=4000):
  keys = jax.random.split(jax.random.key(1), count)
  return np.asarray(prior.draw(arrays, keys, 2))


def test_held_out_likelihood_finds_the_number_of_components():
  arrays, scores = prior.fit(mixture(), settings(), seed=0)
  assert arrays['means'].shape == (3, 2)
  assert max(scores, key=scores.get) == 3


@pytest.mark.parametrize('covariance', prior.COVARIANCES)
def test_draws_have_the_moments_of_the_data(covariance):
  z = mixture()
  arrays, _ = prior.fit(z, settings(covariance=covariance, num_components=(3,)), seed=0)
  x = draws(arrays)
  np.testing.assert_allclose(x.mean(0), z.mean(0), atol=0.2)
  np.testing.assert_allclose(np.cov(x.T), np.cov(z.T), atol=0.6)


def test_draws_are_shuffled_and_depend_on_their_key_alone():
  arrays, _ = prior.fit(mixture(), settings(num_components=(3,)), seed=0)
  x = draws(arrays, 200)
  nearest = np.argmin(((x[:, None] - MEANS) ** 2).sum(-1), axis=1)
  assert np.mean(nearest[1:] == nearest[:-1]) < 0.6  # grouped draws would give nearly 1
  keys = jax.random.split(jax.random.key(1), 200)
  np.testing.assert_allclose(np.asarray(prior.draw(arrays, keys[7:8], 2))[0], x[7], atol=1e-5)


def test_normal_prior_is_standard():
  x = draws({})
  np.testing.assert_allclose(np.cov(x.T), np.eye(2), atol=0.1)


def test_too_few_latents():
  with pytest.raises(UserError, match='all more than the 8 latents'):
    prior.fit(mixture(10), settings(num_components=(50,)), seed=0)
  with pytest.raises(UserError, match='1 of 10 latents is left to fit a mixture to, and at least 2'):
    prior.fit(mixture(10), settings(num_components=(1,), holdout_fraction=0.9), seed=0)


@pytest.mark.parametrize(('fraction', 'components'), [(0.9, (10,)), (0.95, (1,))])
def test_a_class_of_which_too_few_codes_are_left_has_the_components_of_all(fraction, components):
  """It has enough codes, but most are held out: 20 of 9 in 10 leave two, to which ten cannot be fitted."""
  whole, _ = prior.fit(mixture(), settings(), seed=0)
  z, section = mixture(20), settings(num_components=components, holdout_fraction=fraction)
  found = prior.fit_classes(whole, z, np.zeros(20, np.int64), 1, section, seed=0)
  np.testing.assert_array_equal(found['means'], whole['means'])
  np.testing.assert_array_equal(found['class_weights'], prior.of_classes(whole, z, np.zeros(20, np.int64), 1))
  more = settings(num_components=components, holdout_fraction=0.5)  # half of 20 is enough for either
  own = prior.fit_classes(whole, z, np.zeros(20, np.int64), 1, more, seed=0)
  assert own['means'].shape == (components[0], 2)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'covariance': 'spherical'}, r"prior.covariance is 'spherical'; valid: full, diag, tied"),
    ({'kind': 'uniform'}, r"prior.kind is 'uniform'; valid: normal, gmm"),
    ({'holdout_fraction': 1.0}, r'prior.holdout_fraction must be in \(0, 1\), got 1.0'),
    ({'num_encoded': 0}, 'prior.num_encoded must be >= 1, got 0'),
    ({'num_components': ()}, r'prior.num_components must name counts >= 1.*, got \(\)'),
    ({'num_components': (4, 0)}, r'prior.num_components must name counts >= 1.*, got \(4, 0\)'),
    ({'num_components': (4, 1.5)}, r'prior.num_components must name counts >= 1, whole .*, got \(4, 1.5\)'),
    ({'num_components': (float('nan'),)}, r'prior.num_components must name counts .* got \(nan,\)'),
  ],
)
def test_bad_settings_are_named(changes, message):
  with pytest.raises(UserError, match=message):
    prior.check(ConfigDict({'prior': settings(**changes)}))


def test_settings_are_checked_when_a_vae_is_built():
  prior.check(ConfigDict({'prior': settings()}))
