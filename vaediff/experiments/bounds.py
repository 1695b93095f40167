"""What numbers of a stage's section may be, beyond what `vaediff.checks` has: with an end on both sides.

The upper ends are no advice. They are where a number stops meaning anything: a weight that float32 cannot add
to another, a network that no machine holds, a count of updates beyond int32, a sampler's table that would be
computed on the host for hours. Without them such a number is a hang, or memory that runs out.
"""

import math
import numbers
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from vaediff import checks, optim
from vaediff.checks import Bound, Bounds
from vaediff.models import layers

MAX_CALLS = 100_000
"""Passes of a network for one image; the published samplers take at most 1,000 steps."""
MAX_UPDATES = 2**31 - 1
"""Of the counter of updates, int32."""
MAX_WEIGHT = 1e6
"""Of a term of a loss: beside it float32 has no digit left for the others."""
MAX_WIDTH = 2**16
"""Channels, features, sizes of codes; and sides of maps, in pixels."""
MAX_LEVELS = 1024
"""Blocks, layers, heads, multipliers, sizes of groups."""


def _is_number(value: Any) -> bool:
  return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def number(least: int | float, most: int | float, *, above: bool = False, whole: bool = False) -> Bound:
  """Returns the bound of a number in [least, most], `above` in (least, most]; with `whole` of an integer."""

  def is_kind(value: Any) -> bool:
    return _is_number(value) and (isinstance(value, numbers.Integral) or not whole)

  def holds(value: Any) -> bool:
    return is_kind(value) and (least < value if above else least <= value) and value <= most

  def says(field: str, value: Any) -> str:
    if is_kind(value) and value > most:
      return f'{field} must be <= {most}, got {value}'
    kind = 'a whole number ' if whole and not is_kind(value) else ''
    return f'{field} must be {kind}{">" if above else ">="} {least}, got {value}'

  return Bound(holds, says)


def whole(least: int, most: int) -> Bound:
  """Returns the bound of an integer in [least, most]."""
  return number(least, most, whole=True)


def several(each: Bound, what: str, *, empty: bool = False, count: int = 0) -> Bound:
  """Returns the bound of a tuple whose items all hold.

  Args:
    each: of an item.
    what: the items, for the message, as 'whole numbers >= 1'.
    empty: () is allowed.
    count: how many there must be; 0 = any number.
  """

  def holds(value: Any) -> bool:
    if not isinstance(value, tuple | list) or not (value or empty):
      return False
    if value and count and len(value) != count:
      return False
    return all(each.holds(item) for item in value)

  how_many = f'{count} ' if count else ''
  or_empty = '() or ' if empty else ''
  return Bound(holds, lambda field, value: f'{field} must be {or_empty}{how_many}{what}, got {value!r}')


def sizes(most: int, *, empty: bool = False) -> Bound:
  """Returns the bound of a tuple of integers in [1, most]."""
  return several(whole(1, most), f'whole numbers in 1 ... {most}', empty=empty)


def weight(*, above: bool = False) -> Bound:
  """Returns the bound of the weight of a term: 0, which may turn it off, or more."""
  return number(0, MAX_WEIGHT, above=above)


def level() -> Bound:
  """Returns the bound of the mean of a logarithm or a logit, of either sign."""
  return number(-100, 100)


def spread() -> Bound:
  """Returns the bound of a standard deviation of the same."""
  return number(0, 100)


def side() -> Bound:
  """Returns the bound of the side of a map that something is compared with; 0 = with none."""
  return whole(0, MAX_WIDTH)


def calls() -> Bound:
  """Returns the bound of how often a network is called for one image."""
  return whole(1, MAX_CALLS)


def updates(least: int) -> Bound:
  """Returns the bound of a number of updates."""
  return whole(least, MAX_UPDATES)


def probabilities() -> Bound:
  """Returns the bound of probabilities that may be left out; how many there are is checked elsewhere."""
  return several(number(0, 1), 'numbers in [0, 1]', empty=True)


def within(section: str, fields: Bounds) -> dict[str, Bound]:
  """Returns bounds of the fields of a section, as fields of the section around it."""
  return {f'{section}.{field}': bound for field, bound in fields.items()}


def optimizers(*sections: str) -> dict[str, Bound]:
  """Returns the bounds of sections that describe optimizers."""
  return {field: bound for section in sections for field, bound in within(section, optim.BOUNDS).items()}


def numeric_fields(section: ConfigDict, prefix: str = '') -> Iterator[str]:
  """Yields the names, with dots, of all fields of a section that are numbers or tuples."""
  for name, value in section.items():
    if isinstance(value, ConfigDict):
      yield from numeric_fields(value, f'{prefix}{name}.')
    elif isinstance(value, numbers.Real | tuple) and not isinstance(value, bool):
      yield f'{prefix}{name}'


CONVOLUTIONAL = {
  'channels': whole(1, MAX_WIDTH),
  'channel_multipliers': sizes(MAX_LEVELS),
  'num_res_blocks': whole(1, MAX_LEVELS),
  'attention_resolutions': sizes(MAX_WIDTH, empty=True),
  'dropout': checks.below_one(),
  'dtype': checks.one_of(layers.DTYPES),
}
"""Of a network of residual blocks in levels."""
HEADS = {'channels': whole(4, MAX_WIDTH), 'dtype': checks.one_of(layers.DTYPES)}
"""Of heads on the maps of a denoiser."""
