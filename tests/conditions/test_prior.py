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
