"""`--mode=export` writes a file that draws what the stage draws, or nothing, and says why."""

import importlib.util
import json

import numpy as np
import pytest

from vaediff.errors import UserError
from vaediff.machine import integers
from vaediff.modes import export, export_onnx
from vaediff.run import config as configs
from vaediff.run.config import Run
from vaediff.weights import onnx_file

INSTALLED = all(importlib.util.find_spec(name) for name in onnx_file.PACKAGES)
needs_onnx = pytest.mark.skipif(not INSTALLED, reason='the extra [onnx] is not installed')


@pytest.fixture
def run(trained, tmp_path, one_device):
  """Returns run(stage='refiner', **changes) -> what the mode is called with; `run.out` is empty."""

  def run(stage='refiner', **changes):
    workdir = trained('digits').run
    config = configs.read(workdir)
    config.update_from_flattened_dict(
      {'refiner.sample.sampler': 'ddim', 'refiner.sample.num_steps': 2, **changes}
    )
    return Run(config, workdir, (stage,), tmp_path / 'out')

  return run


@needs_onnx
@pytest.mark.slow
def test_a_sampler_in_floats_and_in_whole_numbers(run, tmp_path, capsys):
  asked = run(**{'export.weights': 'int8', 'export.num_images': 3})
  export.mode(asked)
  out = capsys.readouterr().out
  figures = dict(line.split(' ', 1) for line in out.splitlines() if line.count(' ') == 1)
  assert 0 <= float(figures['max_difference']) <= 1e-4
  path = tmp_path / 'out' / 'refiner_int8.onnx'
  assert [file.name for file in path.parent.iterdir()] == [path.name]
  assert path.stat().st_size == int(figures['file_bytes_int8'].replace(',', ''))
  assert {'file_bytes', 'onnx_ms', 'jax_ms', 'onnx_int8_ms', 'mean_difference_int8'} <= figures.keys()

  content = path.read_bytes()
  about = onnx_file.metadata(content)
  assert about['stage'] == 'refiner' and about['weights'] == 'int8'
  assert json.loads(about['inputs'])['noise'] == 'float32 [2, 8, 8, 1], drawn from N(0, I)'
  assert about["id of the stage 'refiner'"]
  rng = np.random.default_rng(0)
  latent = configs.read(asked.workdir).vae.model.latent_dim
  given = {'noise': rng.normal(size=(2, 8, 8, 1)), 'z': rng.normal(size=(2, latent))}
  images = onnx_file.runner(content, 1)({name: value.astype(np.float32) for name, value in given.items()})
  assert images.shape == (2, 8, 8, 1) and abs(images).max() <= 1


@needs_onnx
@pytest.mark.slow
def test_bytes_of_a_decoder(run, tmp_path, capsys):
  export.mode(run('vae', **{'export.output': 'uint8'}))
  content = (tmp_path / 'out' / 'vae.onnx').read_bytes()
  latent = json.loads(onnx_file.metadata(content)['inputs'])
  assert list(latent) == ['z']
  size = configs.read(run().workdir).vae.model.latent_dim
  image = onnx_file.runner(content, 1)({'z': np.zeros((2, size), np.float32)})
  assert image.dtype == np.uint8 and image.shape == (2, 8, 8, 1)
  assert 'wrote' in capsys.readouterr().out


@needs_onnx
@pytest.mark.slow
def test_a_file_that_draws_other_images_is_not_written(run, tmp_path, monkeypatch):
  monkeypatch.setattr(export_onnx, 'differences', lambda a, b: abs(a - b) + 2e-4)
  with pytest.raises(UserError, match=r"'vae' draws other images than JAX: .* 0.0001 is allowed"):
    export.mode(run('vae'))
  assert not list((tmp_path / 'out').iterdir())


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'export.format': 'pickle'}, "config.export.format is 'pickle'; valid: onnx"),
    ({'export.weights': 'int4'}, "config.export.weights is 'int4'; valid: float32, int8"),
    ({'export.output': 'png'}, "config.export.output is 'png'"),
    ({'export.batch_size': 0}, 'config.export.batch_size must be >= 1'),
    ({'export.reduce_range': 'maybe'}, 'config.export.reduce_range'),
  ],
)
@pytest.mark.slow
def test_settings_that_are_none_are_refused_by_name(run, changes, message):
  with pytest.raises(UserError, match=message):
    export.mode(run(**changes))


def test_missing_packages_are_said_before_anything_is_opened(run, monkeypatch):
  monkeypatch.setattr(onnx_file, 'PACKAGES', ('no_such_package',))
  with pytest.raises(UserError, match=r"not installed: no_such_package.*pip install -e '\.\[onnx\]'"):
    export.mode(run('refiner'))


def test_a_stage_that_is_not_trained_is_refused(run, tmp_path, monkeypatch):
  monkeypatch.setattr(onnx_file, 'check_installed', lambda: None)
  asked = run()
  empty = Run(asked.config, tmp_path / 'empty', asked.stages, asked.out)
  with pytest.raises(UserError, match='no checkpoint in .*refiner/checkpoints: train that stage first'):
    export.mode(empty)


@pytest.mark.parametrize(
  ('flags', 'reduced'), [(('avx512f',), True), (('avx512f', 'avx512_vnni'), False), (('asimddp',), False)]
)
def test_kernels_have_seven_bits_where_sums_of_products_saturate(monkeypatch, flags, reduced):
  monkeypatch.setattr(integers, 'cpu_flags', lambda: flags)
  assert export_onnx.reduces('auto') == reduced
  assert export_onnx.reduces('yes') and not export_onnx.reduces('no')


def test_images_of_bytes_are_compared_without_a_wrap():
  a, b = np.uint8([0, 255]), np.uint8([1, 254])
  np.testing.assert_array_equal(export_onnx.differences(a, b), [1, 1])


def test_the_speed_is_the_median_of_ratios_of_calls_in_turn():
  assert export_onnx.speed([2.0, 4.0, 9.0], [1.0, 1.0, 3.0]) == 3.0
