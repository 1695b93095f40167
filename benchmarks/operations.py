"""Which operation costs the difference? Those that the U-Nets are made of, paired one by one.

    python -m benchmarks.operations --cases=unet_cifar10,unet_small

Every distinct convolution, group norm, matrix product, attention, dropout and the update of the parameters
of a U-Net is timed alone on both sides, at the network's own shapes, and multiplied by how often it occurs in
one forward pass or one train step. FIR resampling, which the U-Nets do not have and NCSN++ does, is timed at
two of their shapes and counts nothing. Alone, an operation reads and writes memory that a compiler would have
saved by fusing it with the next: sums say where to look, not what the network takes. That is also why
torch.compile is no side by default.

Results: `benchmarks/results/<device>-operations.json` and `.md`.
"""

import argparse
import contextlib
import statistics
from typing import Any

from benchmarks import machine, pairing, table
from benchmarks.cases import CASES, select
from benchmarks.paired import check, cli, make_parser
from vaediff.errors import UserError

PHASES = {
  'conv3x3': ('forward', 'input_gradient', 'weight_gradient'),
  'group_norm_silu': ('forward', 'with_gradient'),
  'matmul': ('forward', 'with_gradient'),
  'attention': ('forward', 'with_gradient'),
  'fir_down': ('forward', 'with_gradient'),
  'fir_up': ('forward', 'with_gradient'),
  'dropout': ('with_gradient',),
  'update': ('update',),
}


def in_step(kind: str, phase: str) -> bool:
  """Returns whether a train step has this phase; 'with_gradient' holds the forward pass."""
  return phase != 'forward' or kind == 'conv3x3'


def in_forward(kind: str, phase: str) -> bool:
  """Returns whether a forward pass, which has no dropout, has this phase."""
  return phase == 'forward'


TOTALS = {'forward pass': in_forward, 'train step': in_step}


def summary(rows: list[dict[str, Any]]) -> str:
  """Returns, for the forward pass and the train step, the seconds of each operation, largest gap first."""
  text = ''
  for title, counts in TOTALS.items():
    totals = {}
    for row in rows:
      if row['times'] and counts(row['kind'], row['phase']):
        ours, theirs = (row['times'] * median(row, side) for side in ('jax', 'torch_eager'))
        total = totals.setdefault((row['kind'], row['phase']), [0.0, 0.0])
        total[0], total[1] = total[0] + ours, total[1] + theirs
    order = sorted(totals.items(), key=lambda item: abs(item[1][0] - item[1][1]), reverse=True)
    cells = [
      (kind, phase, f'{ours:.3g}', f'{theirs:.3g}', f'{theirs / ours:.2f}', f'{ours - theirs:+.3g}')
      for (kind, phase), (ours, theirs) in order
    ]
    header = ('operation', 'phase', 'JAX, s', 'PyTorch eager, s', 'eager / JAX', 'JAX - eager, s')
    gap = sum(ours - theirs for ours, theirs in totals.values())
    (kind, phase), (ours, theirs) = order[0]
    text += f'### One {title}\n\n{table.markdown(header, cells)}\n'
    text += (
      f'JAX minus PyTorch: {gap:+.3g} s in all; most of all {kind}, {phase}: {ours - theirs:+.3g} s.\n\n'
    )
  return text


def median(row: dict[str, Any], side: str) -> float:
  """Returns the median seconds of a side."""
  return statistics.median(row['sides'][side]['seconds'])


def report(results: dict[str, Any]) -> str:
  """Returns all results as text."""
  text = f'# Single operations: {results["machine"]["device"]}, {results["dtype"]}\n\n'
  for case, entry in results['measurements'].items():
    text += f'## {case}, {entry["images"]} images\n\n{summary(entry["operations"])}### Each operation\n\n'
    rows = sorted(
      entry['operations'],
      key=lambda row: abs(median(row, 'jax') - median(row, 'torch_eager')) * row['times'],
      reverse=True,
    )
    cells = [
      (
        row['kind'],
        row['phase'],
        'x'.join(map(str, row['shape'])),
        str(row['times']),
        table.seconds(row['sides']['jax']),
        table.seconds(row['sides']['torch_eager']),
        table.ratio(row['sides'], 'torch_eager'),
        table.ratio(row['sides'], 'torch_compile'),
      )
      for row in rows
    ]
    header = ('operation', 'phase', 'shape', 'times', 'JAX, s', 'PyTorch eager, s', 'eager / JAX')
    text += table.markdown((*header, 'compile / JAX'), cells) + '\n'
  text += (
    'Shapes: batch, height, width, channels in (, out, stride); rows, in, out; batch, positions, heads, '
  )
  return text + 'channels; parameters. Ratios above 1: JAX is faster.\n'


def listed(found: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
  """Returns one row per operation and phase, with FIR resampling beside those of the network."""
  norms = [row['shape'] for row in found if row['kind'] == 'group_norm_silu']
  side, channels = max(shape[1] for shape in norms), min(shape[3] for shape in norms)
  found = found + [
    {'kind': 'fir_down', 'shape': [count, side, side, channels], 'times': 0},
    {'kind': 'fir_up', 'shape': [count, side // 2, side // 2, channels], 'times': 0},
  ]
  return [{**row, 'phase': phase} for row in found for phase in PHASES[row['kind']]]


def run(flags: argparse.Namespace) -> None:
  """Measures the operations of each case, and writes results and tables."""
  sides, chosen = check(flags), select(flags.cases)
  if 'torch_eager' not in sides:
    raise UserError(f"--sides is {flags.sides!r}; operations are compared with 'torch_eager': add it")
  for name in chosen:
    if CASES[name].network != 'unet':
      valid = ', '.join(case for case in CASES if CASES[case].network == 'unet')
      raise UserError(f'--cases names {name!r}, which is no U-Net; valid: {valid}')
  with contextlib.ExitStack() as stack:
    workers = {side: stack.enter_context(pairing.Worker(side, flags.dtype, flags.device)) for side in sides}
    abouts = {side: worker.about for side, worker in workers.items()}
    here = machine.describe(abouts, flags.device)
    suffix = '' if flags.dtype == 'float32' else f'-{flags.dtype}'
    path = flags.results / f'{machine.slug(here["device"])}{suffix}-operations.json'
    for name in chosen:
      count = CASES[name].batch_size('train', flags.device)
      found = workers['jax'].ask({'list': name, 'count': count})['operations']
      rows = listed(found, count)
      for k, row in enumerate(rows):
        print(f'{name} {k + 1}/{len(rows)}: {row["kind"]} {row["phase"]} {row["shape"]}', flush=True)
        command = {'build': 'operations', **{key: row[key] for key in ('kind', 'shape', 'phase')}}
        row['sides'] = pairing.measure(
          workers, command, rounds=flags.rounds, round_seconds=flags.round_seconds
        )
      known = machine.read(path)
      entry = {'images': count, 'software': machine.software(abouts), 'operations': rows}
      measurements = {**(known['measurements'] if known else {}), name: entry}
      results = {'machine': here, 'dtype': flags.dtype, 'measurements': measurements}
      machine.write(path, results, report(results))
  print(path.with_suffix('.md').read_text())


if __name__ == '__main__':
  parser = make_parser(__doc__.splitlines()[0], 'unet_cifar10,unet_small', 0.2)
  parser.set_defaults(sides='torch_eager')
  cli(run, parser)
