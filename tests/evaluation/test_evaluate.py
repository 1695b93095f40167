"""From a trained run to tables: what is written, what is compared with what, what is not done twice."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from configs.digits import get_config
from vaediff import modes
from vaediff.errors import UserError
from vaediff.evaluation import during_training, evaluate, networks, sets, sweep
from vaediff.evaluation.measures import Figure
from vaediff.machine import sharding
from vaediff.modes import train
from vaediff.run import best, checkpoint
from vaediff.run import config as configs
from vaediff.run.trained import Trained

pytestmark = pytest.mark.xdist_group('evaluate')  # one worker: the tests share what is dear
KEEP_BEST = {
  'refiner.train.best_measure': 'fd_classifier',
  'refiner.train.best_every_steps': 2,
  'refiner.train.best_images': 16,
  'vae.train.best_measure': 'val/mse',
  'vae.train.best_every_steps': 2,
}


@pytest.fixture(scope='module')
def one():
  """A mesh of one device for the whole module."""
  make_mesh = sharding.make_mesh
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'make_mesh', lambda config: make_mesh(config, jax.devices()[:1]))
    yield


@pytest.fixture(scope='module')
def run(tmp_path_factory, one, trained):
  """A debug run of the digits whose refiner keeps its best checkpoint."""
  return trained('digits', **KEEP_BEST).copy(tmp_path_factory.mktemp('evaluate') / 'run')


def opened(run, stage='refiner', **changes):
  config = configs.read(run)
  config.evaluate.update(changes)
  return Trained(config, run, stage, sharding.make_mesh(config.mesh))


@pytest.mark.slow
def test_the_table_of_a_refiner(run, capsys):
  trained = opened(run, num_seeds=2, extractors=('classifier', 'inception'), lpips='lpips_vgg16',
                   weights_dir=str(run / 'none'))  # fmt: skip
  evaluate.evaluate(trained)
  name = run / 'evaluation' / 'refiner-ddim-4'
  result = json.loads(name.with_suffix('.json').read_text())
  rows = {row['set']: row for row in result['samples']}
  assert list(rows) == ['VAE samples', 'refined samples', 'evaluation images']
  refined = rows['refined samples']
  assert refined['N'] == 16 and refined['NFE'] == 4 and refined['sampler'] == 'ddim'
  assert refined['seconds per image']['value'] > 0 and rows['VAE samples']['NFE'] == 0
  assert refined['fd_classifier']['value'] > 0 and refined['fd_classifier']['spread'] > 0
  assert refined['fd_classifier']['floor'] > 0 and refined['fd_classifier']['floor_n'] == 16
  assert rows['evaluation images']['nearest_training_rmse']['value'] > 0
  for row in (refined, rows['VAE samples']):
    assert row['fid'] == {'value': None, 'missing': row['fid']['missing']}
    assert 'Inception weights not given' in row['fid']['missing']
    assert 'run --mode=prepare' in row['diversity_lpips_vgg16']['missing']
  reconstructed = {row['set']: row for row in result['reconstructions']}
  assert list(reconstructed) == ['VAE reconstructions', 'refined reconstructions']
  first = reconstructed['VAE reconstructions']
  assert first['N'] == 16 and 0 < first['mse']['value'] < 1 and first['psnr']['value'] > 0
  assert 0 < first['sharpness']['value'] < 1  # the blur of a VAE
  assert 'window has 11 pixels' in first['ssim']['missing'] and first['rfd_classifier']['value'] >= 0
  assert result['model']['bits_per_dimension']['value'] > 0 and result['model']['elbo']['value'] < 0
  assert 0 <= result['model']['active_units']['value'] <= result['model']['latent_dim']['value']
  (network,) = result['networks']
  assert len(network['weights sha256']) == 64 and 0 <= network['own test accuracy'] <= 1
  text = capsys.readouterr().out
  assert 'not computed: fid, kid, is' in text and 'refined samples' in text
  assert '| fd_classifier' in name.with_suffix('.md').read_text()
  for file in ('refiner-ddim-4.png', 'refiner-ddim-4-nearest.png'):
    with Image.open(run / 'evaluation' / file) as picture:
      assert np.asarray(picture).std() > 0


@pytest.mark.slow
def test_the_table_of_a_vae(run):
  evaluate.evaluate(opened(run, 'vae', name='mine'))
  result = json.loads((run / 'evaluation' / 'mine.json').read_text())
  assert [row['set'] for row in result['samples']] == ['VAE samples', 'evaluation images']
  assert [row['set'] for row in result['reconstructions']] == ['VAE reconstructions']
  assert 'bits_per_dimension' not in result['model'] and result['model']['elbo/kl']['value'] < 0


@pytest.mark.slow
def test_figures_do_not_depend_on_batch_sizes(run):
  def figures(**changes):
    trained = opened(run, **{k: v for k, v in changes.items() if k != 'draw'}).with_settings(
      batch_size=changes.get('draw', 4)
    )
    networks_opened = networks.open_networks(trained.config, trained.mesh)
    drawn = sets.draw_sets(trained, networks_opened, 3, 12, keep=5, compiled=False)
    return drawn['x0'].seen['classifier']['features'], drawn['x0'].first

  features, first = figures(batch_size=16)
  for changes in ({'batch_size': 5}, {'batch_size': 16, 'draw': 12}, {'batch_size': 3, 'draw': 5}):
    other, images = figures(**changes)
    np.testing.assert_allclose(other, features, rtol=0.05, atol=0.02)  # a byte may round the other way
    assert np.abs(images.astype(int) - first).max() <= 1 and len(images) == 5


@pytest.mark.slow
def test_a_sweep_is_resumed_row_by_row(run, monkeypatch, capsys):
  changes = {'extractors': ('classifier',)}
  sweep.sweep(opened(run, **changes))
  folder = run / 'evaluation'
  table = json.loads((folder / 'sweep.json').read_text())['rows']
  assert [(row['sampler'], row['steps'], row['NFE']) for row in table] == [('ddim', 1, 1), ('ddim', 2, 2)]
  assert all(row['fd_classifier']['value'] > 0 and row['seconds per image'] > 0 for row in table)
  assert (folder / 'sweep-fd_classifier.png').exists() and '| formulation1' in (
    folder / 'sweep.md'
  ).read_text()

  measured = []
  measure = sweep.measure

  def counting(chosen, *rest):
    measured.append(chosen.settings.num_steps)
    return measure(chosen, *rest)

  monkeypatch.setattr(sweep, 'measure', counting)
  sweep.sweep(opened(run, **changes))
  assert measured == []
  assert json.loads((folder / 'sweep.json').read_text())['rows'] == table
  trained = opened(run, **changes)
  trained.config.evaluate.sweep.num_steps = (1, 3)
  sweep.sweep(trained)
  assert measured == [3]
  sweep.sweep(opened(run, num_images=8, **changes))  # another N is another row
  assert measured == [3, 1, 2]


@pytest.mark.slow
def test_what_cannot_be_swept(run, tmp_path):
  with pytest.raises(UserError, match='needs a stage that samples in steps'):
    sweep.sweep(opened(run, 'vae'))
  trained = opened(run)
  trained.config.evaluate.sweep.workdirs = (str(tmp_path / 'none'),)
  with pytest.raises(UserError, match='config.json does not exist'):
    sweep.sweep(trained)
  other = configs.read(run)
  other.data.image_size = 16
  configs.save(other, tmp_path / 'other')
  trained.config.evaluate.sweep.workdirs = (str(tmp_path / 'other'),)
  with pytest.raises(UserError, match='data.image_size = 16.* do not compare'):
    sweep.sweep(trained)


@pytest.mark.slow
def test_another_run_of_the_same_data_is_a_line_of_the_same_table(run):
  trained = opened(run)
  trained.config.evaluate.sweep.update({'workdirs': (str(run),), 'num_steps': (1,)})
  sweep.sweep(trained)
  table = json.loads((run / 'evaluation' / 'sweep.json').read_text())['rows']
  assert len(table) == 2 and table[0]['fd_classifier'] == table[1]['fd_classifier']


@pytest.mark.slow
def test_a_denoising_gan_is_one_row_of_the_same_table(run, tmp_path):
  config = get_config('ddgan,debug')
  config.data.data_dir = configs.read(run).data.data_dir
  gan = tmp_path / 'gan'
  train.run_stages(config, gan, tuple(config.stages))
  trained = opened(run, extractors=('classifier',), num_images=8)
  trained.config.evaluate.sweep.update({'workdirs': (str(gan),), 'num_steps': (1, 2)})
  sweep.sweep(trained)
  rows = json.loads((run / 'evaluation' / 'sweep.json').read_text())['rows']
  found = [(row['run'], row['condition'], row['sampler'], row['steps'], row['NFE']) for row in rows]
  assert found == [
    ('run', 'formulation1', 'ddim', 1, 1),
    ('run', 'formulation1', 'ddim', 2, 2),
    ('gan', 'none', 'pixel ddgan', 4, 4),
  ]
  assert all(row['fd_classifier']['value'] > 0 for row in rows)


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_and_can_be_used(run):
  lines = [json.loads(line) for line in (run / 'refiner' / 'metrics.jsonl').read_text().splitlines()]
  values = {line['step']: line['best/fd_classifier'] for line in lines if 'best/fd_classifier' in line}
  assert list(values) == [2, 4]
  step = checkpoint.latest_step(run / 'refiner' / best.FOLDER)
  assert values[step] == min(values.values())
  config = configs.read(run)
  config.refiner.sample.checkpoint = 'best'
  trained = Trained(config, run, 'refiner', sharding.make_mesh(config.mesh))
  assert sets.name_of(trained) == 'refiner-ddim-4-best'
  experiment = trained.experiment
  measure, _ = during_training.make_measure(
    config, 'refiner', experiment, trained.read, trained.eval_source, trained.mesh
  )
  assert measure(trained.params) == pytest.approx(values[step], rel=1e-4)
  vae = [json.loads(line) for line in (run / 'vae' / 'metrics.jsonl').read_text().splitlines()]
  assert {line['best/val/mse'] for line in vae if 'best/val/mse' in line} == {
    line['val/mse'] for line in vae if 'val/mse' in line
  }


@pytest.mark.slow
def test_best_needs_a_checkpoint_and_a_known_name(run):
  config = configs.read(run)
  config.refiner.sample.checkpoint = 'first'
  with pytest.raises(UserError, match="must be 'latest', 'best' or a step that is kept, got 'first'"):
    Trained(config, run, 'refiner', sharding.make_mesh(config.mesh))
  config.refiner.sample.checkpoint = 'best'
  (run / 'refiner' / 'best').rename(run / 'refiner' / 'away')
  try:
    with pytest.raises(UserError, match='none is kept unless train.best_measure is set'):
      Trained(config, run, 'refiner', sharding.make_mesh(config.mesh))
  finally:
    (run / 'refiner' / 'away').rename(run / 'refiner' / 'best')


def test_keeping_the_best(tmp_path):
  keeper = best.Best(tmp_path, 'recall_vgg16', {'samples': 'a'}, 0)
  state = {'a': jax.numpy.zeros(2)}
  assert keeper.consider(1, state, {}, 0.5) and not keeper.consider(2, state, {}, 0.5)
  assert not keeper.consider(3, state, {}, float('nan')) and keeper.consider(4, state, {}, 0.7)
  keeper.close()
  assert checkpoint.finished_steps(tmp_path / 'best' / 'checkpoints') == [4]
  again = best.Best(tmp_path, 'recall_vgg16', {'samples': 'a'}, 1)
  assert again.value == 0.7 and not again.consider(4, state, {}, 0.7)
  # rounded otherwise on other devices: steps that were there are met again, and are no better
  assert not again.consider(3, state, {}, 0.8) and not again.consider(4, state, {}, 0.7001)
  again.close()
  assert checkpoint.finished_steps(tmp_path / 'best' / 'checkpoints') == [4]
  with pytest.raises(UserError, match="holds the best checkpoint by 'recall_vgg16'"):
    best.Best(tmp_path, 'fd_vgg16', {'samples': 'a'}, 1)
  with pytest.raises(UserError, match='best checkpoint in .* was made of samples a, which is b now'):
    best.Best(tmp_path, 'recall_vgg16', {'samples': 'b'}, 1)
  anew = best.Best(tmp_path, 'recall_vgg16', {'samples': 'b'}, 0)  # of a training from its first step
  assert anew.value is None and anew.consider(2, state, {}, 0.1)
  anew.close()
  assert checkpoint.finished_steps(tmp_path / 'best' / 'checkpoints') == [2]
  assert checkpoint.finished_steps(tmp_path / 'earlier' / 'best' / 'checkpoints') == [4]


@pytest.mark.slow
def test_modes(run, capsys):
  config = configs.read(run)
  config.evaluate.update({'num_bound': 0, 'num_memorisation': 0, 'name': 'plain'})
  modes.MODES['evaluate'](configs.Run(config, run, tuple(config.stages)))
  assert 'wrote' in capsys.readouterr().out
  result = json.loads((run / 'evaluation' / 'plain.json').read_text())
  assert 'bits_per_dimension' not in result['model']
  assert 'nearest_training_rmse' not in result['samples'][0]
  assert set(modes.SWEEPS) == {'evaluate'}
  assert Figure(**result['samples'][0]['fd_classifier']).value > 0
