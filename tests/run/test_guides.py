"""A trained stage guided by other checkpoints: of the same run, or of another; which are refused."""

import json

import numpy as np
import pytest

from vaediff.errors import UserError
from vaediff.machine import sharding
from vaediff.modes import checked
from vaediff.run import checkpoint
from vaediff.run import config as configs
from vaediff.run.trained import Trained
from vaediff.storage import identity

GUIDE = {'refiner.sample.guide.stage': 'refiner', 'refiner.sample.guidance': (('guide', 2.0),)}
EARLIER = {**GUIDE, 'refiner.sample.guide.step': 2}
LOW = {'refiner.model.channels': 4, 'refiner.model.num_heads': 1}
"""Of another run: a smaller network, and the same VAE, since that is trained in the same way."""


def opened(run, mesh=None, **changes):
  config = configs.read(run)
  config.update_from_flattened_dict(changes)
  checked.complete(config)
  return Trained(config, run, 'refiner', sharding.make_mesh(config.mesh))


def images(trained):
  return trained.draw(np.arange(4))['x0']


@pytest.mark.slow
def test_an_earlier_checkpoint_of_the_same_run_guides(trained, one_device):
  run = trained('digits').run
  plain, guided = opened(run), opened(run, **EARLIER)  # chosen after training: nothing is stale
  assert np.any(images(plain) != images(guided))
  name = "the network 'guide'"
  assert guided.made_of[name] == checkpoint.identity_of(run / 'refiner', 2)
  assert guided.made_of[name] != guided.made_of["the stage 'refiner'"] and name not in plain.made_of
  stored = checkpoint.load_meta(run / 'refiner')['frozen']
  assert set(stored) == {'vae'}
  guide = {'stage': 'refiner', 'workdir': '', 'step': 2}
  again = plain.with_settings(guide=guide, guidance=(('guide', 2.0),))
  np.testing.assert_array_equal(images(again), images(guided))
  assert again.made_of == guided.made_of
  back = again.with_settings(guide={**guide, 'stage': ''}, guidance=())
  np.testing.assert_array_equal(images(back), images(plain))
  assert 'guide' not in back.read


def test_a_step_that_is_not_kept_is_refused(trained, one_device):
  run = trained('digits').run
  with pytest.raises(UserError, match='no checkpoint of step 3 in .*, which has those of steps 2, 4; how'):
    opened(run, **{**GUIDE, 'refiner.sample.guide.step': 3})


@pytest.mark.slow
def test_a_stage_does_not_guide_itself(trained, one_device):
  run = trained('digits').run
  with pytest.raises(UserError, match='latest checkpoint, which is the stage itself'):
    opened(run, **GUIDE)
  with pytest.raises(UserError, match="checkpoints/4, which is that of stage 'refiner' itself"):
    opened(run, **{**GUIDE, 'refiner.sample.guide.step': 4})
  with pytest.raises(UserError, match="checkpoints/4, which is that of stage 'refiner' itself"):
    opened(run, **{**GUIDE, 'refiner.sample.guide.workdir': str(run)})


@pytest.mark.slow
def test_a_smaller_network_of_another_run_guides(trained, one_device, tmp_path):
  run, other = trained('digits').run, trained('digits', **LOW)
  changes = {**GUIDE, 'refiner.sample.guide.workdir': str(other.run)}
  guided = opened(run, **changes)
  section = guided.config.refiner_guide
  assert section.model.channels == 4 and guided.config.refiner.model.channels == 8
  assert section.vae.workdir == str(other.run)
  assert np.any(images(opened(run)) != images(guided))
  # the config is stored with that section: --workdir alone draws the same
  copy = trained('digits').copy(tmp_path / 'copy')
  configs.save(guided.config, copy)
  np.testing.assert_array_equal(images(opened(copy)), images(guided))


@pytest.mark.slow
def test_one_trained_on_another_vae_is_refused(trained, one_device, tmp_path):
  run, folder = trained('digits').run, trained('digits', **LOW).copy(tmp_path / 'other')
  path = folder / 'refiner' / 'checkpoints' / '4' / 'meta' / 'metadata'
  meta = json.loads(path.read_text())
  meta['frozen']['vae'] = '0' * 16
  meta = {name: value for name, value in meta.items() if name != identity.SEAL}
  path.write_text(json.dumps(identity.sealed(meta)))
  with pytest.raises(identity.Stale, match="'guide', the checkpoint of .*refiner,.*the network 'vae'"):
    opened(run, **GUIDE, **{'refiner.sample.guide.workdir': str(folder)})


def test_a_run_that_is_not_there_is_refused(trained, one_device):
  with pytest.raises(UserError, match="guide.workdir is '/nowhere', which holds no trained stage 'refiner'"):
    opened(trained('digits').run, **GUIDE, **{'refiner.sample.guide.workdir': '/nowhere'})


@pytest.mark.slow
def test_a_run_of_other_classes_is_refused(trained, one_device):
  run, other = trained('digits').run, trained('digits', **LOW)
  config = configs.read(run)
  config.update_from_flattened_dict({**GUIDE, 'refiner.sample.guide.workdir': str(other.run)})
  config.data.num_classes = 9
  with pytest.raises(UserError, match='a run with data.num_classes = 10, but here it is 9'):
    checked.complete(config)
