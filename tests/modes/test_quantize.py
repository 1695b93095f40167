"""`--mode=quantize` makes a stage that is drawn from as any other; what it cannot make is refused by name."""

import shutil

import jax
import numpy as np
import pytest

from vaediff.errors import UserError
from vaediff.experiments import quantized
from vaediff.machine import integers, sharding
from vaediff.models.quantized import PRODUCTS, Quantized
from vaediff.modes import benchmark, describe, evaluate, quantize
from vaediff.modes import train as training
from vaediff.run import checkpoint, quantize_stage
from vaediff.run import config as configs
from vaediff.run.config import Run
from vaediff.run.trained import Trained
from vaediff.storage import identity


@pytest.fixture
def whole_numbers(monkeypatch):
  """Products of whole numbers, also where the tests' compiler makes slow loops of them."""
  monkeypatch.setattr(integers, 'arithmetic', lambda: PRODUCTS)


def opened(trained, target, **changes):
  workdir = trained('digits').copy(target)
  config = configs.read(workdir)
  config.update_from_flattened_dict({f'quantize.{name}': value for name, value in changes.items()})
  return Run(config, workdir, ('refiner',))


def drawn(workdir, stage, mesh):
  images = Trained(configs.read(workdir), workdir, stage, mesh).draw(np.arange(3))
  return images['x0'].astype(int)


@pytest.mark.slow
def test_a_quantized_refiner_draws_what_the_refiner_draws_on_one_device_and_on_eight(
  trained, tmp_path, whole_numbers, capsys
):
  run = opened(trained, tmp_path / 'run', num_images=8)
  one, eight = (sharding.make_mesh(run.config.mesh, jax.devices()[:n]) for n in (1, 8))
  assert quantize.quantize(run) == 'refiner_int8'
  stored = configs.read(run.workdir)
  assert stored.stages == ('vae', 'refiner', 'refiner_int8') and stored.quantize.num_images == 4
  assert 'of the' in capsys.readouterr().out
  found, floats = drawn(run.workdir, 'refiner_int8', one), drawn(run.workdir, 'refiner', one)
  assert abs(found - floats).mean() < 4  # of 255
  assert abs(found - drawn(run.workdir, 'refiner_int8', eight)).max() <= 1
  sizes = describe.describe_quantized(stored, run.workdir, 'refiner_int8')
  assert sizes['memory'] < sizes['memory_float32']
  # Files of a busy machine also hold nodes that were written over: the least of three saves has the fewest.
  least = {}
  for name in ('refiner_int8', 'refiner'):
    params = {'denoiser': Trained(stored, run.workdir, name, one).params['denoiser']}
    saves = [tmp_path / f'{name}-{number}' for number in range(3)]
    least[name] = min(quantize_stage.write(folder, params, 1, {}) for folder in saves)
  assert least['refiner_int8'] < least['refiner'], least
  assert sizes['disk'] >= least['refiner_int8'] // 2  # what is said is of files that are there
  kernel = checkpoint.stored_shapes(checkpoint.latest_folder(run.workdir / 'refiner_int8'))
  assert 'networks/denoiser/params/middle/res_0/conv_1/kernel_q' in kernel
  assert not any(path.endswith('middle/res_0/conv_1/kernel') for path in kernel)
  with pytest.raises(UserError, match="stage 'refiner_int8' is not trained: --mode=quantize makes it"):
    training.run_stages(stored, run.workdir, ('refiner_int8',))

  # the refiner is trained anew: its numbers are those of another network
  folder = run.workdir / 'refiner_int8'
  meta = checkpoint.load_meta(folder)
  assert meta['frozen']['float_denoiser'] == checkpoint.identity_of(run.workdir / 'refiner')
  copy = checkpoint.identity_of
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(checkpoint, 'identity_of', lambda f, step=0: 'x' if f.name == 'refiner' else copy(f, step))
    with pytest.raises(identity.Stale, match="the network 'float_denoiser'"):
      Trained(stored, run.workdir, 'refiner_int8', one)


@pytest.mark.slow
def test_a_checkpoint_that_is_not_the_latest_is_what_is_quantized_and_what_is_compared(
  trained, tmp_path, one_device
):
  run = opened(trained, tmp_path / 'run', num_images=4)
  run.config.refiner.sample.checkpoint = '2'
  assert quantize.quantize(run) == 'refiner_int8'
  meta, folder = checkpoint.load_meta(run.workdir / 'refiner_int8'), run.workdir / 'refiner'
  assert meta['frozen']['float_denoiser'] == checkpoint.identity_of(folder, 2)
  mesh, stored = sharding.make_mesh(run.config.mesh), configs.read(run.workdir)
  whole = Trained(stored, run.workdir, 'refiner_int8', mesh)
  assert whole.step == 2 and meta['frozen']['float_denoiser'] != checkpoint.identity_of(folder)
  shutil.rmtree(folder / 'checkpoints' / '4')  # the latest has no part in it
  Trained(stored, run.workdir, 'refiner_int8', mesh)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'stage': 'decoder'}, "config.quantize.stage is 'decoder'; the stages of this run are vae, refiner"),
    ({'weights': 'int2'}, 'config.quantize.weights'),
    ({'keep_float': ('centre/*',)}, r"keep_float names the layer 'centre/\*', which the network"),
    pytest.param({'keep_float': ('*',)}, 'which leaves no layer to be quantized', marks=pytest.mark.slow),
    ({'reads': 'vae'}, "config.quantize.reads is 'vae', which is no quantized stage of this run; make it"),
  ],
)
def test_what_cannot_be_quantized_is_refused_by_name(trained, tmp_path, one_device, changes, message):
  run = opened(trained, tmp_path / 'run', **changes)
  with pytest.raises(UserError, match=message):
    quantize.quantize(run)
  assert not list(run.workdir.glob('*_*8'))


def test_a_stage_that_is_not_trained_is_refused(trained, tmp_path, one_device):
  run = opened(trained, tmp_path / 'run')
  (run.workdir / 'refiner').rename(tmp_path / 'away')
  with pytest.raises(UserError, match='no checkpoint in .*refiner/checkpoints: train that stage first'):
    quantize.quantize(run)


@pytest.mark.slow
@pytest.mark.parametrize('weights', ['int8', 'int4'])
def test_weights_alone_and_a_decoder_without_time(trained, tmp_path, one_device, whole_numbers, weights):
  run = opened(trained, tmp_path / 'run', weights=weights, activations='float32')
  assert quantize.quantize(run) == {'int8': 'refiner_w8', 'int4': 'refiner_w4'}[weights]
  mesh = sharding.make_mesh(run.config.mesh)
  name = f'refiner_w{weights[-1]}'
  assert abs(drawn(run.workdir, name, mesh) - drawn(run.workdir, 'refiner', mesh)).mean() < 16
  stored, opened_stage = (
    configs.read(run.workdir),
    Trained(configs.read(run.workdir), run.workdir, name, mesh),
  )
  assert 'tables' not in opened_stage.read['denoiser']  # floats are made once, when it is opened
  sizes = describe.describe_quantized(stored, run.workdir, name)
  assert sizes['memory'] == sizes['memory_float32'] and sizes['disk'] < sizes['disk_float32']
  run.config.update_from_flattened_dict({'quantize.stage': 'vae', 'quantize.activations': 'int8'})
  name = quantize.quantize(run)
  image = Trained(configs.read(run.workdir), run.workdir, name, mesh).draw(np.arange(3))
  assert next(iter(image.values())).shape == (3, 8, 8, 1)


@pytest.mark.slow
def test_a_decoder_is_rounded_on_what_it_reads_of_images_and_a_refiner_reads_it(
  trained, tmp_path, one_device, whole_numbers, capsys
):
  changes = {'stage': 'vae', 'weights': 'int4', 'method': 'adaround', 'calibration.num_samples': 6}
  run = opened(trained, tmp_path / 'run', **changes)
  mesh = sharding.make_mesh(run.config.mesh)
  assert quantize.quantize(run) == 'vae_w4a8'
  said = capsys.readouterr().out
  assert 'vae: observing 6 images' in said and 'of rounding to nearest' in said and 'measured ranges' in said
  assert len(list((run.workdir / 'vae').glob('rounded-*.npz'))) == 1

  config = configs.read(run.workdir)
  config.quantize.update({'stage': 'refiner', 'reads': 'vae_w4a8', 'num_images': 4})
  assert quantize.quantize(Run(config, run.workdir, ('refiner',))) == 'refiner_int8'
  stored = configs.read(run.workdir)
  assert stored.refiner_int8.vae.stage == 'vae_w4a8' and stored.refiner.vae.stage == 'vae'
  stage = Trained(stored, run.workdir, 'refiner_int8', mesh)
  assert stage.experiment.frozen['vae'].stage == 'vae_w4a8' and 'tables' in stage.read['vae']
  found = drawn(run.workdir, 'refiner_int8', mesh)
  assert abs(found - drawn(run.workdir, 'refiner', mesh)).mean() < 16
  models = [
    source.model
    for source in quantized.in_floats(stage.experiment).frozen.values()
    if hasattr(source, 'model')
  ]
  assert models and not any(isinstance(model, Quantized) for model in models)

  config.quantize.update({'stage': 'vae', 'reads': 'vae_w4a8'})
  with pytest.raises(UserError, match="made of 'vae'; stage 'vae' reads no such VAE or autoencoder"):
    quantize.quantize(Run(config, run.workdir, ('vae',)))


@pytest.mark.slow
def test_tables_sweeps_and_timings_take_a_quantized_stage_as_any_other(
  trained, tmp_path, one_device, whole_numbers
):
  run = opened(trained, tmp_path / 'run', num_images=8)
  name = quantize.quantize(run)
  config = configs.read(run.workdir)
  config.evaluate.update({'extractors': ()})
  config.benchmark.update({'num_repeats': 1})
  asked = Run(config, run.workdir, (name,), tmp_path / 'out')
  evaluate.mode(asked)
  evaluate.sweep_mode(asked)
  tables = {path.name for path in (tmp_path / 'out').rglob('*.json')}
  assert any(table.startswith(name) for table in tables), tables
  assert any('sweep' in table for table in tables), tables
  (row,) = benchmark.benchmark(config, (name,))['stages'].values()
  assert row['arithmetic'] == PRODUCTS and row['speed_range'][0] <= row['speed'] <= row['speed_range'][1]
  assert row['memory_bytes'] < row['memory_bytes_float32']
