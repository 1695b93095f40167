"""Rows of a sweep on the disk: read as they were written, or refused by name."""

import importlib
import pathlib
import sys
import types

import numpy as np
import pytest

from vaediff.errors import UserError
from vaediff.evaluation import against_teacher, networks, report, sets, sweep
from vaediff.evaluation.measures import Figure
from vaediff.experiments import base
from vaediff.run import draw, students
from vaediff.run import trained as opened
from vaediff.storage import files, identity

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

ROW = {
  'N': 16,
  'NFE': 2,
  'seconds per image': 0.25,
  'fd_classifier': Figure(value=1.5, spread=0.25),
  'kd_classifier': Figure(missing='too few'),
}


def test_a_row_is_read_as_it_was_written(tmp_path):
  path = tmp_path / 'a' / 'row.json'
  assert sweep.read_row(path) is None
  sweep.write_row(path, {'step': 3, 'settings': (1, 2)}, ROW, {'network vae': 'ab'})
  assert sweep.read_row(path) == ROW
  stored = files.read_json(path)
  assert stored['made_of'] == {'network vae': 'ab'} and stored['facts'] == {'step': 3, 'settings': [1, 2]}


def test_every_damage_of_a_row_is_named(tmp_path):
  """Whatever bit is flipped and wherever it is cut off: it is refused, or it says the same."""
  path = tmp_path / 'row.json'
  sweep.write_row(path, {'step': 3}, ROW, {'network vae': 'ab'})
  whole = path.read_bytes()
  damages = [whole[:k] for k in range(0, len(whole) - 2, 7)]
  damages += [whole[:k] + bytes([whole[k] ^ 1 << k % 7]) + whole[k + 1 :] for k in range(len(whole) - 1)]
  damages += [b'[]', b'null', b'3', b'{}', b'{"figures": {}}', b'\xff', b'[' * 100_000]
  refused = 0
  for content in damages:
    path.write_bytes(content)
    try:
      assert sweep.read_row(path) == ROW, content
    except files.Damaged as error:
      assert str(path) in str(error) and 'remove it and run the same command again' in str(error)
      refused += 1
  assert refused > 0.8 * len(damages)


def test_a_row_that_cannot_be_read_is_not_called_damaged(tmp_path):
  with pytest.raises(UserError, match='cannot be read: Is a directory. The file was left as it is'):
    sweep.read_row(tmp_path)


class Trained(opened.Trained):
  """A stage whose images are never finite."""

  def __init__(self):
    self.config, self.stage = importlib.import_module('configs.digits').get_config('debug'), 'refiner'
    self.experiment = types.SimpleNamespace(num_function_evaluations=2)


def run_of(max_level, **settings):
  config = importlib.import_module('configs.digits').get_config('debug')
  config.evaluate.sweep.update(settings)
  run = Trained()
  run.config, run.stage, run.workdir = config, 'refiner', pathlib.Path('runs/digits')
  run.experiment = types.SimpleNamespace(
    num_function_evaluations=2,
    can_be_guided=False,
    max_level=max_level,
    columns=lambda: base.Columns(condition='c', sampler='ddim', method='ddim', steps=2, guidance=0.0),
  )
  return run


def test_levels_of_augmentation_are_rows():
  levels = (0.0, 0.2, 0.4)
  run = run_of(0.3, aug_levels=levels, num_steps=(2,))
  found = sweep.grid(run, run.config.evaluate.sweep)
  assert [row['aug_level'] for row in found] == [0.0, 0.2]  # beyond 0.3 it was not trained
  assert [row['aug_level'] for row in sweep.grid(run_of(0.0), run_of(0.0).config.evaluate.sweep)] == [0.0] * 2
  run.config.refiner.sample.aug_level = 0.2
  assert sweep.label(run)['aug level'] == 0.2 and sweep.label(run)['line'] == 'c ddim s=0.2'
  run = run_of(0.3)
  assert 'aug level' not in sweep.label(run) and sweep.label(run)['line'] == 'c ddim'


def test_a_setting_whose_images_are_not_finite_is_a_row_with_a_reason(monkeypatch, tmp_path, capsys):
  def fail(*_):
    raise draw.NotFinite('3 of the 8 images are not finite')

  monkeypatch.setattr(sweep, 'measure', fail)
  known = networks.Networks(features={}, lpips=None, missing={})
  known.features['classifier'] = None
  row = sweep.measure_or_say(Trained(), known, sets.Real(train={}, held_out={}), None)
  reason = Figure(missing='3 of the 8 images are not finite')
  names = ('fd_classifier', 'kd_classifier', 'precision_classifier', 'recall_classifier')
  assert row == {'N': 16, 'NFE': 2, **dict.fromkeys(names, reason)}
  assert '3 of the 8 images are not finite' in capsys.readouterr().out
  sweep.write_row(tmp_path / 'row.json', {}, row, {})
  assert sweep.read_row(tmp_path / 'row.json') == row
  assert report.reasons([row]) == [f'{", ".join(names)}: 3 of the 8 images are not finite']


class Chain(Trained):
  """A stage of a chain of distillations whose networks are known by their ids alone."""

  def __init__(self, config, stage):
    self.config, self.stage, self.workdir, self.mesh = config, stage, pathlib.Path('runs/digits'), None
    columns = base.Columns(condition='c', sampler='ddim', method='ddim', steps=2, guidance=0.0)
    self.experiment = types.SimpleNamespace(
      num_function_evaluations=2, can_be_guided=False, max_level=0.0, reconstructs=stage == 'refiner',
      columns=lambda: columns, makers=(),
    )  # fmt: skip

  def with_settings(self, **changes):
    other = Chain(self.config.copy_and_resolve_references(), self.stage)
    other.settings.update(changes)
    return other

  def images(self, split):
    return types.SimpleNamespace(fingerprint=split)

  made_of = property(
    lambda self: {'the stage': self.stage, 'the settings': identity.digest(self.settings.to_dict())}
  )


@pytest.fixture
def measured(monkeypatch, tmp_path):
  """(stages, fields of the config) -> the stages of the rows that a sweep finds nowhere."""
  missing = []
  known = networks.Networks(features={}, lpips=None, missing={})
  monkeypatch.setattr(sweep.networks, 'open_networks', lambda *arguments: known)
  monkeypatch.setattr(sweep, 'real_images', lambda *arguments: None)
  monkeypatch.setattr(sweep, 'floors_at', lambda *arguments: {})
  monkeypatch.setattr(sweep, 'check_any', lambda *arguments: None)
  monkeypatch.setattr(sweep, 'write', lambda *arguments: None)
  monkeypatch.setattr(sweep, 'measure_or_say', lambda chosen, *_: missing.append(chosen.stage) or {'N': 16})

  def measured(stages, **changes):
    config = students.resolve(importlib.import_module('configs.digits').get_config('distill,debug'))
    config.update_from_flattened_dict({'evaluate.sweep.num_steps': (2,), **changes})
    chain = [Chain(config, stage) for stage in stages]
    monkeypatch.setattr(against_teacher, 'chain', lambda trained: chain)
    missing.clear()
    sweep.sweep(chain[-1], tmp_path)
    return list(missing)

  return measured


def test_a_row_without_the_distances_of_reconstructions_is_none_that_has_them(measured, tmp_path):
  levels = {'evaluate.sweep.aug_levels': (0.0,)}
  assert measured(['refiner']) == ['refiner'] and measured(['refiner']) == []
  (row,) = (tmp_path / 'evaluation' / 'sweep').glob('*.json')
  stored = {'stage', 'made_of', 'images', 'sample', 'evaluate', 'networks', 'resize', 'device'}
  assert set(files.read_json(row)['facts']) == stored  # as before there were levels
  assert measured(['refiner'], **levels) == ['refiner'] and measured(['refiner'], **levels) == []
  assert measured(['distill_2']) == ['distill_2'] and measured(['distill_2'], **levels) == []  # has none


def test_a_row_of_the_best_of_several_counts_all_and_is_none_that_counted_one(monkeypatch):
  config = importlib.import_module('configs.digits').get_config('debug')
  config.evaluate.extractors = ()
  plain, known = Chain(config, 'refiner'), networks.Networks(features={}, lpips=None, missing={})
  ranked = plain.with_settings(rerank={'stage': 'clip', 'workdir': '', 'candidates': 16})
  assert 'cost' not in sweep.facts_of(plain, known) and 'cost' in sweep.facts_of(ranked, known)
  drawn = sets.Drawn(seen={}, first=np.zeros((1, 2, 2, 1), np.uint8), seconds_per_image=0.5)
  monkeypatch.setattr(sweep, 'draw_sets', lambda *_, **__: {'x0': drawn})
  monkeypatch.setattr(sweep, 'class_accuracy', lambda *_: {})
  monkeypatch.setattr(sweep, 'giga_macs', lambda _: 0.0)
  monkeypatch.setattr(Chain, 'draws_alone', True)
  real = sets.Real(train={}, held_out={})
  assert [sweep.measure(one, known, real)['NFE'] for one in (plain, ranked)] == [2, 32]

  def fail(*_):
    raise draw.NotFinite('not finite')

  monkeypatch.setattr(sweep, 'measure', fail)
  assert sweep.measure_or_say(ranked, known, real, None)['NFE'] == 32


def test_a_row_of_a_student_is_of_how_its_teacher_is_sampled(measured):
  stages = ['refiner', 'distill_2']
  weight = {'refiner.sample.guidance_weight': 1.0, 'evaluate.sweep.guidance_weights': (0.0,)}
  assert measured(stages) == stages and measured(stages) == []
  assert measured(stages, **weight) == ['distill_2'] and measured(stages, **weight) == []
  assert measured(stages, **{'refiner.sample.seed': 3}) == stages
  # the teacher draws the same in other batches, though its own row has other seconds
  assert measured(stages, **{'refiner.sample.batch_size': 2}) == ['refiner']
  assert measured(['distill_2']) == ['distill_2']  # compared with nothing
  assert measured(['distill_2'], **weight) == []
