"""Tables of figures as text, Markdown and JSON. Everything is written to a temporary name, then renamed."""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from vaediff.evaluation.measures import Figure
from vaediff.storage import files

Row = Mapping[str, Figure | str | int | float | None]


def cell(value: Figure | str | int | float | None) -> str:
  """Returns a value as a cell: '12.3 ± 0.4 (floor 1.2 at N = 800)', or a dash where there is none.

  A figure of another number of images than its row says which.
  """
  if isinstance(value, Figure):
    if value.value is None:
      return '-'
    text = number(value.value)
    if value.spread is not None:
      text += f' ± {number(value.spread)}'
    if value.n is not None:
      text += f' (N = {value.n})'
    if value.floor is not None:
      text += f' (floor {number(value.floor)} at N = {value.floor_n})'
    return text
  if value is None:
    return '-'
  return number(value) if isinstance(value, float) else str(value)


def number(value: float) -> str:
  """Returns four significant digits."""
  return f'{value:.4g}' if math.isfinite(value) else str(value)


def table(rows: Sequence[Row], *, markdown: bool = False) -> str:
  """Returns the rows as a table; columns are all keys, in the order in which they first appear."""
  names = list(dict.fromkeys(name for row in rows for name in row))
  cells = [names, *[[cell(row.get(name)) for name in names] for row in rows]]
  widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
  lines = [[text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in cells]
  if not markdown:
    return '\n'.join('  '.join(line).rstrip() for line in lines)
  lines.insert(1, ['-' * width for width in widths])
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def transpose(rows: Sequence[Row], first: str) -> list[Row]:
  """Returns the table with rows and columns exchanged; the column `first` names the new columns."""
  names = [name for name in dict.fromkeys(name for row in rows for name in row) if name != first]
  return [{'': name, **{str(row[first]): row.get(name) for row in rows}} for name in names]


def reasons(rows: Sequence[Row]) -> list[str]:
  """Returns one line for each reason why values are missing, with the figures that it concerns."""
  by_reason: dict[str, list[str]] = {}
  for row in rows:
    for name, value in row.items():
      if isinstance(value, Figure) and value.value is None and value.missing:
        names = by_reason.setdefault(value.missing, [])
        if name not in names:
          names.append(name)
  return [f'{", ".join(names)}: {reason}' for reason, names in by_reason.items()]


def to_json(value: Any) -> Any:
  """Returns a tree that JSON can hold: figures as objects, numbers that are not finite as text."""
  if isinstance(value, Figure):
    kept = {name: item for name, item in vars(value).items() if item not in (None, '')}
    return to_json({'value': None, **kept})
  if isinstance(value, Mapping):
    return {str(name): to_json(item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [to_json(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  return value


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a JSON file at once."""
  files.write_text(path, json.dumps(to_json(value), indent=2, allow_nan=False) + '\n')
