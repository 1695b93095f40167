"""Every way out of training saves first, waits for the save under way, and says what is kept."""

import importlib
import itertools
import json
import os
import pathlib
import signal
import sys

import jax
import pytest
from some_slow import some_slow

from configs import presets
from vaediff.errors import UserError
from vaediff.machine import distributed
from vaediff.modes import train
from vaediff.run import checkpoint, draw, loop, review
from vaediff.run import config as configs

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))


def digits(tmp_path, **changes):
  config = importlib.import_module('configs.digits').get_config('debug')
  config.data.data_dir = str(tmp_path / 'data')
  config.vae.model.update(presets.vae('8x1,8d8,8t1,1x1', '1x1,1u8,1t8,8x1', '8:8,1:16', 16))
  config.update_from_flattened_dict({'vae.train.save_every_steps': 1, 'vae.prior.kind': 'normal', **changes})
  return config


def lines(workdir):
  text = (workdir / 'vae' / 'metrics.jsonl').read_text()
  timed = ('images_per_second', 'waiting')
  return [
    {name: x for name, x in json.loads(line).items() if not name.startswith(timed)}
    for line in text.splitlines()
  ]


@pytest.fixture
def no_pictures(monkeypatch, one_device):
  monkeypatch.setattr(train, 'first_images', lambda *arguments: {})  # tested elsewhere


@pytest.mark.slow
def test_what_fails_in_an_evaluation_is_saved_before_and_done_after_a_resume(
  tmp_path, no_pictures, monkeypatch, capsys
):
  config = digits(tmp_path, **{'vae.train.best_measure': 'val/loss', 'vae.train.best_every_steps': 2})
  train.run_stages(config, tmp_path / 'undisturbed', ('vae',))
  whole, figures = review.Evaluator.__call__, []

  def fails_once(self, state):
    figures.append(int(state.step))
    if figures == [2]:
      raise RuntimeError('something broke')
    return whole(self, state)

  monkeypatch.setattr(review.Evaluator, '__call__', fails_once)
  with pytest.raises(RuntimeError, match='something broke'):
    train.run_stages(config, tmp_path / 'run', ('vae',))
  assert 'stage vae: step 2 is kept' in capsys.readouterr().out
  assert checkpoint.latest_step(tmp_path / 'run' / 'vae') == 2
  train.run_stages(config, tmp_path / 'run', ('vae',))
  assert figures[1] == 2  # what was due at the step to go on from comes first
  assert lines(tmp_path / 'run') == lines(tmp_path / 'undisturbed')
  best = [checkpoint.load_meta(tmp_path / name / 'vae' / 'best')['value'] for name in ('run', 'undisturbed')]
  assert best[0] == best[1]
  ids = [checkpoint.identity_of(tmp_path / name / 'vae') for name in ('run', 'undisturbed')]
  assert ids[0] == ids[1]


def test_an_evaluation_that_was_done_is_not_done_again(tmp_path, no_pictures, monkeypatch):
  """The run ended after it: its figures are read from the log, the summary is that of a run never stopped."""
  config = digits(tmp_path)
  (first,) = train.run_stages(config, tmp_path / 'run', ('vae',))
  (tmp_path / 'run' / 'vae' / loop.SUMMARY).unlink()
  before = lines(tmp_path / 'run')
  monkeypatch.setattr(review.Evaluator, '__call__', lambda *arguments: pytest.fail('evaluated again'))
  (again,) = train.run_stages(config, tmp_path / 'run', ('vae',))
  assert again['last'] == first['last'] and lines(tmp_path / 'run') == before


@pytest.mark.slow
def test_a_bad_step_names_the_step_that_is_kept(tmp_path, no_pictures):
  config = digits(
    tmp_path, **{'vae.optim.learning_rate': 1e30, 'vae.optim.clip_norm': 0.0, 'vae.train.num_steps': 30}
  )
  with pytest.raises(
    UserError, match=r'stage vae, step \d+: .* not finite. It was not saved; (step \d+ is kept|no step)'
  ):
    train.run_stages(config, tmp_path / 'run', ('vae',))


@pytest.mark.parametrize(
  ('status', 'word'),
  some_slow([(distributed.PREEMPTED, 'SIGTERM'), (distributed.STOPPED, 'SIGINT')], distributed.STOPPED),
)
def test_a_signal_saves_the_step_it_meets(tmp_path, no_pictures, monkeypatch, status, word):
  config, reached = digits(tmp_path, **{'vae.train.save_every_steps': 100}), distributed.Preemption.reached
  asked = itertools.count(1)

  def at_three(self):
    if next(asked) == 3:
      os.kill(os.getpid(), getattr(signal, word))
    return reached(self)

  monkeypatch.setattr(distributed.Preemption, 'reached', at_three)
  with pytest.raises(distributed.Preempted, match='saved at step 3 of 4') as caught:
    train.run_stages(config, tmp_path / 'run', ('vae',))
  assert caught.value.status == status and checkpoint.latest_step(tmp_path / 'run' / 'vae') == 3


@pytest.mark.slow
def test_a_summary_that_is_damaged_or_of_another_is_made_anew(tmp_path, no_pictures, capsys):
  config, run = digits(tmp_path), tmp_path / 'run'
  (first,) = train.run_stages(config, run, ('vae',))
  path = run / 'vae' / loop.SUMMARY
  whole = json.loads(path.read_text())
  for content in ('{"steps"', '[]', json.dumps({**whole, 'seconds': 1e9}), json.dumps({'steps': 4})):
    path.write_text(content)
    (again,) = train.run_stages(config, run, ('vae',))
    assert again['last'] == first['last'] and json.loads(path.read_text())['id'] == whole['id']
  assert 'is damaged' in capsys.readouterr().out


@pytest.mark.slow
def test_images_that_are_not_finite_stop_no_training(tmp_path, no_pictures, monkeypatch, capsys):
  def refuse(*arguments, **named):
    raise draw.NotFinite('2 of 4 images are not finite')

  monkeypatch.setattr(review.Evaluator, 'grids', refuse)
  train.run_stages(digits(tmp_path), tmp_path / 'run', ('vae',))
  assert 'no sample grid of step 4: 2 of 4 images' in capsys.readouterr().out


def test_every_sign_of_life_counts():
  watchdog = distributed.Watchdog(1000.0, 'a stage', lambda: 'step 7 is kept')
  try:
    watchdog._silence = 999.0
    distributed.beat('a batch of images')
    assert watchdog._silence == 0 and watchdog._last == 'a batch of images'
    assert watchdog._kept() == ': step 7 is kept'
  finally:
    watchdog.close()
  watchdog._silence = 999.0
  distributed.beat('of another')
  assert watchdog._silence == 999.0 and distributed.WATCHING == []


@pytest.mark.slow
def test_an_edited_config_json_is_not_what_was_trained(tmp_path, no_pictures):
  run = tmp_path / 'run'
  train.run_stages(digits(tmp_path), run, ('vae',))
  path = run / configs.FILE
  stored = json.loads(path.read_text())
  stored['vae']['loss']['beta'] = 50.0
  path.write_text(json.dumps(stored))
  with pytest.raises(
    UserError, match='config.vae.loss.beta is .* there, 50.0 now.* remove it: it is a copy'
  ):
    train.run_stages(configs.read(run), run, ('vae',))
  path.unlink()
  assert configs.read(run).vae.loss.beta == digits(tmp_path).vae.loss.beta
  assert jax.process_count() == 1
