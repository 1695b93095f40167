"""The table that a training ends with."""

from vaediff.modes import train
from vaediff.run import loop

LAST = {'loss': 0.25, 'val/loss': 0.5, 'images_per_second': 3.0, 'waiting/input': 0.0}


def test_the_table_says_how_long_each_stage_compiled_and_how_much_of_all_that_is(capsys):
  summary = {'steps': 10, 'seconds': 8.0, 'images_per_second': 80.0, 'last': LAST}
  summaries = [{'stage': 'vae', 'compiling': 6.25, **summary}, {'stage': 'refiner', **summary}]
  train.print_table(summaries, {'mse/x0': 0.125}, {'x0': 'VAE'}, seconds=20.0, compiling_seconds=7.0)
  _, head, vae, refiner, error, total = capsys.readouterr().out.splitlines()
  assert head.split()[:5] == ['stage', 'steps', 'seconds', 'compiling', 'images/s']
  assert vae.split() == ['vae', '10', '8.0', '6.2', '80', 'loss=0.25', 'loss=0.5']
  assert refiner.split()[:4] == ['refiner', '10', '8.0', '-']  # trained by an earlier version
  assert error.startswith('VAE reconstruction: mean squared error per pixel 0.12500')
  assert total.startswith('20 seconds in all, 7 of them compiling, device: cpu x ')


def test_a_trained_stage_compiled_for_part_of_its_time(trained):
  summary = loop.read_summary(trained('digits').run / 'refiner')
  assert 0 < summary['compiling'] < summary['seconds']
