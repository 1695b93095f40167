"""The same codes by every decoder: what a row says of errors, sharpness and diversity."""

import importlib
import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from vaediff import checks
from vaediff.errors import UserError
from vaediff.evaluation import against_teacher, decoders, networks, quality, reconstructions
from vaediff.evaluation.networks import Networks
from vaediff.evaluation.sets import Real
from vaediff.run.trained import Trained

NOTHING = Networks(features={}, lpips=None, missing={})


def images(seed, *shape):
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_a_sample_of_the_posterior_has_twice_the_error_of_its_mean():
  """x and its samples are independent draws of N(m, s^2), in bytes: E|x - x'|^2 = 2 s^2, less of the mean."""
  random, n = np.random.default_rng(0), 4
  mean = random.uniform(80, 170, (200, 8, 8, 1))
  draw = lambda: np.clip(np.rint(mean + random.normal(0, 20, mean.shape)), 0, 255).astype(np.uint8)
  found = decoders.figures_of(draw(), np.stack([draw() for _ in range(n)]), NOTHING)
  assert found['mse'].value == pytest.approx(2 * (20 / 255) ** 2, rel=0.02)
  assert found['mse of the mean'].value == pytest.approx((1 + 1 / n) * (20 / 255) ** 2, rel=0.02)
  assert found['by the law'].value == pytest.approx(found['mse of the mean'].value, rel=0.02)
  assert found['mse of the mean'].n == n


def test_samples_that_are_all_alike_miss_the_law():
  x, same = images(0, 20, 8, 8, 1), images(1, 20, 8, 8, 1)
  found = decoders.figures_of(x, np.stack([same] * 4), NOTHING)
  assert found['mse of the mean'].value == pytest.approx(found['mse'].value)
  assert found['by the law'].value == pytest.approx(0.625 * found['mse'].value)


def test_the_same_class_is_of_two_samples_of_the_same_codes():
  """A classifier of one pixel: of four pairs three agree, whatever the third sample of each is."""

  class Classifier(networks.FeatureNetwork):
    def __init__(self):
      pass

    def __call__(self, image):
      return {'logits': np.eye(10)[image[:, 0, 0, 0]]}

  sets = np.zeros((3, 4, 8, 8, 1), np.uint8)
  sets[:2, :, 0, 0, 0], sets[2, :, 0, 0, 0] = [[1, 2, 3, 4], [1, 2, 3, 5]], 9
  own = Networks(features={'classifier': Classifier()}, lpips=None, missing={})
  assert decoders.same_class(sets, own)['same class'].value == 0.75
  assert decoders.same_class(sets, NOTHING) == {}


def test_samples_of_decoders_are_none_that_were_chosen(monkeypatch):
  """Where the config ranks samples by CLIP: what it draws is of the posterior, and so is what it costs."""

  class Stage(Trained):
    experiment = types.SimpleNamespace(
      num_function_evaluations=2, columns=lambda: types.SimpleNamespace(sampler='ddim', steps=2)
    )
    stage = 'refiner'

    def __init__(self, settings):
      self.config = ConfigDict({'refiner': {'sample': settings}})

    def with_settings(self, **changes):
      other = Stage(self.settings.to_dict())
      other.settings.update(changes)
      return other

    def draw(self, indices, given=None, seed=None):
      assert not self.settings.rerank.stage
      return {'x0': given['codes']}

  settings = {'sampler': 'ddpm', 'num_steps': 9, 'seed': 0, 'batch_size': 4}
  root = Stage({**settings, 'rerank': {'stage': 'clip', 'workdir': '', 'candidates': 16}})
  monkeypatch.setattr(decoders, 'shown', lambda *_: iter(()))
  monkeypatch.setattr(decoders, 'students', lambda *_: [root])
  asked = ConfigDict({'samplers': (('ddim', 2),), 'num_samples': 2})
  found = list(decoders.decoders(root, root, {'codes': images(0, 3, 2, 2, 1)}, asked))
  assert [cost['NFE'] for _, _, cost in found] == [2, 2]


def test_sharpness_is_the_variance_of_the_laplacian():
  checkers = np.zeros((1, 8, 8, 1), np.uint8)
  checkers[0, ::2, ::2], checkers[0, 1::2, 1::2] = 255, 255
  # inside, a pixel differs from its four neighbours by 1; at an edge, where the image is reflected, one of
  # them is the pixel itself, in a corner two are; as many are white as black
  expected = (36 * 4**2 + 24 * 3**2 + 4 * 2**2) / 64
  assert quality.sharpness(checkers) == pytest.approx(expected)
  assert quality.sharpness(checkers // 2) == pytest.approx(quality.sharpness(checkers) * (127 / 255) ** 2)
  assert quality.sharpness(np.full((2, 8, 8, 3), 7, np.uint8)) == 0


def test_sharpness_is_over_that_of_the_data_and_none_where_they_have_no_edges():
  real = images(0, 3, 8, 8, 1)
  edges = [reconstructions.mean_of([quality.sharpness_of_each(each)]) for each in (real // 2, real)]
  assert reconstructions.ratio_figure(*edges).value == pytest.approx(0.25, abs=0.01)
  flat = reconstructions.mean_of([quality.sharpness_of_each(np.full((2, 8, 8, 1), 9, np.uint8))])
  found = reconstructions.ratio_figure(edges[0], flat)
  assert found.value is None and 'no edges' in found.missing


def test_in_batches_keeps_every_row_once_and_in_order():
  given = {'codes': np.arange(7)[:, None]}
  found, seconds = decoders.in_batches(
    3, given, lambda indices, rows: {'x0': rows['codes'], 'index': indices}, compiled=False
  )
  np.testing.assert_array_equal(found['x0'], given['codes'])
  np.testing.assert_array_equal(found['index'], np.arange(7))
  assert seconds > 0


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'num_images': 1}, r'config.evaluate.decoders.num_images must be 0 \(off\) or above 1, got 1'),
    ({'num_samples': 1}, 'config.evaluate.decoders.num_samples must be >= 2, got 1'),
    ({'samplers': (('ddim', '25'),)}, r"decoders.samplers = .* is \('ddim', '25'\); each must be a sampler"),
    ({'samplers': (('ddim', 0),)}, r"decoders.samplers = .* is \('ddim', 0\)"),
    ({'samplers': (('dim', 25),)}, r"is \('dim', 25\); .* samplers: ddpm, ddim"),
    ({'samplers': ('ddim',)}, r"decoders.samplers = .* is 'ddim'"),
  ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_drawn(changes, message):
  settings = importlib.import_module('configs.digits').get_config('debug').evaluate
  with settings.unlocked():
    settings.decoders.samplers = ()
  settings.decoders.update({'num_images': 0})
  checks.check(settings, networks.BOUNDS, 'config.evaluate.')
  with settings.unlocked():
    settings.decoders.update({'num_images': 8, **changes})
  with pytest.raises(UserError, match=message):
    checks.check(settings, networks.BOUNDS, 'config.evaluate.')


@pytest.mark.parametrize(('reads_codes', 'count'), [(False, 8), (True, 0)])
def test_teachers_are_opened_where_they_decode_alone(reads_codes, count, monkeypatch):
  """A student that decodes no codes is evaluated where its teacher's folder is gone."""

  class Student(Trained):
    config = ConfigDict({'evaluate': {'decoders': {'num_images': count}}})
    experiment = types.SimpleNamespace(reads_codes=reads_codes)

    def __init__(self):
      pass

  real = object.__new__(Real)
  monkeypatch.setattr(against_teacher, 'chain', lambda trained: pytest.fail('it was opened'))
  assert decoders.decoder_rows(Student(), NOTHING, real) == []
