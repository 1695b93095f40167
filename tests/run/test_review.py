"""With which settings of samples a run goes on whose best checkpoint is kept."""

import functools
import importlib
import json
import sys
import types
from pathlib import Path

import jax
import pytest

from vaediff.errors import UserError
from vaediff.run import best, checkpoint, log, review
from vaediff.storage import identity

sys.path.insert(0, str(Path(__file__).parents[2]))


@pytest.fixture
def begin(tmp_path, monkeypatch):
  """(measure, step, settings of samples) -> the config of a refiner, and what reviews it from a step on."""
  monkeypatch.setattr(review, 'Evaluator', lambda *arguments: None)
  keepers = []

  def begin(measure, step, **sample):
    config = importlib.import_module('configs.digits').get_config('debug')
    config.refiner.train.best_measure = measure
    config.refiner.sample.update(sample)
    stage = types.SimpleNamespace(
      config=config, name='refiner', folder=tmp_path / measure, measured_with={'the network': 'ab'}
    )
    board = object.__new__(log.StageLog)
    keeper = review.Reviewer(stage, jax.random.key(0), board, step, {})._keeper
    keepers.append(keeper)
    return config, keeper

  yield begin
  for keeper in keepers:
    keeper.close()


def keep(config, keeper):
  keeper.consider(1, {'a': jax.numpy.zeros(2)}, {'config': json.loads(config.to_json())}, 0.5)
  keeper.close()


def keep_as_earlier(config, folder, measure):
  """As versions did that counted the batch size, and samples also where none are drawn."""
  without = ('checkpoint', 'num_images', 'guide', 'classifier', 'rerank', 'save_images', 'save_npz')
  settings = {name: value for name, value in config.refiner.sample.to_dict().items() if name not in without}
  settings = {name: value for name, value in settings.items() if value != ()} | {'labels': (), 'guidance': ()}
  made_of = {'the network': 'ab', 'the settings of its samples': identity.digest(settings)}
  keep(config, best.Best(folder, measure, made_of, 0))


@pytest.mark.parametrize('earlier', [False, True])
def test_the_best_by_a_validation_metric_is_of_no_samples(begin, tmp_path, earlier):
  config, keeper = begin('val/loss', 0)
  if earlier:
    keep_as_earlier(config, tmp_path / 'val/loss', 'val/loss')
  else:
    keep(config, keeper)
  assert begin('val/loss', 1, num_steps=9, guidance_weight=1.0, batch_size=2)[1].value == 0.5


@pytest.mark.parametrize('measure', ['fd_classifier', 'val/edge_f1'])
@pytest.mark.parametrize('earlier', [False, True])
def test_the_best_by_a_figure_of_samples_is_of_their_settings(begin, tmp_path, measure, earlier):
  """But not of how many are drawn at once. The last is of samples that a control's validation draws."""
  config, keeper = begin(measure, 0)
  if earlier:
    keep_as_earlier(config, tmp_path / measure, measure)
  else:
    keep(config, keeper)
  assert begin(measure, 1)[1].value == begin(measure, 1, batch_size=2)[1].value == 0.5
  with pytest.raises(identity.Stale, match='was made of the settings of its samples'):
    begin(measure, 1, guidance_weight=1.0)


class Board(log.StageLog):
  """Nothing of an earlier run is logged; what comes is thrown away."""

  logged = {}

  def __init__(self):
    pass

  def scalars(self, step, values):
    pass


class Counted:
  """The evaluation split by steps: the loss is the step. Counts how often it is evaluated."""

  def __init__(self, calls, stage, key):
    self._calls = calls

  figure = review.Evaluator.figure

  def __call__(self, state):
    self._calls.append(int(state.step))
    return {'loss': float(state.step)}

  def warnings(self, metrics):
    return ()


@pytest.mark.parametrize(
  ('eval_every', 'best_every', 'evaluated', 'compared'),
  [(2, 2, [2, 4], [2, 4]), (4, 2, [2, 4], [2, 4]), (2, 4, [2, 4], [4])],
)
def test_a_step_is_evaluated_once_where_the_best_is_kept_by_a_validation_metric(
  tmp_path, monkeypatch, eval_every, best_every, evaluated, compared
):
  calls, kept = [], []
  monkeypatch.setattr(review, 'Evaluator', functools.partial(Counted, calls))
  keeper = types.SimpleNamespace(measure='val/loss')
  keeper.consider = lambda step, state, meta, value: kept.append((step, value))
  monkeypatch.setattr(best, 'Best', lambda *arguments, **named: keeper)
  config = importlib.import_module('configs.digits').get_config('debug')
  config.refiner.train.update(
    {'best_measure': 'val/loss', 'eval_every_steps': eval_every, 'best_every_steps': best_every}
  )
  config.refiner.train.update({'grid_every_steps': 0, 'num_steps': 4})
  stage = types.SimpleNamespace(config=config, name='refiner', folder=tmp_path, measured_with={})
  last = {}
  reviewer = review.Reviewer(stage, jax.random.key(0), Board(), 0, last)
  for step in range(1, 5):
    reviewer(step, types.SimpleNamespace(step=step), lambda step: {})
  assert calls == evaluated and kept == [(step, float(step)) for step in compared]
  assert last == {'val/loss': 4.0}


def test_a_best_checkpoint_that_cannot_be_saved_is_said_also_where_the_run_is_stopped(
  begin, monkeypatch, capsys
):
  _, keeper = begin('val/loss', 0)
  reviewer = object.__new__(review.Reviewer)
  reviewer._keeper = keeper

  def fails(self):
    raise UserError('step 3 was not saved: no space is left')

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.Checkpointer, 'wait', fails)
    reviewer.wait()
  assert 'step 3 was not saved: no space is left' in capsys.readouterr().out
