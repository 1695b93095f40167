"""`--mode=export` of StableHLO writes a file that JAX alone runs, and that draws what the stage draws."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from vaediff.errors import UserError
from vaediff.machine import integers, sharding
from vaediff.modes import export, export_stablehlo, quantize
from vaediff.run import config as configs
from vaediff.run import exported
from vaediff.run.config import Run
from vaediff.run.trained import Trained
from vaediff.weights import stablehlo_file

INSTALLED = importlib.util.find_spec(stablehlo_file.PACKAGE) is not None
pytestmark = pytest.mark.skipif(not INSTALLED, reason='the extra [stablehlo] is not installed')
ALONE = """
import json, sys
import jax, numpy
with open(sys.argv[1], 'rb') as file:
  program = jax.export.deserialize(bytearray(file.read()))
with numpy.load(sys.argv[2]) as given:
  images = program.call({name: given[name] for name in given.files})
numpy.save(sys.argv[3], images)
assert not any(name.split('.')[0] in ('vaediff', 'flax', 'orbax') for name in sys.modules)
""".replace('import jax,', 'import jax, jax.export,')


@pytest.fixture
def run(trained, tmp_path, one_device):
  """Returns run(stage, **changes) -> what the mode is called with; `run.out` is empty."""

  def run(stage, **changes):
    workdir = trained('digits').run
    config = configs.read(workdir)
    config.update_from_flattened_dict(
      {
        'export.format': 'stablehlo',
        'refiner.sample.sampler': 'ddim',
        'refiner.sample.num_steps': 2,
        **changes,
      }
    )
    return Run(config, workdir, (stage,), tmp_path / 'out')

  return run


def images_of_jax_alone(path, given, folder):
  """Returns what the file draws in a process that has neither this package nor its path."""
  np.savez(folder / 'given.npz', **given)
  environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
  command = [sys.executable, '-c', ALONE, str(path), str(folder / 'given.npz'), str(folder / 'images.npy')]
  subprocess.run(command, cwd=folder, env=environment, check=True)
  return np.load(folder / 'images.npy')


@pytest.mark.slow
def test_the_file_draws_what_the_stage_draws_without_this_package(run, tmp_path, capsys):
  asked = run('refiner')
  export.mode(asked)
  path = tmp_path / 'out' / 'refiner.stablehlo'
  about = json.loads(path.with_suffix('.json').read_text())
  assert about['sha256'] == hashlib.sha256(path.read_bytes()).hexdigest()
  assert about['platforms'] == 'cpu, cuda, tpu' and about['jax'] == jax.__version__
  assert list(about['inputs']) == ['noise', 'z'] and about["id of the stage 'refiner'"]
  assert 'max_difference' in capsys.readouterr().out

  stage = Trained(asked.config, asked.workdir, 'refiner', sharding.make_mesh(asked.config.mesh))
  indices = np.arange(5)  # another size than the one it was compared with
  images = images_of_jax_alone(path, exported.starts(stage, indices), tmp_path)
  wanted = stage.draw(indices)['x0'].astype(np.float32)
  assert images.dtype == np.float32 and abs((images + 1) * 127.5 - wanted).max() <= 0.51


def test_bytes_of_a_decoder_for_one_size(run, tmp_path):
  asked = run('vae', **{'export.output': 'uint8', 'export.any_batch': False, 'export.platforms': ('cpu',)})
  export.mode(asked)
  path = tmp_path / 'out' / 'vae.stablehlo'
  program = jax.export.deserialize(bytearray(path.read_bytes()))
  stage = Trained(asked.config, asked.workdir, 'vae', sharding.make_mesh(asked.config.mesh))
  given = exported.starts(stage, np.arange(2))
  images, wanted = np.asarray(program.call(given)), list(stage.draw(np.arange(2)).values())[-1]
  assert images.dtype == np.uint8 and abs(images.astype(int) - wanted).max() <= 1
  assert program.platforms == ('cpu',) and json.loads(path.with_suffix('.json').read_text())['stage'] == 'vae'


@pytest.mark.slow
@pytest.mark.parametrize(
  ('weights', 'activations', 'kind'), [('int8', 'float32', np.int8), ('int4', 'int8', np.uint8)]
)
def test_a_quantized_stage_is_exported_as_it_is_stored(
  run, trained, tmp_path, monkeypatch, weights, activations, kind
):
  """The file has whole numbers in every layer, those of 4 bits packed, with products of them and without."""
  workdir = trained('digits').copy(tmp_path / 'run')
  config = run('vae').config
  config.update_from_flattened_dict(
    {
      'quantize.stage': 'vae',
      'quantize.weights': weights,
      'quantize.activations': activations,
      'quantize.num_images': 4,
      'export.platforms': ('cpu',),
      'export.any_batch': False,
    }
  )
  monkeypatch.setattr(integers, 'arithmetic', lambda: integers.PRODUCTS)
  stage = quantize.quantize(Run(config, workdir, ('vae',)))
  config = configs.read(workdir)
  config.export.update({'format': 'stablehlo', 'platforms': ('cpu',), 'any_batch': False})
  for form in ('stablehlo', 'safetensors'):
    config.export.format = form
    export.mode(Run(config, workdir, (stage,), tmp_path / 'out'))
  program = jax.export.deserialize(bytearray((tmp_path / 'out' / f'{stage}.stablehlo').read_bytes()))
  stored = Trained(config, workdir, stage, sharding.make_mesh(config.mesh), as_stored=True)
  given = exported.starts(stored, np.arange(config.export.batch_size))
  wanted = list(stored.draw(np.arange(config.export.batch_size)).values())[-1]
  assert abs((np.asarray(program.call(given)) + 1) * 127.5 - wanted).max() <= 0.51
  assert f'x{"ui8" if kind == np.uint8 else "i8"}>' in program.mlir_module()
  held = safetensors.numpy.load_file(tmp_path / 'out' / f'{stage}.safetensors')
  kernels = [value for name, value in held.items() if '.kernel_q' in name]
  assert kernels and all(value.dtype == kind for value in kernels)
  assert any(name.startswith('tables.kernel_scale') for name in held)


def test_a_file_that_draws_other_images_is_not_written(run, tmp_path, monkeypatch):
  monkeypatch.setattr(export_stablehlo, 'differences', lambda a, b: abs(a - b) + 2e-4)
  with pytest.raises(UserError, match=r"'vae' draws other images than the stage: .* 0.0001 is allowed"):
    export.mode(run('vae', **{'export.platforms': ('cpu',), 'export.num_images': 2}))
  assert not list((tmp_path / 'out').iterdir())


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'export.weights': 'int8'}, "config.export.weights is 'int8', which .*'stablehlo' does not have"),
    ({'export.platforms': ('tpu',)}, r"config.export.platforms is \('tpu',\) and this machine is cpu: add"),
    ({'export.platforms': ('cpu', 'npu')}, 'config.export.platforms'),
    ({'export.platforms': ()}, 'config.export.platforms'),
  ],
)
def test_settings_that_are_none_are_refused_by_name(run, changes, message):
  with pytest.raises(UserError, match=message):
    export.mode(run('vae', **changes))
