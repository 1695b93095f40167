"""The tables of `--mode=compile`: one per topology, and a summary of several."""

from collections.abc import Callable
from typing import Any

from vaediff.machine import chips, hlo

GIB = chips.GIB

LINES: tuple[tuple[str, Callable[[dict[str, Any]], Any]], ...] = (
  ('images, all devices', lambda row: row['batch_size']),
  ('parameters, GiB', lambda row: gib(row['parameter_bytes'])),
  ('optimizer, GiB', lambda row: gib(row['optimizer_bytes'])),
  ('parameter average, GiB', lambda row: gib(row['ema_bytes'])),
  ('frozen networks, GiB', lambda row: gib(row['frozen_bytes'])),
  ('arguments as laid out, GiB', lambda row: gib(row['argument_bytes'])),
  ('temporaries, GiB', lambda row: gib(row['temp_bytes'])),
  ('  activations of these, GiB', lambda row: gib(row['activation_bytes'])),
  ('program code, GiB', lambda row: gib(row['code_bytes'])),
  ('needed, GiB', lambda row: need(row)),
  ('HBM, GiB', lambda row: gib(row['hbm_bytes'])),
  ('fits', lambda row: 'yes' if row['fits'] else 'NO'),
  ('TFLOPs', lambda row: row['flops'] / 1e12),
  ('memory traffic, GB', lambda row: row['accessed_bytes'] / 1e9),
  *((f'{kind}, MB', lambda row, kind=kind: row['collective_bytes'][kind] / 1e6) for kind in hlo.COLLECTIVES),
  ('sent to other devices, MB', lambda row: row['sent_bytes'] / 1e6),
  ('loops of unknown length', lambda row: row['unread_loops']),
  ('compute at peak, s', lambda row: row['compute_seconds']),
  ('memory at peak, s', lambda row: row['memory_seconds']),
  ('collectives at peak, s', lambda row: row['collective_seconds']),
  ('estimate, s', lambda row: row['seconds']),
  ('  of it collectives, %', lambda row: 100 * row['collective_seconds'] / (row['seconds'] or 1.0)),
  ('estimate, images/s', lambda row: row['images_per_second']),
  ('compilation, s', lambda row: row['compile_seconds']),
)
"""Label with unit, and the figure of a row: per device and run of the program unless it says otherwise."""
SUMMARY: tuple[tuple[str, str], ...] = (
  ('images', 'images, all devices'),
  ('state GiB', 'arguments as laid out, GiB'),
  ('temp GiB', 'temporaries, GiB'),
  ('need GiB', 'needed, GiB'),
  ('fits', 'fits'),
  ('TFLOPs', 'TFLOPs'),
  ('traffic GB', 'memory traffic, GB'),
  ('sent MB', 'sent to other devices, MB'),
  ('step s', 'estimate, s'),
  ('coll. %', '  of it collectives, %'),
  ('images/s', 'estimate, images/s'),
  ('compiled s', 'compilation, s'),
)
"""Short head, and the label in `LINES`."""


def table(rows: list[dict[str, Any]]) -> str:
  """Returns the figures of the programs of one topology, a column for each program."""
  first = rows[0]
  lines = [(f'{first["topology"]}, {first["devices"]} devices', [_title(row) for row in rows])]
  lines += [(label, [_cell(figure, row) for row in rows]) for label, figure in LINES]
  lines += [(f'{_title(row)}: {row["note"]}', []) for row in rows if row['note']]
  return _align(lines)


def summary(rows: list[dict[str, Any]]) -> str:
  """Returns a line per program, the topologies of one program below each other."""
  figures = dict(LINES)
  lines = [('program, topology (devices)', [head for head, _ in SUMMARY])]
  for title in dict.fromkeys(map(_title, rows)):
    lines += [
      (f'{title}, {row["topology"]} ({row["devices"]})', [_cell(figures[label], row) for _, label in SUMMARY])
      for row in rows
      if _title(row) == title
    ]
  return _align(lines)


def _title(row: dict[str, Any]) -> str:
  return f'{row["stage"]} {row["program"]}'


def _cell(figure: Callable[[dict[str, Any]], Any], row: dict[str, Any]) -> str:
  try:
    value = figure(row)
  except KeyError:  # refused for its size
    return '-'
  return f'{value:,.4g}' if isinstance(value, float) else str(value)


def _align(lines: list[tuple[str, list[str]]]) -> str:
  left = max(len(label) for label, cells in lines if cells)
  widths = [max(map(len, column)) for column in zip(*(cells for _, cells in lines if cells), strict=True)]
  text = []
  for label, cells in lines:
    padded = [f'  {cell:>{width}}' for cell, width in zip(cells, widths, strict=False)]  # notes have none
    text.append(label.ljust(left) + ''.join(padded))
  return '\n'.join(text)


def need(row: dict[str, Any]) -> str:
  """Returns GiB; where the compiler refused, what it named is a lower bound."""
  return ('' if 'temp_bytes' in row else '>= ') + gib(row['total_bytes'])


def gib(count: int | float) -> str:
  """Returns a number of bytes in GiB, with three decimals."""
  return f'{count / GIB:,.3f}'
