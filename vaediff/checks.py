"""Bounds of config fields as tables: `{'loss.beta': at_least(0), ...}`, checked before anything is built.

Every bound is an interval or a set of names, and nan is in none. Rules across fields stay code.
"""

import dataclasses
import numbers
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from vaediff.errors import UserError


@dataclasses.dataclass(frozen=True)
class Bound:
  """What a field may be.

  Attributes:
    holds: value -> whether it is allowed.
    says: (field, value) -> the message where it is not.
  """

  holds: Callable[[Any], bool]
  says: Callable[[str, Any], str]


Bounds = Mapping[str, Bound]
"""By field, with dots: 'optim.learning_rate'."""


LONGEST_NAME = 200
"""Bytes; file systems allow 255, and endings are appended."""


def one_of(names: Collection[Any]) -> Bound:
  """Returns the bound of a field that is one of some names."""
  names = tuple(names)  # in a dict or set what cannot be hashed would be no answer
  shown = ', '.join(repr(name) if name == '' else str(name) for name in names)
  return Bound(lambda value: value in names, lambda field, value: f'{field} is {value!r}; valid: {shown}')


def checkpoint() -> Bound:
  """Returns the bound of a choice among the checkpoints of a stage: 'latest', 'best' or a step."""
  return Bound(
    lambda value: value in ('latest', 'best') or step_of(value) > 0,
    lambda field, value: f'{field} is {value!r}; valid: latest, best, or a step that is kept, as 8000',
  )


def step_of(choice: str) -> int:
  """Returns the step that a choice of a checkpoint names; 0 where it names none."""
  return int(choice) if choice.isascii() and choice.isdecimal() and len(choice) < 10 else 0


def count(least: int) -> Bound:
  """Returns the bound of a whole number in [least, 2^31): what is counted in steps, images or rows."""
  return Bound(
    lambda value: _is_number(value) and least <= value < 2**31,
    lambda field, value: (
      f'{field} must be below 2^31, got {value}'
      if _is_number(value) and value >= 2**31 and value != float('inf')
      else f'{field} must be >= {least}, got {value}'
    ),
  )


def at_least(least: int | float) -> Bound:
  """Returns the bound of a number >= `least`."""
  return _number(lambda value: value >= least, f'>= {least}')


def above(least: int | float) -> Bound:
  """Returns the bound of a number > `least`."""
  return _number(lambda value: value > least, f'> {least}')


def between(least: int | float, most: int | float) -> Bound:
  """Returns the bound of a number in [least, most]."""
  return _number(lambda value: least <= value <= most, f'in [{least}, {most}]')


def below_one(least: int | float = 0) -> Bound:
  """Returns the bound of a number in [least, 1)."""
  return _number(lambda value: least <= value < 1, f'in [{least}, 1)')


def inside_or_at(least: int | float, most: int | float) -> Bound:
  """Returns the bound of a number in (least, most]."""
  return _number(lambda value: least < value <= most, f'in ({least}, {most}]')


def zero_or_above(least: int | float) -> Bound:
  """Returns the bound of a number that is 0, which turns something off, or > `least`."""
  return _number(lambda value: value == 0 or value > least, f'0 (off) or above {least}')


def seed() -> Bound:
  """Returns the bound of what random numbers start from: a number in [0, 2^31)."""
  return _number(lambda value: 0 <= value < 2**31, 'in [0, 2^31)')


def inside(least: int | float, most: int | float) -> Bound:
  """Returns the bound of a number in (least, most)."""
  return _number(lambda value: least < value < most, f'in ({least}, {most})')


def file_name(or_empty: bool = False) -> Bound:
  """Returns the bound of what becomes the name of one file or folder, in the folder where it belongs."""

  def holds(value: Any) -> bool:
    if not isinstance(value, str) or value in ('', '.', '..'):
      return or_empty and value == ''
    return not set(value) & {'/', '\\', '\0'} and value.isprintable() and len(value.encode()) <= LONGEST_NAME

  empty = ', or empty' if or_empty else ''
  return Bound(
    holds,
    lambda field, value: (
      f'{field} is {value!r}; it names files of the run, so that it must be at most {LONGEST_NAME} letters, '
      f'digits and signs without / or \\, and not . or ..{empty}'
    ),
  )


def each(bound: Bound) -> Bound:
  """Returns the bound of a tuple whose every element is within a bound."""
  return Bound(
    lambda value: isinstance(value, tuple | list) and all(map(bound.holds, value)),
    lambda field, value: (
      bound.says(f'an element of {field} = {value}', next(item for item in value if not bound.holds(item)))
      if isinstance(value, tuple | list)
      else f'{field} must be a tuple, as (1, 2), got {value!r}'
    ),
  )


def _number(holds: Callable[[Any], bool], allowed: str) -> Bound:
  return Bound(
    lambda value: _is_number(value) and abs(value) != float('inf') and holds(value),
    lambda field, value: f'{field} must be {allowed}, got {value}',
  )


def _is_number(value: Any) -> bool:
  """Returns whether it is a number and not nan; a truth value is none."""
  return isinstance(value, numbers.Real) and not isinstance(value, bool) and value == value


def check(section: ConfigDict, bounds: Bounds, prefix: str = '') -> None:
  """Raises UserError for the first field outside its bound; names field, value and what is allowed.

  Args:
    section: of the config, with every field that `bounds` names.
    bounds: by field of the section.
    prefix: put before the field in the message, as 'config.'.
  """
  for field, bound in bounds.items():
    value = section
    for name in field.split('.'):
      value = value[name]
    if not bound.holds(value):
      raise UserError(bound.says(f'{prefix}{field}', value))
