"""The table that a training ends with."""

import jax
import pytest
from ml_collections import ConfigDict

from vaediff.modes import train
from vaediff.run import checkpoint, loop

LAST = {'loss': 0.25, 'val/loss': 0.5, 'images_per_second': 3.0, 'waiting/input': 0.0}


def test_the_table_says_how_long_each_stage_compiled_and_how_much_of_all_that_is(capsys):
  summary = {'steps': 10, 'seconds': 8.0, 'images_per_second': 80.0, 'last': LAST}
  summaries = [{'stage': 'vae', 'compiling_seconds': 6.25, **summary}, {'stage': 'refiner', **summary}]
  train.print_table(summaries, {'mse/x0': 0.125}, {'x0': 'VAE'}, seconds=20.0, compiling_seconds=7.0)
  _, head, vae, refiner, error, total = capsys.readouterr().out.splitlines()
  assert head.split()[:5] == ['stage', 'steps', 'seconds', 'compiling', 'images/s']
  assert vae.split() == ['vae', '10', '8.0', '6.2', '80', 'loss=0.25', 'loss=0.5']
  assert refiner.split()[:4] == ['refiner', '10', '8.0', '-']  # imported, or trained by an earlier version
  assert error.startswith('VAE reconstruction: mean squared error per pixel 0.12500')
  assert total.startswith('20 seconds in all, 7 of them compiling, device: cpu x ')


def test_a_trained_stage_compiled_for_part_of_its_time(trained):
  summary = loop.read_summary(trained('digits').run / 'refiner')
  assert 0 < summary['compiling_seconds'] < summary['seconds']


def test_a_try_that_met_a_damaged_checkpoint_counts_in_both(monkeypatch, tmp_path, capsys):
  tries, damaged = [], tmp_path / 'run' / 'vae' / 'checkpoints' / '4'
  damaged.mkdir(parents=True)

  def once(config, workdir, stages):
    tries.append(stages)
    jax.jit(lambda x: x * (2.5 + len(tries)))(1.5)
    if len(tries) == 1:
      raise checkpoint.damaged(damaged, ValueError('cut off'))
    return [{'stage': 'vae', 'steps': 1, 'seconds': 1.0, 'images_per_second': 1.0, 'last': {}}], {}, {}

  shown = {}
  monkeypatch.setattr(train, 'run_stages_once', once)
  monkeypatch.setattr(train, 'print_table', lambda *_, **times: shown.update(times))
  train.run_stages(ConfigDict(), tmp_path / 'run', ('vae',))
  assert len(tries) == 2 and 0 < shown['compiling_seconds'] < shown['seconds']


@pytest.mark.parametrize(('before', 'after'), [(2.0, 5.0), (None, None)])
def test_what_was_not_counted_is_not_given_as_all(before, after):
  assert loop.Spent(10.0, before, 5).plus(20.0, 3.0) == loop.Spent(30.0, after, 5)
