"""One table of several trained runs: the figures of `--mode=evaluate`, over the seeds of training.

    python -m benchmarks.results 'pixel=runs/pixel-*' 'latent=runs/latent-*/evaluation/ddgan.json'

Each argument is a label and the runs of one setting, which differ in their seeds: folders, whose newest
figures are read, or files of figures. Writes nothing but the table.
"""

import glob
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from vaediff.errors import UserError
from vaediff.evaluation import measures, report
from vaediff.evaluation.measures import Figure

FIGURES = ('fd_classifier', 'precision_classifier', 'recall_classifier')
SAMPLES = ('refined samples', 'samples')
"""Ends of the names of the rows of samples, the first that is there."""


def read(path: pathlib.Path) -> dict[str, Any]:
  """Returns what a table needs of one run, from its folder or a file of figures.

  Raises:
    UserError: when it was not evaluated, or draws no samples.
  """
  workdir, files = path, sorted(path.glob('evaluation/*.json'), key=lambda file: file.stat().st_mtime)
  if path.is_file():
    workdir, files = path.parent.parent, [path]
  found = [value for value in map(read_json, files) if 'samples' in value]
  if not found:
    raise UserError(f'{path}: no figures there; run --mode=evaluate --workdir={workdir}')
  value = found[-1]
  rows = [row for end in SAMPLES for row in value['samples'] if row['set'].endswith(end)]
  if not rows:
    raise UserError(f'{path}: the stage {value["stage"]!r} draws no samples, so there is nothing to compare')
  absent = [name for name in FIGURES if rows[0].get(name, {}).get('value') is None]
  if absent:
    raise UserError(
      f'{path}: no {", ".join(absent)} there; evaluate it with '
      '--config.evaluate.extractors="(\'classifier\',)"'
    )
  file = workdir / value['stage'] / 'summary.json'
  if not file.is_file():
    raise UserError(f'{path}: {file} is missing, so its training did not end; end it, then evaluate it again')
  summary = read_json(file)
  return {'row': rows[0], 'step': value['step'], 'seconds': summary['seconds']}


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Returns the object of a file."""
  return json.loads(path.read_text())


def row_of(label: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Returns one row: mean and standard deviation over the runs, or of one run over its sets of samples."""
  rows = [run['row'] for run in runs]
  figures = measures.over_seeds(
    [
      {name: row[name]['value'] for name in FIGURES}
      | {'seconds per 100 images': 100 * row['seconds per image']['value']}
      | {'training seconds of this stage': run['seconds']}
      for run, row in zip(runs, rows, strict=True)
    ]
  )
  if len(rows) == 1:
    figures |= {
      name: Figure(value=rows[0][name]['value'], spread=rows[0][name].get('spread')) for name in FIGURES
    }
  seeds = {'runs': len(runs), 'N': rows[0]['N'], 'updates': runs[0]['step'], 'NFE': rows[0]['NFE']}
  return {'setting': label, **seeds, **figures}


def table(arguments: Sequence[str]) -> list[dict[str, Any]]:
  """Returns the rows of arguments `label=pattern`, and of what real images get.

  Raises:
    UserError: for an argument of another form, or one that names no run.
  """
  rows, floors = [], {}
  for argument in arguments:
    label, _, pattern = argument.partition('=')
    folders = sorted(map(pathlib.Path, glob.glob(pattern)))
    if not pattern or not folders:
      raise UserError(f'{argument!r} must be a label and existing runs, such as pixel=runs/pixel-*')
    runs = [read(folder) for folder in folders]
    rows.append(row_of(label, runs))
    floors |= {name: runs[0]['row'][name].get('floor') for name in FIGURES}
  real = {name: Figure(value=value) for name, value in floors.items() if value is not None}
  return [*rows, {'setting': 'real images', 'N': rows[0]['N'], **real}]


def main(arguments: Sequence[str]) -> int:
  """Prints the table; returns the exit status."""
  try:
    if not arguments:
      raise UserError("no runs named; usage: python -m benchmarks.results 'label=runs/label-*' ...")
    print(report.table(table(arguments), markdown=True))
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
