"""Names, floors and spreads; statistics of real images on disk."""

import dataclasses
import importlib
import pathlib
import sys

import numpy as np
import pytest

from vaediff.errors import UserError
from vaediff.evaluation import frechet, measures, networks, precision_recall, references, report, sets
from vaediff.evaluation.frechet import Moments
from vaediff.evaluation.measures import Figure
from vaediff.evaluation.references import Reference
from vaediff.run import best

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent.parent))


def settings(**changes):
  config = importlib.import_module('configs.digits').get_config('debug')
  config.evaluate.update(changes)
  return config.evaluate


def normal(seed, count, dimensions=6):
  return np.random.default_rng(seed).standard_normal((count, dimensions))


def make_reference(features, kept=None):
  return Reference(
    moments=Moments.of(features), features=features[:kept], split='train', provenance={'n': len(features)}
  )


def test_only_inception_gives_the_published_names():
  assert measures.names_of('inception')[:3] == ('fid', 'kid', 'is')
  assert measures.names_of('mobilenetv2')[:2] == ('fd_mobilenetv2', 'kd_mobilenetv2')
  names = [name for network in measures.NAMES for name in measures.names_of(network)]
  assert len(set(names)) == len(names)
  assert measures.network_of('fid') == 'inception'
  assert measures.network_of('recall_vgg16') == 'vgg16'
  with pytest.raises(UserError, match="train.best_measure is 'FID'; valid: val/"):
    measures.network_of('FID')


def test_every_figure_has_a_direction():
  """Of what is in no table the worst was kept as the best: 'val/diversity_ratio', most collapsed."""
  names = [name for network in measures.NAMES for name in measures.names_of(network)]
  names += [f'r{name}' for network in measures.NAMES for name in measures.distance_names(network)]
  names += ['mse', 'psnr', 'ssim', 'nearest_training_rmse', 'bits_per_dimension', 'elbo', 'active_units']
  names += [*networks.LPIPS, *(f'diversity_{name}' for name in networks.LPIPS)]
  names += ['rmse to teacher', 'diversity ratio']
  assert {best.higher_is_better(name) for name in names} == {True, False}
  for name in ('fidelity', 'FID', 'val/fid', 'loss', 'val/', '', 'foo_vgg16', 'val/diversity ratio'):
    with pytest.raises(UserError, match=f"train.best_measure is '{name}', of which it is not known whether"):
      best.higher_is_better(name)


def test_what_is_better():
  for name in ('fid', 'fd_vgg16', 'kd_classifier', 'val/loss', 'mse'):
    assert not best.higher_is_better(name)
  for name in ('precision_vgg16', 'recall_inception', 'coverage_classifier', 'is', 'psnr', 'val/accuracy'):
    assert best.higher_is_better(name)
  for name in ('val/diversity', 'val/diversity_ratio', 'diversity_lpips_vgg16'):
    assert best.higher_is_better(name)
  for name in ('val/loss/kl', 'val/mse_to_teacher', 'val/lpips_vgg16', 'rfd_classifier', 'lpips_alexnet'):
    assert not best.higher_is_better(name)


@pytest.mark.parametrize('kept', [None, 50])
def test_the_distance_uses_all_real_images_even_where_few_features_are_kept(kept):
  real, fake = normal(0, 200), normal(1, 80) + 0.5
  got = measures.distances('classifier', fake, make_reference(real, kept), settings(), {})['fd_classifier']
  assert got == pytest.approx(frechet.frechet_distance(Moments.of(fake), Moments.of(real)), rel=1e-9)


def test_figures_of_a_set():
  real = normal(0, 100)
  seen = {'features': normal(1, 60), 'logits': np.tile(1e4 * np.eye(3), (20, 1))}
  values = measures.of_features('inception', seen, make_reference(real), settings(), {})
  assert tuple(sorted(values)) == tuple(sorted(measures.names_of('inception')))
  assert values['is'] == pytest.approx(3, rel=0.05)
  few = {'features': normal(1, 3)}
  absent = measures.missing('classifier', few['features'], real, settings())
  found = measures.of_features('classifier', few, make_reference(real), settings(), absent)
  assert 'precision_classifier' not in found and 'fd_classifier' in found


def test_the_floor_is_taken_from_held_out_images_where_there_are_enough():
  real, held_out = normal(0, 300), normal(1, 100)
  values, n = measures.floor('classifier', 80, held_out, make_reference(real), settings())
  assert n == 80
  expected = frechet.frechet_distance(Moments.of(held_out[:80]), Moments.of(real))
  assert values['fd_classifier'] == pytest.approx(expected, rel=1e-9)


def test_else_both_splits_are_pooled_and_at_most_halved():
  real, held_out = normal(0, 60), normal(1, 20)
  values, n = measures.floor('classifier', 30, held_out, make_reference(real), settings())
  assert n == 30 and values['fd_classifier'] > 0
  _, n = measures.floor('classifier', 500, held_out, make_reference(real), settings())
  assert n == 40


def test_mean_with_error():
  figure = measures.mean_with_error(np.array([1.0, 3.0]))
  assert (figure.value, figure.n) == (2.0, 2) and figure.spread == pytest.approx(1.0)
  wanted = 'it is not finite for 1 of 2 evaluation images'
  assert measures.mean_with_error(np.array([1.0, np.nan])) == Figure(missing=wanted)
  assert measures.mean_with_error(np.array([1.0])) == Figure(value=1.0, n=1)


def test_radii_of_a_reference_are_computed_once(monkeypatch):
  """For each number of vectors and of neighbours; a reference of other vectors has others."""
  computed, whole = [], precision_recall.radii_squared
  monkeypatch.setattr(
    precision_recall, 'radii_squared', lambda x, k: computed.append((len(x), k)) or whole(x, k)
  )
  real = make_reference(normal(0, 100))
  for most, k in ((60, 3), (60, 3), (60, 5), (40, 3), (60, 3)):
    np.testing.assert_array_equal(real.radii_squared(most, k), whole(real.features[:most], k))
  assert computed == [(60, 3), (60, 5), (40, 3)]
  other = dataclasses.replace(real, features=real.features + real.features[0])
  np.testing.assert_array_equal(other.radii_squared(60, 3), whole(other.features[:60], 3))
  near = precision_recall.precision_recall(real.features[:60], normal(1, 50), 3)
  assert precision_recall.precision_recall(
    real.features[:60], normal(1, 50), 3, real.radii_squared(60, 3)
  ) == near


def test_what_is_missing_is_looked_for_once_per_set(monkeypatch):
  seen, whole = [], measures.missing
  monkeypatch.setattr(measures, 'missing', lambda *of: seen.append(len(of[1])) or whole(*of))
  sampled = [{'features': normal(k, 20 + k)} for k in range(2)]
  sets.network_figures('classifier', sampled, make_reference(normal(9, 60)), settings())
  assert seen == [20, 21]
  seen.clear()
  sets.distance_figures('classifier', [normal(0, 30)], make_reference(normal(9, 60)), settings())
  assert seen == [30]


def test_over_seeds():
  figures = measures.over_seeds([{'a': 1.0}, {'a': 2.0}, {'a': 6.0}])
  assert figures['a'].value == 3 and figures['a'].spread == pytest.approx(np.std([1, 2, 6], ddof=1))
  assert measures.over_seeds([{'a': 1.0}])['a'] == Figure(value=1.0)


# Statistics on disk -------------------------------------------------------------------------------

PROVENANCE = {'extractor': 'vgg16', 'weights_sha256': 'ab', 'resize': 'none', 'n': 50, 'version': 1}


def test_statistics_have_the_layout_of_pytorch_fid(tmp_path):
  x = normal(0, 50).astype(np.float32)
  path = tmp_path / 'a' / 'stats.npz'
  references.write(path, Moments.of(x), x[:20], PROVENANCE)
  with np.load(path) as file:
    np.testing.assert_allclose(file['mu'], x.mean(axis=0, dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(file['sigma'], np.cov(x.astype(np.float64).T), rtol=1e-9)
    assert file['mu'].dtype == file['sigma'].dtype == np.float64
  stored = references.read(path, 'train', PROVENANCE)
  np.testing.assert_array_equal(stored.features, x[:20])
  assert stored.moments.count == 50
  assert frechet.frechet_distance(stored.moments, Moments.of(x)) < 1e-6
  assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(('field', 'value'), [('resize', 'tf1'), ('weights_sha256', 'cd'), ('n', 51)])
def test_statistics_of_another_kind_are_never_mixed(tmp_path, field, value):
  path = tmp_path / 'stats.npz'
  references.write(path, Moments.of(normal(0, 50)), normal(0, 50), PROVENANCE)
  with pytest.raises(UserError, match=f'has {field} = .* must not be mixed'):
    references.read(path, 'train', PROVENANCE | {field: value})


@pytest.mark.parametrize('content', [b'', b'not a zip', b'PK\x03\x04 cut off'])
def test_damaged_statistics(tmp_path, content):
  path = tmp_path / 'stats.npz'
  path.write_bytes(content)
  with pytest.raises(UserError, match='stats.npz is damaged .*remove it and run'):
    references.read(path, 'train', PROVENANCE)


# Tables -------------------------------------------------------------------------------------------


def test_cells():
  figure = Figure(value=12.345678, spread=0.5, floor=1.25, floor_n=800)
  assert report.cell(figure) == '12.35 ± 0.5 (floor 1.25 at N = 800)'
  assert report.cell(Figure(missing='no weights')) == '-' == report.cell(None)
  assert report.cell(3) == '3' and report.cell(0.123456) == '0.1235' and report.cell('ddim') == 'ddim'
  assert report.cell(Figure(value=float('inf'))) == 'inf'


def test_tables():
  rows = [{'set': 'a', 'N': 2, 'fd': Figure(value=1.0)}, {'set': 'b', 'kd': 5}]
  assert report.table(rows).splitlines()[1:] == ['a    2  1   -', 'b    -  -   5']
  lines = report.table(report.transpose(rows, 'set'), markdown=True).splitlines()
  assert lines[0] == '|    | a | b |' and lines[1] == '| -- | - | - |' and '| kd | - | 5 |' in lines


def test_reasons_are_gathered():
  missing = Figure(missing='no weights')
  rows = [{'fid': missing, 'is': missing}, {'fid': missing, 'mse': Figure(value=1.0)}]
  assert report.reasons(rows) == ['fid, is: no weights']


def test_json_says_none_and_why(tmp_path):
  figure = Figure(missing='no weights')
  assert report.to_json({'fid': figure, 'psnr': Figure(value=float('inf'))}) == {
    'fid': {'value': None, 'missing': 'no weights'},
    'psnr': {'value': 'inf'},
  }
  report.write_json(tmp_path / 'x' / 'a.json', [figure, (1, 2)])
  assert '"missing": "no weights"' in (tmp_path / 'x' / 'a.json').read_text()
  assert dataclasses.asdict(Figure(value=1.0))['missing'] == ''
