"""The principal directions of the code that a stage's samples start from: of which VAE, and how many."""

import pathlib
import sys

import numpy as np
import pytest

from vaediff.conditions import pca
from vaediff.errors import UserError
from vaediff.run import directions, measurements
from vaediff.run.opened import Opened

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'modes'))
import fresh  # noqa: E402


@pytest.mark.parametrize(
  ('variant', 'stage', 'workdir'), [('pca', '', ''), ('', 'vae', ''), ('formulation2', '', '/elsewhere')]
)
@pytest.mark.slow
def test_they_are_those_of_the_vae(variant, stage, workdir, tmp_path, one_device, monkeypatch):
  changes = {'refiner.vae.workdir': workdir} if workdir else {}
  trained, asked = fresh.Fresh(variant, tmp_path, stage, **changes), []
  trained.opened = Opened(trained.stage, tmp_path / 'checkpoints')

  def load(source, config, workdir, mesh, checkpoints):
    asked.append((source, checkpoints))
    return source.neutral()

  monkeypatch.setattr(measurements, 'load', load)
  for number, wanted in ((3, 3), (500, 16)):
    found = directions.leading(trained, number)
    assert directions.number_of(found) == wanted and found['directions'].shape == (16, wanted)
  assert directions.leading(trained, 0) == {} and directions.number_of({}) == 0
  source, checkpoints = asked[0]
  assert (source.stage, source.workdir, source.measurement) == ('vae', workdir, 'pca')
  assert source.settings == {'num_directions': 3, 'min_signal': 0.0, 'floor': 0.01}
  # of the VAE itself it is the checkpoint that is opened, such as its best
  assert checkpoints == (trained.opened if stage else None)


def test_a_collapsed_vae_has_none_and_that_is_said(tmp_path, one_device, monkeypatch):
  trained, lines = fresh.Fresh('formulation1', tmp_path), fresh.said(monkeypatch, directions)

  def load(*_):
    nothing = pca.spectrum_of([(np.ones((9, 16)), np.zeros((9, 16)))], 'vae')
    return pca.arrays_of(nothing, {'num_directions': 3, 'min_signal': 0.0, 'floor': 0.01}, 'vae')

  monkeypatch.setattr(measurements, 'load', load)
  assert directions.leading(trained, 3) == {}
  assert lines[0].startswith("no principal directions: the code of stage 'vae' says nothing of the image")


def test_without_a_code_there_are_none(tmp_path, one_device):
  trained = fresh.Fresh('unconditional', tmp_path)
  with pytest.raises(UserError, match="stage 'refiner' starts from no code of a VAE"):
    directions.leading(trained, 3)
