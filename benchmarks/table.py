"""Statistics of the rounds, and the results as a Markdown table."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.cases import CASES
from vaediff.evaluation import report

COLUMNS = {'jax': 'JAX', 'torch_eager': 'PyTorch eager', 'torch_compile': 'torch.compile'}


@dataclasses.dataclass(frozen=True)
class Spread:
  """Median, least and greatest of the rounds."""

  median: float
  low: float
  high: float

  @classmethod
  def of(cls, values: Sequence[float]) -> 'Spread':
    """Returns the spread of at least one value."""
    return cls(statistics.median(values), min(values), max(values))

  def __str__(self) -> str:
    return f'{self.median:.3g} [{self.low:.3g}-{self.high:.3g}]'


def ratios(sides: dict[str, dict[str, Any]], side: str) -> list[float]:
  """Returns, round by round, the seconds of `side` over those of JAX: above 1, JAX is faster."""
  return [theirs / ours for theirs, ours in zip(sides[side]['seconds'], sides['jax']['seconds'], strict=True)]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Returns a Markdown table, padded so that it can be read as it is."""
  return report.table([dict(zip(header, row, strict=True)) for row in rows], markdown=True) + '\n'


def seconds(side: dict[str, Any] | None) -> str:
  """Returns a cell: median [least-greatest], 'failed', or '-' for a side that was not measured."""
  if side is None:
    return '-'
  return 'failed' if 'error' in side else str(Spread.of(side['seconds']))


def ratio(sides: dict[str, dict[str, Any]], side: str) -> str:
  """Returns a cell with the spread of the ratios; '-' where there are none."""
  return str(Spread.of(ratios(sides, side))) if 'seconds' in sides.get(side, {}) else '-'


def networks(results: dict[str, Any]) -> str:
  """Returns the results of `benchmarks.paired` as text: the machine, the table, what the columns are."""
  header = ('case', 'images', 'parameters', *(f'{name}, s' for name in COLUMNS.values()))
  header += ('eager / JAX', 'compile / JAX')
  rows, versions, idle, apart = [], {}, 0.0, 0.0
  for name, entry in results['measurements'].items():
    sides = entry['sides']
    cells = [seconds(sides.get(side)) for side in COLUMNS]
    cells += [ratio(sides, side) for side in ('torch_eager', 'torch_compile')]
    rows.append((name, str(entry['images']), f'{entry["parameters"]:,}', *cells))
    versions.setdefault(_versions(entry['software']), []).append(name)
    idle = max(idle, *(side.get('idle_cores', 0.0) for side in sides.values()))
    apart = max(apart, entry['largest_difference'])
  machine = results['machine']
  cases = {name.partition('/')[0] for name in results['measurements']}
  lines = [
    f'# {machine["device"]}, {results["dtype"]}\n',
    markdown(header, rows),
    'Seconds are the median [least-greatest] of the rounds; a ratio is that of PyTorch to JAX in one round:',
    'above 1 JAX is faster. The sides took turns within each round.',
    '',
    f'With the same weights the outputs of the pairs differ by at most {apart:.2g} of the largest (float32).',
    f'A waiting worker used at most {idle:.2g} cores.',
    '',
    *(f'- `{name}`: {case.about}.' for name, case in CASES.items() if name in cases),
    '',
    f'{machine["cpu"]}, {machine["cores"]} cores; {machine["system"]}.',
    *(f'{version}: {"all" if len(versions) == 1 else ", ".join(of)}.' for version, of in versions.items()),
  ]
  return '\n'.join(lines) + '\n'


def _versions(software: dict[str, str]) -> str:
  return ', '.join(
    f'{name} {value}' if name != 'XLA_FLAGS' else f'`{value}`' for name, value in software.items()
  )
