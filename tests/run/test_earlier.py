"""Configs that an earlier version stored: the files in `earlier` are its own, of configs/digits.py."""

import importlib
import json
import pathlib
import shutil
import sys

import pytest

from vaediff.errors import UserError
from vaediff.run import config as configs
from vaediff.run import earlier, same_run, students

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))


def now(variant):
  config = importlib.import_module('configs.digits').get_config(f'{variant},debug')
  return students.resolve(config)


@pytest.fixture(params=['distill', 'adversarial_refiner'])
def run(request, tmp_path):
  """Variant and folder of a run of the earlier version."""
  shutil.copy(HERE / 'earlier' / f'{request.param}.json', tmp_path / 'config.json')
  return request.param, tmp_path


def test_an_earlier_config_is_read_as_one_of_today(run):
  variant, workdir = run
  read, expected = configs.read(workdir), now(variant)
  assert read.data.num_classes == 0  # it was not said
  with expected.unlocked():
    expected.data.num_classes = 0
  # modes do what they did before, until they are told otherwise
  assert (read.restore.method, read.restore.num_samples, read.reconstruct.through) == ('condition', 1, '')
  new = ('quantize', 'export', 'vary', 'text_diff', 'edit', 'explore')
  for mode in ('restore', 'reconstruct', 'interpolate', *new):
    assert set(read[mode]) == set(expected[mode])
    expected[mode].update(read[mode])
  assert set(read.evaluate.decoders) == set(expected.evaluate.decoders)
  expected.evaluate.decoders.update(read.evaluate.decoders)  # those of a full size
  for field in ('num_captions', 'num_controls'):
    expected.evaluate[field] = read.evaluate[field]
  assert read == expected
  assert read.is_locked


def test_an_earlier_run_goes_on_with_the_config_file_of_today(run):
  variant, workdir = run
  config = now(variant)
  for stage in config.stages:
    place = workdir / stage / 'checkpoints' / '4' / 'meta'
    place.mkdir(parents=True)
    stored = json.loads((workdir / 'config.json').read_text())
    (place / 'metadata').write_text(json.dumps({'config': stored, 'frozen': {'vae': 4}}))
    same_run.check_stage(config, workdir / stage, stage, training=True)


def test_what_is_read_and_stored_is_read_again(run):
  _, workdir = run
  config = configs.read(workdir)
  configs.save(config, workdir)
  assert configs.read(workdir) == config


def test_all_classes_were_drawn_and_latents_were_not_clipped():
  for variant in ('unconditional,label', 'latent_diffusion,consistency', 'wavelet_diffusion'):
    expected = now(variant)
    stored = json.loads(expected.to_json())
    for section in stored.values():
      if isinstance(section, dict) and 'guidance' in section.get('sample', {}):
        assert section['sample'].pop('labels') == []
        section['sample']['clip'] = 'static'
    assert configs.from_stored(stored) == expected
    assert configs.from_stored(json.loads(expected.to_json())) == expected


def old(variant):
  return json.loads((HERE / 'earlier' / f'{variant}.json').read_text())


def test_a_config_from_before_there_were_levels_is_read_with_none(tmp_path):
  config = now('formulation2,distill')
  stored = json.loads(configs.to_json(config))
  for name in config.stages[1:]:
    del stored[name]['space_factor'], stored[name]['conditions']['vae'], stored[name]['sample']['aug_level']
  del stored['evaluate']['sweep']['aug_levels']
  assert configs.from_stored(stored) == config


def test_sections_that_the_stages_read_are_kept():
  config = old('adversarial_refiner')
  config['stages'] = ['ddgan']  # on the VAE of another run
  assert {'vae', 'ddgan'} <= earlier.upgrade(config).keys()
  assert not {'refiner', 'autoencoder', 'decoder', 'distill'} & config.keys()
  config = old('adversarial_refiner')
  config['stages'], config['ddgan']['space'] = ['ddgan'], 'latent'
  config['ddgan']['condition'], config['ddgan']['autoencoder']['decoder_stage'] = 'none', 'decoder'
  assert {'autoencoder', 'decoder', 'ddgan'} <= earlier.upgrade(config).keys()
  assert 'vae' not in config
  config = old('adversarial_refiner')
  config['stages'], config['refiner']['diffusion']['condition'] = ['refiner'], 'none'
  assert 'vae' not in earlier.upgrade(config)


def test_a_diffusion_of_before_the_learned_variance_is_what_it_was():
  """Its variance was fixed, its U-Net halved by convolutions, and clipping made another eps."""
  wanted = json.loads(json.dumps(now('distill').to_dict()))
  stored = json.loads(json.dumps(wanted))
  sections = [stored[name] for name in ('refiner', 'distill_2', 'distill_1')]
  for section in sections:
    del (
      section['diffusion']['variance'],
      section['model']['resblock_updown'],
      section['model']['head_channels'],
      section['model']['coordinates'],
      section['diffusion']['pca'],
    )
    del section['sample']['recompute_eps'], section['sample']['bound_steps']
    if section['experiment'] == 'diffusion':
      del section['loss']
  assert earlier.upgrade(stored) == wanted


@pytest.mark.parametrize(('variant', 'is_read'), [('divae', True), ('attention', False)])
def test_attention_to_tokens_that_knew_no_positions_is_refused(variant, is_read, tmp_path):
  config = importlib.import_module('configs.digits').get_config('divae,debug')
  if variant == 'attention':
    config.refiner.conditions.codes.how = 'attention'
  stored = json.loads(configs.to_json(config))
  (tmp_path / 'config.json').write_text(json.dumps(stored))
  assert configs.read(tmp_path).stages == config.stages  # of this version
  del stored['explore']
  (tmp_path / 'config.json').write_text(json.dumps(stored))
  if is_read:
    assert configs.read(tmp_path).stages == config.stages
    return
  with pytest.raises(UserError, match="^config.refiner.conditions.codes.how is 'attention', and the run"):
    configs.read(tmp_path)


def test_heads_of_earlier_versions_judge_maps_of_every_side_alike():
  stored = json.loads((HERE / 'earlier' / 'adversarial_refiner.json').read_text())
  stored['stages'] = ['vae', 'refiner', 'adversarial']
  assert 'renoise_side' not in stored['adversarial']['loss']
  assert earlier.upgrade(stored)['adversarial']['loss']['renoise_side'] == 0
