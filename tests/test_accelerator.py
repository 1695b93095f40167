"""benchmarks/accelerator.sh: it runs, and every part of it leaves its file."""

import gzip
import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import costs
from vaediff.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


def event(name, us, pid=1, **more):
  return {'ph': 'X', 'pid': pid, 'name': name, 'dur': us, 'args': {'hlo_op': name, **more}}


def test_costs_are_summed_by_kind_on_the_devices():
  names = {1: '/device:GPU:0', 2: '/host:CPU'}
  events = [event('fusion.12', 2000), event('fusion.7', 1000), event('convolution.1', 4000)]
  host = [event('fusion.3', 50_000, pid=2), {'ph': 'X', 'pid': 1, 'name': 'memcpy', 'dur': 9, 'args': {}}]
  assert costs.costs(events + host, names) == {'convolution': 4000, 'fusion': 3000}
  assert costs.costs(host, {2: '/host:CPU'}) == {'fusion': 50_000}  # no device: what there is


def test_the_table_has_the_dearest_first():
  lines = costs.table(costs.costs([event('a.1', 1000), event('b', 3000)], {1: '/device:TPU:0'}), 1)
  assert lines.split() == ['3.000', 'ms', '75.0%', 'b', '4.000', 'ms', 'in', 'all']


def test_the_newest_trace_is_read(tmp_path, capsys):
  with pytest.raises(UserError, match='profile_steps'):
    costs.newest(tmp_path)
  for number, name in enumerate(('old', 'new')):
    path = tmp_path / name / 'host.trace.json.gz'
    path.parent.mkdir()
    with gzip.open(path, 'wt') as file:
      json.dump({'traceEvents': [event(name, 1000)]}, file)
    os.utime(path, (number, number))
  assert costs.newest(tmp_path).parent.name == 'new'


def test_the_script_says_what_it_needs():
  done = subprocess.run(['benchmarks/accelerator.sh'], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode and 'the folder for results' in done.stderr


def test_a_part_that_it_does_not_have_is_named(tmp_path):
  command = ['benchmarks/accelerator.sh', str(tmp_path / 'out')]
  environment = {**os.environ, 'PARTS': 'benchmark emojis'}
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 2 and "PARTS names 'emojis'" in done.stderr and not (tmp_path / 'out').exists()


@pytest.mark.long
def test_tiny_networks_on_this_machine(tmp_path):
  """Minutes: every part, with the debug configs."""
  changes = {'SIZE': 'debug', 'EMOJI_SECONDS': '90', 'PYTHON': sys.executable}
  changes |= {'COMPILE_SECONDS': '2000', 'SECONDS_IN_ALL': '5000'}
  command = ['benchmarks/accelerator.sh', str(tmp_path / 'out')]
  subprocess.run(command, cwd=ROOT, env={**os.environ, **changes}, check=True)
  told = (tmp_path / 'out' / 'machine.txt').read_text()
  assert 'exit status 0' in told and 'left out' not in told
  assert not [line for line in told.splitlines() if 'exit status' in line and 'status 0' not in line]
  lines = (tmp_path / 'out' / 'benchmark.jsonl').read_text().splitlines()
  assert len(lines) == 4 and all(json.loads(line)['stages'] for line in lines)
  for name in ('costs.txt', 'emoji.png', 'emoji.json', 'log.txt'):
    assert (tmp_path / 'out' / name).stat().st_size
