"""Interpolation: rows that say what they show, and how much z and x_T change an image."""

import json
import pathlib
import sys

import numpy as np
import pytest
from PIL import Image

from vaediff.conditions import pca
from vaediff.modes import interpolate
from vaediff.run import directions, images

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import fresh  # noqa: E402


@pytest.mark.slow
@pytest.mark.parametrize(
  ('variant', 'stage', 'moved'),
  [('formulation1', '', ('code', 'x_T')), ('unconditional', '', ('x_T',)), ('', 'vae', ('code',))],
)
def test_what_changes_is_measured_for_what_a_stage_has(
  variant, stage, moved, tmp_path, one_device, monkeypatch
):
  trained = fresh.Fresh(variant, tmp_path, stage, **{'interpolate.num_pairs': 6})
  lines = fresh.said(monkeypatch, interpolate)
  rows = interpolate.changes(trained)
  assert [(row['change of'], row['by']) for row in rows] == [
    (name, by) for name in moved for by in ('the whole way', 'one step of 2')
  ]
  for row in rows:
    assert row['rms all'] > 0 and row['rms all'] < row['rms low frequencies'] + row['rms high frequencies']
    assert 0 <= row['low share'] <= 1
  for whole, step in zip(rows[::2], rows[1::2], strict=True):
    assert whole['rms all'] > step['rms all']
  name = 'interpolation.json' if trained.stage == 'refiner' else f'interpolation-{trained.stage}.json'
  stored = json.loads((tmp_path / name).read_text())
  assert stored['cutoff_cycles_per_pixel'] == 0.125 and stored['num_pairs'] == 6
  assert '0.125 cycles per pixel' in lines[0]


def test_nothing_else_is_changed(tmp_path, one_device, monkeypatch):
  """The label of the first of a pair stays, and its noise where z moves."""
  trained, given = fresh.Fresh('formulation1,label', tmp_path, **{'interpolate.num_pairs': 3}), []
  fresh.said(monkeypatch, interpolate)
  monkeypatch.setattr(
    trained, 'draw_all', lambda g: given.append(g) or {'x0': np.zeros((3, 8, 8, 1), np.uint8)}
  )
  interpolate.changes(trained)
  base, whole_z, step_z, whole_x, step_x = given
  other = trained.draw_inputs(np.array([1, 3, 5]), 0)
  assert base['label'].tolist() == [0, 2, 4] == whole_z['label'].tolist() == step_x['label'].tolist()
  np.testing.assert_array_equal(whole_z['z'], other['z'])
  np.testing.assert_array_equal(whole_z['noise'], base['noise'])
  np.testing.assert_array_equal(step_z['z'], (base['z'] + other['z']) / 2)
  np.testing.assert_allclose(whole_x['noise'], other['noise'], atol=1e-5)
  np.testing.assert_array_equal(whole_x['z'], base['z'])
  assert step_x['noise'].std() == pytest.approx(1.0, abs=0.15)  # slerp: noise stays noise


def two_directions(latent_dim):
  """Of a code around 0.5: its last two numbers, of deviations 1 and 2."""
  found = pca.neutral(latent_dim, 2)
  found['directions'] = np.eye(latent_dim, dtype=np.float32)[:, -2:]
  return found | {'mean': np.full(latent_dim, 0.5, np.float32), 'deviation': np.float32([1, 2])}


@pytest.mark.slow
def test_a_row_walks_along_a_direction_and_changes_nothing_else(tmp_path, one_device, monkeypatch):
  changes = {'interpolate.num_points': 5, 'interpolate.deviations': 2.0}
  trained = fresh.Fresh('formulation1,label', tmp_path, **changes)
  weights = np.linspace(0, 1, 5, dtype=np.float32)
  rows = interpolate.rows_of(trained, 1, weights, two_directions(16))
  drawn = trained.draw_inputs(np.array([2]), 0)
  walk, second = rows['direction 0'], rows['direction 1']
  np.testing.assert_allclose(walk.given['z'][:, -2], 0.5 + np.float32([-2, -1, 0, 1, 2]), atol=1e-5)
  np.testing.assert_allclose(second.given['z'][:, -1], 0.5 + np.float32([-4, -2, 0, 2, 4]), atol=1e-5)
  for row, moved in ((walk, 14), (second, 15)):
    stays = np.delete(np.arange(16), moved)
    np.testing.assert_allclose(row.given['z'][:, stays], np.tile(drawn['z'][:, stays], (5, 1)), atol=1e-5)
    assert row.given['label'].tolist() == [2] * 5
  assert walk.what == 'z drawn, no. 2, one x_T:\nprincipal direction 1'
  assert (second.left, second.right) == ('-2 deviations', '+2 deviations')
  assert 'direction 0' not in interpolate.rows_of(trained, 1, weights, {})


def test_rows_and_ends_are_labelled_in_the_picture(tmp_path, one_device, monkeypatch):
  trained, texts = fresh.Fresh('formulation1', tmp_path), []
  fresh.said(monkeypatch, interpolate)
  beside = images.beside_rows

  def spy(picture, left, right):
    texts.extend(zip(left, right, strict=True))
    result = beside(picture, left, right)
    assert result.shape[1] > picture.shape[1] + 100
    return result

  monkeypatch.setattr(images, 'beside_rows', spy)
  asked = []
  found = lambda trained, number: asked.append(number) or two_directions(16)
  monkeypatch.setattr(directions, 'leading', found)
  interpolate.interpolate(trained)
  assert [left.splitlines()[0] for left, _ in texts[::2]] == [
    'z moves (lerp), one x_T', 'x_T moves (slerp), one z', 'z moves (lerp), one x_T',
    'z + class direction, one x_T', 'z drawn, no. 0, one x_T:', 'z drawn, no. 0, one x_T:',
  ]  # fmt: skip
  assert texts[0] == ('z moves (lerp), one x_T\nVAE, from:\nz drawn, no. 0', 'to:\nz drawn, no. 1')
  assert texts[5] == ('z moves (lerp), one x_T\nrefined, from:\nz of eval image 0', 'to:\nz of eval image 1')
  assert asked == [1] and texts[-1] == (
    'z drawn, no. 0, one x_T:\nprincipal direction 2\nrefined, from:\n-3 deviations', 'to:\n+3 deviations'
  )
  assert texts[7][1] == 'to:\n+ class 1\n- class 0'
  with Image.open(tmp_path / 'interpolation.png') as picture:
    assert picture.size[1] == 12 * 66 + 2 and picture.size[0] > 3 * 66 + 2 + 100
