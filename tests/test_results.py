"""`benchmarks.results`: one table of several evaluated runs."""

import json
import re

import pytest

from benchmarks import results
from vaediff.errors import UserError


def write_run(folder, fd, seconds, ending='samples'):
  (folder / 'evaluation').mkdir(parents=True)
  (folder / 'ddgan').mkdir()
  names = ('fd_classifier', 'precision_classifier', 'recall_classifier', 'seconds per image')
  row = {name: {'value': 0.5} for name in names} | {
    'fd_classifier': {'value': fd, 'spread': 0.25, 'floor': 5.0}
  }
  vae = {'set': 'VAE samples', **row, 'fd_classifier': {'value': 99.0}}
  value = {
    'stage': 'ddgan',
    'step': 10,
    'device': 'cpu x 1',
    'samples': [vae] * (ending != 'samples') + [{'set': f'ddgan {ending}', 'N': 800, 'NFE': 4, **row}],
  }
  (folder / 'evaluation' / 'ddgan.json').write_text(json.dumps(value))
  (folder / 'ddgan' / 'summary.json').write_text(json.dumps({'seconds': seconds}))


def test_rows_are_means_over_runs(tmp_path, capsys):
  write_run(tmp_path / 'a-0', 10.0, 30.0)
  write_run(tmp_path / 'a-1', 14.0, 50.0)
  write_run(tmp_path / 'b-0', 7.0, 20.0, ending='refined samples')
  first, second, real = results.table([f'a={tmp_path}/a-*', f'b={tmp_path}/b-*/evaluation/ddgan.json'])
  assert (first['setting'], first['runs'], first['N'], first['NFE']) == ('a', 2, 800, 4)
  assert first['fd_classifier'].value == 12.0
  assert first['fd_classifier'].spread == pytest.approx(8**0.5)
  assert first['training seconds of this stage'].value == 40.0
  assert first['seconds per 100 images'].value == 50.0
  assert second['fd_classifier'].value == 7.0 and second['fd_classifier'].spread == 0.25
  assert real['fd_classifier'].value == 5.0
  assert results.main([f'a={tmp_path}/a-*']) == 0
  assert '| a ' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], 'no runs named'),
    (['a'], "'a' must be a label and existing runs"),
    (['a=missing-*'], "'a=missing-.' must be a label and existing runs"),
  ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
  assert results.main(arguments) == 2
  assert re.search(message, capsys.readouterr().err)


def test_a_run_without_figures_is_named(tmp_path):
  (tmp_path / 'run').mkdir()
  with pytest.raises(UserError, match='run --mode=evaluate --workdir='):
    results.table([f'a={tmp_path}/run'])


def test_a_run_that_did_not_end_is_named(tmp_path):
  write_run(tmp_path / 'run', 1.0, 1.0)
  (tmp_path / 'run' / 'ddgan' / 'summary.json').unlink()
  with pytest.raises(UserError, match='summary.json is missing, so its training did not end'):
    results.table([f'a={tmp_path}/run'])


def test_figures_of_other_networks_do_not_stand_in(tmp_path):
  write_run(tmp_path / 'run', None, 1.0)
  with pytest.raises(UserError, match=r'no fd_classifier there; evaluate it with .*extractors'):
    results.table([f'a={tmp_path}/run'])
