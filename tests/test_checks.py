"""Bounds of config fields: what each lets through, that none lets nan or inf through, what they say."""

import pytest
from ml_collections import ConfigDict

from vaediff import checks
from vaediff.errors import UserError

BOUNDS = {
  'at least': (checks.at_least(2), (2, 2.5, 1e30), (1.999, -3, 0), '>= 2'),
  'at least, a fraction': (checks.at_least(0.5), (0.5, 1), (0.499, 0), '>= 0.5'),
  'above': (checks.above(0), (1e-30, 1, 1e30), (0, 0.0, -1e-30), '> 0'),
  'between': (checks.between(0, 1), (0, 0.5, 1), (-1e-9, 1.000001), 'in [0, 1]'),
  'below one': (checks.below_one(), (0, 0.0, 0.999), (-1e-9, 1, 1.0, 2), 'in [0, 1)'),
  'below one, from': (checks.below_one(-1), (-1, 0, 0.999), (-1.001, 1), 'in [-1, 1)'),
  'inside or at': (checks.inside_or_at(0, 100), (1e-9, 99.5, 100), (0, -1, 100.5), 'in (0, 100]'),
  'zero or above': (checks.zero_or_above(1), (0, 0.0, 1.5, 1e30), (1, 0.5, -1e-9), '0 (off) or above 1'),
  'seed': (checks.seed(), (0, 7, 2**31 - 1), (-1, 2**31), 'in [0, 2^31)'),
  'inside': (checks.inside(0, 1), (1e-9, 0.5, 0.999), (0, 1, 1.5, -1), 'in (0, 1)'),
}
NOT_FINITE = [float('nan'), float('inf'), -float('inf')]


def section(value):
  return ConfigDict({'value': value})


def message(bound, value, prefix=''):
  with pytest.raises(UserError) as error:
    checks.check(section(value), {'value': bound}, prefix)
  return str(error.value)


@pytest.mark.parametrize('name', BOUNDS)
def test_a_number_within_its_bound_passes(name):
  bound, allowed, _, _ = BOUNDS[name]
  for value in allowed:
    checks.check(section(value), {'value': bound})


@pytest.mark.parametrize('name', BOUNDS)
def test_a_number_outside_is_named_with_what_is_allowed(name):
  bound, _, refused, says = BOUNDS[name]
  for value in refused:
    assert message(bound, value) == f'value must be {says}, got {value}'


@pytest.mark.parametrize('value', NOT_FINITE)
@pytest.mark.parametrize('name', BOUNDS)
def test_nothing_lets_nan_or_inf_through(name, value):
  bound, _, _, says = BOUNDS[name]
  assert message(bound, value) == f'value must be {says}, got {value}'


def test_a_name_is_one_of_those_there_are():
  bound = checks.one_of(('linear', 'cosine'))
  for value in ('linear', 'cosine'):
    checks.check(section(value), {'value': bound})
  for value in ('', 'Linear', 'cosine '):
    assert message(bound, value) == f'value is {value!r}; valid: linear, cosine'
  for value in NOT_FINITE:
    assert message(checks.one_of((1, 2)), value) == f'value is {value!r}; valid: 1, 2'


def test_the_names_may_be_the_keys_of_a_table():
  assert message(checks.one_of({'a': 1, 'b': 2}), 'c') == "value is 'c'; valid: a, b"


def test_fields_are_found_by_their_dots_and_the_prefix_is_in_front():
  config = ConfigDict({'optim': {'learning_rate': 0.0, 'clip_norm': 1.0}, 'name': 'x'})
  bounds = {'name': checks.one_of(('x',)), 'optim.clip_norm': checks.at_least(0)}
  checks.check(config, bounds)
  with pytest.raises(UserError) as error:
    checks.check(config, {**bounds, 'optim.learning_rate': checks.above(0)}, 'config.refiner.')
  assert str(error.value) == 'config.refiner.optim.learning_rate must be > 0, got 0.0'


def test_the_first_field_of_the_table_that_is_wrong_is_named():
  config = ConfigDict({'a': -1, 'b': -1, 'c': 1})
  one = checks.at_least(0)
  for order, first in ((('c', 'b', 'a'), 'b'), (('c', 'a', 'b'), 'a')):
    with pytest.raises(UserError, match=f'^{first} must be >= 0, got -1$'):
      checks.check(config, dict.fromkeys(order, one))


def test_an_empty_table_allows_everything():
  checks.check(section(float('nan')), {})


def test_a_field_that_is_not_there_is_a_mistake_of_the_code():
  with pytest.raises(KeyError):
    checks.check(section(1), {'other': checks.above(0)})
