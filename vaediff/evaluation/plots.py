"""Plots of an evaluation, as PNG files."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vaediff.evaluation.measures import Figure
from vaediff.run import images
from vaediff.storage import files

MARKERS = 'osD^v'
"""Of lines with the same colour, of which there are `NUM_COLOURS`."""
NUM_COLOURS = 10


def bars(
  path: pathlib.Path, rows: Sequence[Mapping[str, Any]], made_of: Mapping[str, str] | None = None
) -> bool:
  """Draws the Fréchet distances of every set of samples, one panel per network, with the floor as a line.

  Returns:
    False where there is none to draw; then there is no file, nor that of an earlier call.
  """
  names = [name for name in rows[0] if name == 'fid' or name.startswith('fd_')]
  names = [name for name in names if any(has_value(row.get(name)) for row in rows)]
  if not names:
    path.unlink(missing_ok=True)
    return False
  plot = blank(4 * len(names), 3.2)
  axes = plot.subplots(1, len(names), squeeze=False)
  for axis, name in zip(axes[0], names, strict=True):
    shown = [row for row in rows if has_value(row.get(name))]
    values = [row[name].value for row in shown]
    spread = [row[name].spread or 0 for row in shown]
    axis.bar([row['set'] for row in shown], values, yerr=spread, width=0.6, capsize=4)
    if shown[0][name].floor is not None:
      axis.axhline(shown[0][name].floor, color='black', linewidth=1, linestyle='--', label='floor')
      axis.legend()
    axis.set_title(name)
    axis.tick_params(axis='x', labelrotation=15, labelsize=8)
  save(plot, path, made_of)
  return True


def curves(
  path: pathlib.Path,
  rows: Sequence[Mapping[str, Any]],
  measure: str,
  floor: float | None,
  made_of: Mapping[str, str] | None = None,
) -> bool:
  """Draws the trade-off: a distance against network evaluations, and against seconds per image.

  One line per `line` of the rows (run, sampler, guidance), with the spread over seeds as error bars.

  Returns:
    False where there is none to draw; then there is no file, nor that of an earlier call.
  """
  if not any(has_value(row.get(measure)) for row in rows):
    path.unlink(missing_ok=True)
    return False
  plot = blank(11, 3.6)
  axes = plot.subplots(1, 2, sharey=True)
  lines: dict[str, list[Mapping[str, Any]]] = {}
  for row in rows:
    if has_value(row.get(measure)):
      lines.setdefault(row['line'], []).append(row)
  for number, (name, points) in enumerate(lines.items()):
    marker = MARKERS[number // NUM_COLOURS % len(MARKERS)]
    points = sorted(points, key=lambda row: row['NFE'])
    values = [row[measure].value for row in points]
    spread = [row[measure].spread or 0 for row in points]
    for axis, x in zip(axes, ('NFE', 'seconds per image'), strict=True):
      axis.errorbar([row[x] for row in points], values, yerr=spread, marker=marker, capsize=3, label=name)
  for axis, x in zip(axes, ('network evaluations per image', 'seconds per image'), strict=True):
    axis.set_xscale('log')
    axis.set_yscale('log')
    axis.set_xlabel(x)
    if floor is not None and floor > 0:
      axis.axhline(floor, color='black', linewidth=1, linestyle='--')
  axes[0].set_ylabel(measure)
  axes[1].legend(fontsize=8, loc='upper left', bbox_to_anchor=(1.02, 1.0))
  save(plot, path, made_of)
  return True


def pairs(
  path: pathlib.Path, above: np.ndarray, below: np.ndarray, made_of: Mapping[str, str] | None = None
) -> None:
  """Writes two rows of uint8 images as one picture."""
  images.write_png(path, images.grid(np.concatenate([above, below]), len(above)), made_of)


def has_value(value: Any) -> bool:
  """Returns whether a cell holds a figure with a value."""
  return isinstance(value, Figure) and value.value is not None


def blank(width: float | int, height: float | int) -> Any:
  """Returns an empty plot of so many inches, which belongs to no window: no display is looked for."""
  from matplotlib.figure import Figure as Plot  # imported late: most of a second that other modes do not need

  return Plot(figsize=(width, height))


def save(plot: Any, path: pathlib.Path, made_of: Mapping[str, str] | None) -> None:
  """Writes a plot, with what it was made of."""
  plot.tight_layout()
  text = {images.MADE_OF: json.dumps(dict(made_of), sort_keys=True)} if made_of else {}
  with files.replacing(path) as temporary:
    plot.savefig(temporary, format='png', dpi=120, metadata=text)
