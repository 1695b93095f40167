"""Which checkpoint is opened: by `sample.checkpoint` the latest, the best, or that of a step that is kept."""

import jax
import numpy as np
import pytest

from vaediff.errors import UserError
from vaediff.evaluation import evaluate, sets
from vaediff.machine import sharding
from vaediff.modes import checked
from vaediff.run import checkpoint
from vaediff.run import config as configs
from vaediff.run.trained import Trained


def opened(run, choice, **changes):
  config = configs.read(run)
  config.update_from_flattened_dict({'refiner.sample.checkpoint': choice, **changes})
  checked.complete(config)
  return Trained(config, run, 'refiner', sharding.make_mesh(config.mesh))


def test_a_step_that_is_kept_is_what_draws_and_what_is_said(trained, one_device):
  run = trained('digits').run
  latest, earlier = opened(run, 'latest'), opened(run, '2')
  assert (latest.step, earlier.step) == (4, 2)
  stage = "the stage 'refiner'"
  assert earlier.made_of[stage] == checkpoint.identity_of(run / 'refiner', 2) != latest.made_of[stage]
  (name, model), = earlier.experiment.networks.items()
  shapes = checkpoint.abstract_params(model, earlier.mesh)
  kept = checkpoint.load_frozen(run / 'refiner', name, shapes, step=2)
  jax.tree.map(np.testing.assert_array_equal, earlier.params[name], kept)
  assert np.any(earlier.draw(np.arange(4))['x0'] != latest.draw(np.arange(4))['x0'])
  header = evaluate.header(earlier)
  assert (header['checkpoint'], header['step']) == ('2', 2)
  assert sets.name_of(earlier) == sets.name_of(latest) + '-2'


@pytest.mark.slow
def test_a_step_is_opened_where_the_latest_is_damaged(trained, one_device, tmp_path):
  run = trained('digits').copy(tmp_path / 'run')
  images = opened(run, '2').draw(np.arange(2))['x0']
  latest = checkpoint.latest_folder(run / 'refiner')
  (latest / 'meta' / 'metadata').write_text('{')
  again = opened(run, '2')
  assert len(again.eval_source) and again.made_of
  np.testing.assert_array_equal(again.draw(np.arange(2))['x0'], images)
  with pytest.raises(checkpoint.DamagedCheckpoint):
    opened(run, 'latest')


def test_what_is_opened_stays_that_where_training_goes_on(trained, one_device, tmp_path):
  run = trained('digits').copy(tmp_path / 'run')
  found = opened(run, 'latest')
  own = checkpoint.identity_of(run / 'refiner', 4)
  (run / 'refiner' / 'checkpoints' / '4').rename(tmp_path / 'away')
  assert found.step == 4 and found.made_of["the stage 'refiner'"] == own
  assert opened(run, 'latest').step == 2


@pytest.mark.slow
def test_the_step_of_the_latest_is_the_latest(trained, one_device):
  run = trained('digits').run
  latest, same = opened(run, 'latest'), opened(run, '4')
  np.testing.assert_array_equal(same.draw(np.arange(4))['x0'], latest.draw(np.arange(4))['x0'])


def test_a_step_that_is_not_kept_is_refused_by_name(trained, one_device):
  run = trained('digits').run
  with pytest.raises(UserError, match='no checkpoint of step 3 in .*, which has those of steps 2, 4; how'):
    opened(run, '3')


@pytest.mark.slow
def test_an_earlier_checkpoint_may_be_guided_by_the_latest(trained, one_device):
  run = trained('digits').run
  guide = {'refiner.sample.guide.stage': 'refiner', 'refiner.sample.guidance': (('guide', 2.0),)}
  guided = opened(run, '2', **guide)
  assert guided.made_of["the network 'guide'"] == checkpoint.identity_of(run / 'refiner', 4)
  with pytest.raises(UserError, match="checkpoints/2, which is that of stage 'refiner' itself"):
    opened(run, '2', **{**guide, 'refiner.sample.guide.step': 2})
