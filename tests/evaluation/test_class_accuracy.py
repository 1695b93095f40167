"""The share of samples that are of the class that they were asked to be of."""

import importlib
import json
import pathlib
import sys
import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from vaediff import modes
from vaediff.data import sources
from vaediff.evaluation import (
  asked_classes,
  frechet,
  measures,
  networks,
  quality,
  reconstructions,
  references,
  report,
  sets,
  sweep,
)
from vaediff.evaluation.measures import Figure
from vaediff.modes import train
from vaediff.run import config as configs
from vaediff.run import trained as opened_stages

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
ASKED = np.array([0, 2, 0, 2])
LOGITS = np.eye(3)[[0, 2, 1, 2]]  # the third is taken for another class


def test_it_is_the_share_of_largest_logits():
  assert measures.class_accuracy(LOGITS, ASKED) == 0.75
  assert measures.class_accuracy(LOGITS, np.argmax(LOGITS, axis=1)) == 1
  assert measures.class_accuracy(-LOGITS, ASKED) == 0.25  # of equal ones the first counts


class Trained(opened_stages.Trained):
  """A stage whose samples are asked to be of classes 0 and 2 in turn, or of none."""

  eval_source = range(297)
  caption_stage = None

  def __init__(self, classes=(0, 2)):
    classes_of = lambda indices: np.array(classes)[indices % len(classes)] if classes else None
    self.experiment = types.SimpleNamespace(classes=classes, classes_of=classes_of, makers=())


class Classifier(networks.FeatureNetwork):
  def __init__(self):
    self.accuracy = 0.99


def opened(missing=None):
  known = {} if missing else {'classifier': Classifier()}
  return networks.Networks(features=known, lpips=None, missing=missing or {})


def seen(*logits):
  return [{'classifier': {'logits': each}} for each in logits]


def test_mean_and_spread_over_seeds_with_the_classifiers_own_accuracy_as_floor():
  found = asked_classes.class_accuracy(Trained(), opened(), seen(LOGITS, np.eye(3)[ASKED]), 4)
  spread = float(np.std([0.75, 1.0], ddof=1))
  assert found == {'class_accuracy': Figure(value=0.875, spread=spread, floor=0.99, floor_n=297)}
  assert asked_classes.class_accuracy(Trained(), opened(), seen(LOGITS), 4)['class_accuracy'].value == 0.75
  cell = report.cell(found['class_accuracy'])
  assert cell == '0.875 ± 0.1768 (floor 0.99 at N = 297)'


def test_samples_that_are_asked_for_nothing_have_none():
  assert asked_classes.class_accuracy(Trained(()), opened(), seen(LOGITS), 4) == {}
  assert asked_classes.class_accuracy(Trained(), opened(), [], 4) == {}  # a VAE's, which are shown before


class Told(Trained):
  """A stage whose samples have the captions of three evaluation images in turn, or those that are chosen."""

  captions = ('a', 'b', 'c')

  def __init__(self, chosen=(), labels=(2, 0, 1)):
    super().__init__(())
    labels = np.array(labels, np.int32)
    self.eval_source = sources.ArraySource(
      images=np.zeros((len(labels), 1, 1, 1), np.uint8), labels=labels, label_names=(), num_classes=3
    )
    section = types.SimpleNamespace(sample=types.SimpleNamespace(captions=chosen))
    self.caption_stage = types.SimpleNamespace(config={'refiner': section}, stage='refiner')


def test_captions_of_evaluation_images_ask_for_their_classes():
  np.testing.assert_array_equal(asked_classes.classes_asked(Told(), 5), [2, 0, 1, 2, 0])
  assert asked_classes.class_accuracy(Told(), opened(), seen(LOGITS), 4)['class_accuracy'].value == 0.5
  assert asked_classes.classes_asked(Told(chosen=('a',)), 5) is None


@pytest.mark.parametrize(
  ('missing', 'logits', 'reason'),
  [
    ({'classifier': 'these have no labels'}, LOGITS, 'these have no labels'),
    ({'inception': 'no weights'}, LOGITS, "it is of the network 'classifier', which config.evaluate.extr"),
    (None, LOGITS * np.nan, 'what classifier sees in the images is not finite'),
  ],
)  # fmt: skip
def test_a_reason_takes_the_place_of_the_figure(missing, logits, reason):
  (figure,) = asked_classes.class_accuracy(Trained(), opened(missing), seen(logits), 4).values()
  assert figure.value is None and figure.missing.startswith(reason)


class Seeing(networks.FeatureNetwork):
  """Takes an image for the class that its bytes say."""

  def __init__(self):
    self.accuracy = 0.99

  def stream(self):
    return networks.Stream(lambda image: {'logits': np.eye(3)[image[:, 0, 0, 0]], 'features': image}, 4)


@pytest.mark.parametrize(('shift', 'share'), [(0, 1.0), (1, 0.0)])
@pytest.mark.parametrize('extractors', [('classifier',), ()])
def test_reconstructions_are_asked_to_be_of_the_class_of_their_image(shift, share, extractors, monkeypatch):
  labels = np.arange(7, dtype=np.int32) % 3
  source = sources.ArraySource(
    images=np.broadcast_to(labels.astype(np.uint8)[:, None, None, None], (7, 8, 8, 1)).copy(),
    labels=labels, label_names=('a', 'b', 'c'), num_classes=3,
  )  # fmt: skip
  settings = {'num_reconstructions': 7, 'max_features': 7, 'batch_size': 5, 'lpips': ''}
  settings['extractors'] = extractors
  trained = types.SimpleNamespace(
    experiment=types.SimpleNamespace(reconstructs=True, titles={'x0': 'VAE'}),
    config=ConfigDict({'evaluate': settings}),
    eval_source=source,
    observe=lambda image, label: image,
    settings=types.SimpleNamespace(batch_size=3),
    draw=lambda indices, image: {'x0': (image + shift) % 3},
  )
  for name, stands_for in (('distance_figures', {}), ('of_first', None), ('title_of', 'VAE')):
    monkeypatch.setattr(reconstructions, name, lambda *_, stands_for=stands_for: stands_for)
  real = types.SimpleNamespace(held_out=dict.fromkeys(extractors))
  known = networks.Networks(features={name: Seeing() for name in extractors}, lpips=None, missing={})
  (row,) = reconstructions.reconstruction_rows.__wrapped__(trained, known, real)
  expected = {'class_accuracy': Figure(value=share, floor=0.99, floor_n=7)} if extractors else {}
  assert {name: value for name, value in row.items() if name == 'class_accuracy'} == expected


@pytest.mark.parametrize('count', [7, 6, 2])
def test_reconstructions_are_drawn_in_whole_batches_of_the_sampler(count, monkeypatch):
  """Whatever the batch size of the networks is; every image counts once, beside its own reconstruction."""
  image = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 1), np.uint8)
  source = sources.ArraySource(
    images=image, labels=np.zeros(9, np.int32), label_names=(), num_classes=0
  )  # fmt: skip
  observed, drawn = [], []
  settings = {'num_reconstructions': count, 'max_features': 9, 'batch_size': 5, 'lpips': '', 'extractors': ()}

  def observe(image, label):
    observed.append((image.shape, label.shape))
    return {'z': image.astype(np.float32)}

  def draw(indices, given):
    np.testing.assert_array_equal(given['z'], image[indices])
    drawn.append(indices.tolist())
    return {'x0': np.where(given['z'] < 255, given['z'] + 1, 254).astype(np.uint8)}

  trained = types.SimpleNamespace(
    experiment=types.SimpleNamespace(reconstructs=True, titles={'x0': 'VAE'}),
    config=ConfigDict({'evaluate': settings}), settings=types.SimpleNamespace(batch_size=3),
    eval_source=source, observe=observe, draw=draw,
  )  # fmt: skip
  monkeypatch.setattr(reconstructions, 'title_of', lambda *_: 'VAE')
  opened, real = networks.Networks(features={}, lpips=None, missing={}), types.SimpleNamespace(held_out={})
  (row,) = reconstructions.reconstruction_rows.__wrapped__(trained, opened, real)
  size = min(3, count)
  assert observed == [((size, 4, 4, 1), (size,))] * -(-count // 3)
  assert drawn == {7: [[0, 1, 2], [3, 4, 5], [6, 6, 6]], 6: [[0, 1, 2], [3, 4, 5]], 2: [[0, 1]]}[count]
  assert row['N'] == count and row['mse'].value == pytest.approx(1 / 255**2)
  real = image[:count]
  changed = np.where(real < 255, real + 1.0, 254).astype(np.uint8)
  assert row['sharpness'].value == pytest.approx(quality.sharpness(changed) / quality.sharpness(real))


def test_distances_of_reconstructions_have_no_floor(tmp_path, monkeypatch):
  """They are compared with the very images: perfect ones are at 0, below what held-out images get."""
  image = np.random.default_rng(0).integers(0, 3, (12, 8, 8, 1), np.uint8)
  source = sources.ArraySource(
    images=image, labels=np.zeros(12, np.int32), label_names=('a',), num_classes=0
  )  # fmt: skip
  settings = {'num_reconstructions': 12, 'max_features': 12, 'batch_size': 12, 'lpips': ''}
  settings |= {'extractors': ('classifier',), 'num_neighbours': 3}
  settings |= {'kernel_subsets': 2, 'kernel_subset_size': 6}
  trained = types.SimpleNamespace(
    experiment=types.SimpleNamespace(reconstructs=True, titles={'x0': 'VAE'}),
    config=ConfigDict({'evaluate': settings}),
    eval_source=source,
    observe=lambda image, label: image,
    settings=types.SimpleNamespace(batch_size=5),
    draw=lambda indices, image: {'x0': image},
  )
  features = lambda image: image.reshape(len(image), -1)[:, :3].astype(np.float32)
  stream = lambda: networks.Stream(lambda image: {'features': features(image)}, 12)
  known = networks.Networks(features={'classifier': Seeing()}, lpips=None, missing={})
  monkeypatch.setattr(known.features['classifier'], 'stream', stream)
  of = lambda image, split: references.Reference(
    moments=frechet.Moments.of(features(image)), features=features(image), split=split, provenance={'n': 12}
  )
  real = sets.Real(
    train={'classifier': of(image[::-1] + 1, 'train')}, held_out={'classifier': of(image, 'eval')}
  )
  monkeypatch.setattr(reconstructions, 'title_of', lambda *_: 'VAE')
  (row,) = reconstructions.reconstruction_rows.__wrapped__(trained, known, real)
  assert row['rfd_classifier'].value == pytest.approx(0, abs=1e-3)
  assert row['rfd_classifier'].floor is None and row['rkd_classifier'].floor is None


def test_a_sweep_has_recall_beside_the_distances():
  assert sweep.names_of('classifier') == (
    'fd_classifier', 'kd_classifier', 'precision_classifier', 'recall_classifier'
  )  # fmt: skip


@pytest.mark.slow
def test_from_a_run_to_pictures_table_and_sweep(tmp_path, one_device, capsys):
  config = importlib.import_module('configs.digits').get_config('unconditional,label,debug')
  config.data.data_dir = str(tmp_path / 'data')
  workdir = tmp_path / 'run'
  train.run_stages(config, workdir, ('refiner',))
  assert 'classes: 0, 1, 2, 3\n' in capsys.readouterr().out  # fewer images than classes
  config = configs.read(workdir)
  config.refiner.sample.update({'labels': (3, 7), 'save_npz': True, 'guidance_weight': 1.0})
  config.evaluate.update({'num_bound': 0, 'num_memorisation': 0, 'num_seeds': 2})
  config.evaluate.sweep.update({'num_steps': (2,), 'guidance_weights': (0.0, 1.0)})
  run = configs.Run(config, workdir, ('refiner',))
  modes.MODES['sample'](run)
  assert 'rows: 3, 7\n' in capsys.readouterr().out
  with np.load(workdir / 'samples.npz') as stored:
    assert stored['label'].tolist() == [3, 7, 3, 7] and stored['label'].dtype == np.int32
    assert stored['x0'].shape == (4, 8, 8, 1)
  modes.MODES['evaluate'](run)
  result = json.loads((workdir / 'evaluation' / 'refiner-ddim-4.json').read_text())
  rows = {row['set']: row for row in result['samples']}
  own = rows['refiner samples']['class_accuracy']
  assert 0 <= own['value'] <= 1 and 'spread' in own and own['floor_n'] == 297
  assert rows['evaluation images']['class_accuracy'] == {'value': own['floor'], 'n': 297}
  assert result['networks'][0]['own test accuracy'] == own['floor']
  modes.SWEEPS['evaluate'](run)
  rows = json.loads((workdir / 'evaluation' / 'sweep.json').read_text())['rows']
  assert [row['guidance'] for row in rows] == [0.0, 1.0] and [row['NFE'] for row in rows] == [2, 4]
  assert rows[1]['GMACs per image'] == pytest.approx(2 * rows[0]['GMACs per image'], rel=1e-6)
  for row in rows:
    assert 0 <= row['class_accuracy']['value'] <= 1 and 'floor' in row['class_accuracy']
    assert 0 <= row['recall_classifier']['value'] <= 1 and row['condition'] == 'label'
