"""`--mode=import` writes a run that all other modes take for one of their own."""

import json

import jax
import numpy as np
import published
import pytest

from vaediff import experiments
from vaediff.data import sources
from vaediff.errors import UserError
from vaediff.machine import sharding
from vaediff.modes import adopt, explore, export, sample, train
from vaediff.modes.explore_wishes import DRAWN, UPLOAD, Choice, End
from vaediff.run import adopting, checkpoint, loop, measurements
from vaediff.run import config as configs
from vaediff.run.config import Run
from vaediff.run.opened import Opened
from vaediff.run.published import exported
from vaediff.run.trained import Trained
from vaediff.weights import tensors

pytestmark = pytest.mark.slow
SAMPLING = 'diffusevae_sampling/sampling'


@pytest.fixture
def imported(tmp_path, one_device, capsys):
  """Returns the folder of a run made of DiffuseVAE's second stage."""
  config = published.config_of(published.STAGE2, **{'data.data_dir': str(tmp_path / 'data')})
  adopt.mode(Run(config, tmp_path / 'run', tuple(config.stages)))
  return tmp_path / 'run'


def test_an_imported_run_is_sampled_and_exported(imported, tmp_path, capsys):
  out = capsys.readouterr().out
  assert 'licence: MIT' in out and 'left out: 18 of tables of the noise schedule' in out
  assert {path.name for path in imported.iterdir()} == {'config.json', 'vae', 'refiner'}
  meta, record = checkpoint.load_meta(imported / 'refiner'), imported / 'refiner' / adopting.RECORD
  assert meta[adopting.IMPORTED] == json.loads(record.read_text())
  config = configs.read(imported)
  with pytest.raises(UserError, match='is not empty'):
    adopt.mode(Run(config, imported, tuple(config.stages)))

  sample.mode(Run(config, imported, ('refiner',)))
  assert list(imported.rglob('*.png'))
  stored = published.tensors_of(published.file_of(published.STAGE2))
  for names in ('official', 'vaediff'):
    config.export.update({'format': 'safetensors', 'names': names})
    export.mode(Run(config, imported, ('refiner',), tmp_path / names))
    made, about = tensors.load(tmp_path / names / 'refiner.safetensors')
    assert about['family'] == 'diffusevae_unet_openai' and about['names'] == names
    if names == 'official':
      for name, value in made.items():
        np.testing.assert_array_equal(value, stored[f'target_network.decoder.{name}'])
    else:
      kernel = stored['target_network.decoder.out.2.weight']
      np.testing.assert_array_equal(made['conv_out.kernel'], kernel.transpose(2, 3, 1, 0))


def test_an_imported_run_is_explored(imported):
  config = configs.read(imported)
  config.explore.update({'num_directions': 0, 'num_encoded': 16})
  explorer, first = explore.open_run(Run(config, imported, ('refiner',)))
  offer, wish = explorer.offer(first), Choice(stage=first, num_steps=2).wish()
  assert first == 'refiner' and set(offer.ends) >= {DRAWN, UPLOAD}
  drawn = explorer.draw(wish).images
  other = explorer.draw(Choice(stage=first, num_steps=2, ends=[End(seeds={'z': 3}), End()]).wish()).images
  assert {'x0', 'x0_vae'} <= set(drawn)
  assert not np.array_equal(drawn['x0_vae'], other['x0_vae'])


def test_an_imported_stage_is_trained_on(imported):
  config, mesh = configs.read(imported), sharding.make_mesh(configs.read(imported).mesh)
  assert all(train.is_complete(config, imported, stage) for stage in config.stages)
  refiner = experiments.build(config, 'refiner')
  assert train.finished(refiner, config, imported, 'refiner')['steps'] == 17
  config.refiner.train.update({'num_steps': 18, 'grid_every_steps': 0, 'eval_every_steps': 100})
  images = {split: sources.open_source(config.data, split) for split in ('train', 'eval')}
  summary = train.train_stage(refiner, config, imported, 'refiner', images, mesh)
  assert summary['steps'] == 18 and np.isfinite(summary['last']['loss'])
  assert loop.read_summary(imported / 'refiner')['steps'] == 18


@pytest.mark.parametrize(('kind', 'form'), [('uniform', 1), ('quad', 2)])
def test_samples_are_those_of_the_official_code(tmp_path, one_device, kind, form):
  config = published.config_of(SAMPLING, **{'refiner.vae.workdir': ''})
  config.adopt.path = f'{config.adopt.path},{fresh_vae(tmp_path, config)}'
  config.refiner.diffusion.condition = f'formulation{form}'
  adopt.mode(Run(config, tmp_path / 'run', tuple(config.stages)))

  config, data = configs.read(tmp_path / 'run'), published.arrays_of(SAMPLING)
  grid = {'uniform': 'published_uniform', 'quad': 'published_quadratic'}[kind]
  config.refiner.sample.update({'sampler': 'ddim', 'num_steps': 10, 'grid': grid})
  trained = Trained(config, tmp_path / 'run', 'refiner', sharding.make_mesh(config.mesh))
  given = {'noise': data['noise'], 'x0_vae': data['x0_vae']}
  images = list(trained.draw(np.arange(2), given).values())[-1].astype(np.float32)
  wanted = np.clip(data[f'ddim_{kind}_form{form}'], -1, 1)
  assert np.std(wanted) > 0.3  # they are no grey
  assert np.max(np.abs(images - np.rint(127.5 * (wanted + 1)))) <= 1


def fresh_vae(folder, config):
  """Returns a file of a VAE of the config's size, as it begins, under its published names."""
  model = experiments.build(config, 'vae').vae
  params = published.flat(jax.jit(model.init)(jax.random.key(0)))
  family = exported.family_of(config, 'vae', 'vae')
  path = folder / 'vae.safetensors'
  tensors.save(path, exported.official(config, 'vae', family, params), {'family': family.name})
  return path


def test_latents_are_divided_by_a_constant_as_if_it_had_been_measured(tmp_path, one_device):
  config = published.config_of('ldm_autoencoder_vq/vq')
  plan = adopting.planned(config, tuple(config.stages))
  plan.scales['autoencoder'] = 105.0
  adopting.write(plan, tmp_path / 'run')
  folder = tmp_path / 'run' / 'autoencoder'
  target = measurements.Target(
    config=plan.config,
    stage='autoencoder',
    folder=folder,
    opened=Opened('autoencoder', folder),
    mesh=sharding.make_mesh(plan.config.mesh),
  )
  found = measurements.latents(target)
  np.testing.assert_array_equal(found['max'], np.full(3, 105, np.float32))
  np.testing.assert_array_equal(found['min'], np.full(3, -105, np.float32))
