"""Every figure says of how many images it is, or why there is none, whatever the numbers are."""

import importlib
import json
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from some_slow import some_slow

from vaediff.data import sources
from vaediff.errors import UserError
from vaediff.evaluation import (
  evaluate,
  frechet,
  kernel,
  likelihoods,
  measures,
  networks,
  plots,
  precision_recall,
  report,
  sets,
)
from vaediff.evaluation.frechet import Moments
from vaediff.evaluation.measures import Figure
from vaediff.features.extractor import Extractor
from vaediff.machine import sharding
from vaediff.run import trained as opened
from vaediff.run.opened import Opened

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
SIDE, DIMENSIONS = 4, 3
MATRIX = np.random.default_rng(0).standard_normal((SIDE * SIDE, DIMENSIONS)).astype(np.float32) / 100


def extractor(name, broken=False):
  """A fixed linear map of the pixels; of 'inception' also three logits."""

  def apply(params, image):
    features = image.reshape(image.shape[0], -1).astype(jnp.float32) @ params['matrix']
    features = features * jnp.nan if broken else features
    return {'features': features} | ({'logits': features} if name == 'inception' else {})

  return Extractor(
    name=name, resize='none', fingerprint=name, num_features=DIMENSIONS, params={'matrix': MATRIX},
    apply=apply,
  )  # fmt: skip


def features_of(image):
  return image.reshape(len(image), -1).astype(np.float64) @ MATRIX.astype(np.float64)


def source(seed, count, constant=False):
  image = np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 1)).astype(np.uint8)
  image = np.full_like(image, 7) if constant else image
  return sources.ArraySource(
    images=image, labels=np.zeros(count, np.int32), label_names=('zero',), num_classes=1
  )


def opened_networks(*names, broken=False, missing=None):
  config = importlib.import_module('configs.digits').get_config('debug')
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  features = {name: networks.FeatureNetwork(extractor(name, broken), mesh, 64) for name in names}
  return networks.Networks(features=features, lpips=None, missing=missing or {})


class Trained(opened.Trained):
  """A stage that draws image `i` of a source, whatever the seed."""

  stage, made_of, draws_alone = 'refiner', {'network denoiser': 'ab12'}, True

  def __init__(self, tmp_path, evaluation, drawn):
    self.config = importlib.import_module('configs.digits').get_config('debug')
    self.config.data.data_dir = str(tmp_path / 'data')
    self.config.evaluate.update({'num_memorisation': 0, 'kernel_subset_size': 8, **evaluation})
    self.workdir, self.opened = tmp_path / 'run', Opened('refiner', tmp_path / 'run', 4)
    self.mesh = sharding.make_mesh(self.config.mesh, jax.devices()[:1])
    self.experiment = types.SimpleNamespace(
      titles={'x0': 'refined'},
      num_function_evaluations=4,
      classes=(),
      makers=(),
      classes_of=lambda indices: None,
      counts=lambda read, batch: {},
      reads_codes=False,
      diffusion=None,
      inputs={},
      borrowed=(),
    )
    self.drawn_source, self._sources, self.read = drawn, {}, {}

  def images(self, split):
    return sources.open_source(self.config.data, split)

  def draw(self, indices, given=None, seed=None):
    return {'x0': self.drawn_source.read(indices % len(self.drawn_source))['image']}


def rows_of(tmp_path, monkeypatch, train, held_out, drawn, names=('classifier', 'inception'), **evaluation):
  """Returns the rows of the samples and of the evaluation images."""
  splits = {'train': train, 'eval': held_out}
  monkeypatch.setattr(sources, 'open_source', lambda config, split: splits[split])
  trained = Trained(tmp_path, {'extractors': names, **evaluation}, drawn)
  networks_opened = opened_networks(*names)
  real = sets.real_images(trained.config, networks_opened)
  rows = sets.sample_rows(trained, networks_opened, real, tmp_path / 'out')
  return {row['set']: row for row in rows}


def test_every_figure_says_of_how_many_images_it_is(tmp_path, monkeypatch):
  train, held_out, drawn = source(1, 60), source(2, 30), source(3, 40)
  rows = rows_of(
    tmp_path, monkeypatch, train, held_out, drawn,
    num_images=40, max_features=22, num_memorisation=8, num_seeds=1,
  )  # fmt: skip
  all_train, kept_train = features_of(train.images), features_of(train.images)[:22]
  samples, data = rows['refined samples'], rows['evaluation images']

  assert samples['N'] == 40
  x = features_of(drawn.images)
  expected = frechet.frechet_distance(Moments.of(x), Moments.of(all_train))
  assert samples['fid'].value == pytest.approx(expected, rel=1e-3) and samples['fid'].n is None
  expected = kernel.kernel_distance(x[:22], kept_train, num_subsets=100, subset_size=8)[0]
  assert samples['kid'].value == pytest.approx(expected, rel=1e-2, abs=1e-4) and samples['kid'].n == 22
  near = precision_recall.precision_recall(kept_train, x[:22], 3)
  for name in measures.NEIGHBOURHOODS:
    assert samples[f'{name}_classifier'].value == pytest.approx(near[name])
    assert samples[f'{name}_classifier'].n == 22
  assert samples['is'].value == pytest.approx(kernel.inception_score(x)[0], rel=1e-3)
  assert samples['is'].n is None and samples['nearest_training_rmse'].n == 8

  assert data['N'] == 22  # not 30: features of no more are kept
  y = features_of(held_out.images)[:22]
  expected = frechet.frechet_distance(Moments.of(y), Moments.of(all_train))
  assert data['fid'].value == pytest.approx(expected, rel=1e-3)
  assert data['is'].value == pytest.approx(kernel.inception_score(y)[0], rel=1e-3)
  names = [*measures.names_of('inception'), *measures.names_of('classifier')]
  assert all(data[name].n is None for name in names) and data['nearest_training_rmse'].n == 8
  assert '(N = 22)' in report.cell(samples['kid']) and '(N = ' not in report.cell(data['kid'])


def test_the_row_of_the_evaluation_images_is_of_as_many_as_there_are(tmp_path, monkeypatch):
  rows = rows_of(tmp_path, monkeypatch, source(1, 60), source(2, 30), source(3, 40), num_images=40)
  assert rows['evaluation images']['N'] == 30 and rows['refined samples']['N'] == 40


@pytest.mark.parametrize(
  ('numbers', 'changes', 'missing'),
  [
    # the number of training, evaluation and drawn images; what is missing of samples, of evaluation images
    ((40, 1, 30), {}, ('', 'all')),
    ((1, 40, 30), {}, ('compared', 'compared')),
    ((1, 1, 2), {}, ('all', 'all')),
    ((40, 40, 2), {}, ('neighbours is', 'neighbours is')),
    ((2, 2, 2), {}, ('neighbours is', 'neighbours is')),
    ((40, 40, 30), {'num_neighbours': 30}, ('neighbours', 'neighbours')),
    ((40, 40, 30), {'num_neighbours': 10, 'max_features': 10}, ('neighbours', 'neighbours is')),
    ((40, 40, 30), {'kernel_subset_size': 1000}, ('', '')),
    ((40, 40, 19), {}, ('is', 'is')),
    ((40, 40, 30), {'num_memorisation': 1000}, ('', '')),
    ((3, 40, 30), {'num_memorisation': 1000}, ('neighbours', 'neighbours')),
  ],
)
@pytest.mark.parametrize('constant', some_slow([False, True], False))
def test_whatever_the_numbers_are(tmp_path, monkeypatch, numbers, changes, missing, constant):
  train, held_out, drawn = (source(k, count, constant) for k, count in enumerate(numbers))
  rows = rows_of(tmp_path, monkeypatch, train, held_out, drawn, num_images=len(drawn.images), **changes)
  for row, kinds in zip(('refined samples', 'evaluation images'), missing, strict=True):
    near = {f'{name}_{of}' for name in measures.NEIGHBOURHOODS for of in ('inception', 'classifier')}
    compared = near | {'fid', 'kid', 'fd_classifier', 'kd_classifier'}
    groups = {'all': compared | {'is'}, 'compared': compared, 'neighbours': near, 'is': {'is'}}
    expected = set().union(*(groups[kind] for kind in kinds.split()))
    cells = {name: cell for name, cell in rows[row].items() if name in compared | {'is'}}
    assert cells.keys() == compared | {'is'}
    for name, figure in cells.items():
      assert (figure.value is None) == (name in expected), (row, name, figure)
      if figure.value is None:
        assert 'needs at least' in figure.missing and ', there are ' in figure.missing
      else:
        assert np.isfinite(figure.value)
  if constant and not missing[0]:  # all of it is one image: no distance, and all within a ball of radius 0
    found = rows['refined samples']
    assert found['fid'].value == pytest.approx(0, abs=1e-9) and found['precision_inception'].value == 1
    assert found['is'].value == pytest.approx(1)


def test_a_reason_names_the_numbers(tmp_path, monkeypatch):
  rows = rows_of(
    tmp_path, monkeypatch, source(1, 40), source(2, 1), source(3, 30), num_images=12, num_neighbours=12
  )
  samples, data = rows['refined samples'], rows['evaluation images']
  assert samples['precision_classifier'].missing == (
    'needs at least 13 images (config.evaluate.num_neighbours and max_features), there are 12, compared with '
    '40'
  )
  assert samples['is'].missing == 'needs at least 20 images, there are 12'
  assert data['fid'].missing == 'needs at least 2 images, there are 1, compared with 40'
  assert data['N'] == 1


def test_features_that_are_not_finite_are_a_reason(tmp_path, monkeypatch):
  splits = {'train': source(1, 30), 'eval': source(2, 30)}
  monkeypatch.setattr(sources, 'open_source', lambda config, split: splits[split])
  trained = Trained(tmp_path, {'extractors': ('classifier',), 'num_images': 24}, source(3, 24))
  networks_opened = opened_networks('classifier', broken=True)
  real = sets.real_images(trained.config, networks_opened)
  rows = sets.sample_rows(trained, networks_opened, real, tmp_path)
  assert {rows[0][name].missing for name in measures.names_of('classifier')} == {
    'what classifier sees in the images is not finite'
  }
  with pytest.raises(UserError, match='no figure of classifier could be made: what classifier sees'):
    evaluate.check_any(trained.config.evaluate, rows, 'table.md')


def test_floors_that_cannot_be_taken_are_left_out():
  config = importlib.import_module('configs.digits').get_config('debug').evaluate
  one = features_of(source(1, 1).images)
  known = measures.Reference(moments=Moments.of(one), features=one, split='train', provenance={'n': 1})
  real = sets.Real(train={'classifier': known}, held_out={'classifier': known})
  assert sets.floors_at(16, real, config) == {}


# What the table says ------------------------------------------------------------------------------


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
  """Returns evaluated(networks, **settings) -> the folder of an evaluation of samples alone."""

  def run(networks_opened, out=None, **settings):
    splits = {'train': source(1, 40), 'eval': source(2, 30)}
    monkeypatch.setattr(sources, 'open_source', lambda config, split: splits[split])
    monkeypatch.setattr(networks, 'open_networks', lambda *_: networks_opened)
    monkeypatch.setattr(evaluate, 'reconstruction_rows', lambda *_: [])
    monkeypatch.setattr(likelihoods, 'figures', lambda *_: {'elbo': Figure(value=-3.0, n=8)})
    trained = Trained(tmp_path, {'num_images': 24, 'name': 'mine', **settings}, source(3, 24))
    evaluate.evaluate(trained, out)
    return (out or trained.workdir) / 'evaluation'

  return run


def texts(path):
  with Image.open(path) as picture:
    return json.loads(picture.text['vaediff'])


def test_all_that_is_written_says_what_it_was_made_of_and_lies_in_the_folder(tmp_path, evaluated, capsys):
  folder = evaluated(opened_networks('classifier'), tmp_path / 'out', num_memorisation=4)
  assert not (tmp_path / 'run').exists()
  names = sorted(path.name for path in folder.iterdir())
  assert names == ['mine-nearest.png', 'mine.json', 'mine.md', 'mine.png']
  assert json.loads((folder / 'mine.json').read_text())['made_of'] == Trained.made_of
  assert texts(folder / 'mine.png') == texts(folder / 'mine-nearest.png') == Trained.made_of
  assert f'wrote {folder / "mine"}.json, .md and .png' in capsys.readouterr().out


def test_no_wanted_figure_is_an_error_once_the_table_is_written(tmp_path, evaluated):
  evaluated(opened_networks('classifier'))
  missing = {'classifier': 'its checkpoint is damaged', 'lpips_vgg16': 'no weights'}
  with pytest.raises(UserError) as caught:
    evaluated(
      opened_networks(missing=missing), extractors=('classifier',), lpips='lpips_vgg16', num_memorisation=4
    )
  message = str(caught.value)
  assert 'no figure of classifier, lpips_vgg16 could be made: its checkpoint is damaged; no weights' in (
    message
  )
  assert f'{tmp_path}/run/evaluation/mine.md' in message
  folder = tmp_path / 'run' / 'evaluation'
  result = json.loads((folder / 'mine.json').read_text())
  assert result['samples'][0]['fd_classifier'] == {'value': None, 'missing': 'its checkpoint is damaged'}
  assert result['model']['elbo']['value'] == -3 and (folder / 'mine-nearest.png').exists()
  assert 'not computed: fd_classifier' in (folder / 'mine.md').read_text()
  assert not (folder / 'mine.png').exists()  # the plot of the call before is of other figures


def test_one_figure_is_enough(evaluated):
  evaluated(
    opened_networks('classifier', missing={'inception': 'no weights'}), extractors=('classifier', 'inception')
  )
  evaluated(opened_networks(), extractors=())  # none was asked for: the time of drawing is one


def test_a_subset_that_cannot_be_as_large_as_asked_is_noted(evaluated):
  folder = evaluated(opened_networks('classifier'), kernel_subset_size=1000)
  assert json.loads((folder / 'mine.json').read_text())['notes'] == [
    'kd_classifier: subsets hold at most 24 images, not the 1000 of config.evaluate.kernel_subset_size: '
    'there are no more'
  ]
  assert 'note: kd_classifier' in (folder / 'mine.md').read_text()


NAMES = ('../../x', '/tmp/x', 'a/b', '..', '.', 'a\\b', 'a\nb', 'a\0b', 'x' * 201, 'é' * 101)


@pytest.mark.parametrize('name', NAMES)
def test_a_name_leads_to_no_other_folder(tmp_path, evaluated, name):
  with pytest.raises(UserError, match='config.evaluate.name is .* must be the name of a file'):
    evaluated(opened_networks('classifier'), name=name)
  assert list(tmp_path.iterdir()) == []


def test_plots_of_an_earlier_call_do_not_stay(tmp_path):
  path = tmp_path / 'a.png'
  row = {'set': 'x', 'line': 'a', 'NFE': 2, 'seconds per image': 0.1, 'fid': Figure(value=1.0)}
  for draw in (plots.bars, lambda path, rows, made_of: plots.curves(path, rows, 'fid', None, made_of)):
    assert draw(path, [row], {'row 1': 'ab'}) and texts(path) == {'row 1': 'ab'}
    assert not draw(path, [{**row, 'fid': Figure(missing='none')}], {}) and not path.exists()
    assert not draw(path, [{**row, 'fid': Figure(missing='none')}], {})


# Bounds -------------------------------------------------------------------------------------------


def test_a_bound_says_of_how_many_images_it_is():
  terms = {'kl': np.array([1.0, 2.0, 3.0]), 'image': np.array([2.0, 2.0, 5.0])}
  found = likelihoods.of_terms('elbo', terms, lambda nats: -nats)
  assert found['elbo'].value == -5 and found['elbo'].n == 3
  assert found['elbo'].spread == pytest.approx(np.std([3, 4, 8], ddof=1) / 3**0.5)
  assert found['elbo/kl'] == Figure(value=-2.0, n=3) and found['elbo/image'] == Figure(value=-3.0, n=3)
  one = likelihoods.of_terms('elbo', {name: value[:1] for name, value in terms.items()}, lambda nats: -nats)
  assert one['elbo'] == Figure(value=-3.0, n=1)  # of one image there is no error


def test_a_bound_that_is_not_finite_says_of_how_many_images():
  terms = {'kl': np.array([1.0, np.nan, 3.0, np.inf]), 'image': np.ones(4)}
  assert likelihoods.of_terms('elbo', terms, float) == {
    'elbo': Figure(missing='it is not finite for 2 of 4 evaluation images')
  }
