"""Classes of the data set by name: what a config asks for by name becomes the numbers that programs know."""

import re

from ml_collections import ConfigDict

from vaediff.data import sources
from vaediff.errors import UserError

MOST_LISTED = 50
"""Names in a message."""


def number(config: ConfigDict) -> None:
  """Puts the numbers of classes in place of their names in `sample.labels` of every stage, in place.

  The data set is opened only where there is a name.

  Raises:
    UserError: for a name that no class has; lists the names.
  """
  for stage in config.stages:
    sample = config[stage].sample
    labels = sample.labels if 'labels' in sample else ()
    if isinstance(labels, tuple | list) and any(isinstance(item, str) for item in labels):
      names = sources.open_source(config.data, 'train').label_names
      sample.labels = numbers(tuple(labels), names, f'config.{stage}.sample.labels')


def numbers(labels: tuple[int | str, ...], names: tuple[str, ...], field: str) -> tuple[int, ...]:
  """Returns the numbers of classes that are given as numbers or names, or as several in one text.

  What a shell hands over without quotes, `Bag,Coat`, is one text. Case does not matter, and an underscore
  stands for a space: `ankle_boot`.

  Raises:
    UserError: for a name that no class has; names the field.
  """
  known = {_plain(name): index for index, name in reversed(list(enumerate(names)))}
  known |= {name: index for index, name in enumerate(names)}
  found = []
  for item in labels:
    if not isinstance(item, str):
      found.append(item)
      continue
    whole = item.strip() in known or _plain(item) in known
    for text in [item] if whole else item.split(','):
      found.append(_number(text.strip(), known, names, field))
  return tuple(found)


def _number(text: str, known: dict[str, int], names: tuple[str, ...], field: str) -> int:
  for name in (text, _plain(text)):
    if name in known:
      return known[name]
  if text.isascii() and text.isdecimal() and len(text) < 10:
    return int(text)
  if not names:
    raise UserError(f'{field} has {text!r}, but the classes of this data set have no names; give numbers')
  raise UserError(f'{field} has {text!r}, which is no class of this data set; those are {listed(names)}')


def _plain(name: str) -> str:
  return re.sub(r'[\s_]+', ' ', name.strip()).casefold()


def listed(names: tuple[str, ...], numbers: tuple[int, ...] | None = None) -> str:
  """Returns classes as text, as '3 Dress, 7 Sneaker'; those with these numbers, or all."""
  numbers = tuple(range(len(names))) if numbers is None else numbers
  shown = [title(names, index) for index in numbers[:MOST_LISTED]]
  more = f', ... ({len(numbers)} in all)' if len(numbers) > MOST_LISTED else ''
  return ', '.join(shown) + more


def title(names: tuple[str, ...], index: int) -> str:
  """Returns number and name of a class; the number alone where it has no other name."""
  name = names[index] if index < len(names) else ''
  return f'{index} {name}' if name not in ('', str(index)) else str(index)
