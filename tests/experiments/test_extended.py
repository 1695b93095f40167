"""A diffusion that begins as a trained one: the parameters it starts with, who begins so, what is refused."""

import importlib
import pathlib
import sys

import jax
import numpy as np
import pytest

from vaediff import experiments
from vaediff.errors import UserError
from vaediff.experiments import extended
from vaediff.run import students

TESTS = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / 'experiments'), str(TESTS.parent)]
from random_parameters import made  # noqa: E402

ELSEWHERE = {'refiner.start.workdir': 'elsewhere'}


def config_of(variant, **changes):
  config = importlib.import_module('configs.shapes16').get_config(f'{variant},debug')
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return students.resolve(config)


def test_training_begins_with_the_parameters_of_the_other_run():
  experiment = experiments.build(config_of('unconditional', **ELSEWHERE), 'refiner')
  source = experiment.starts[extended.FIRST]
  assert (source.stage, source.workdir, source.section) == ('refiner', 'elsewhere', 'refiner')
  assert source.model == experiment.denoiser.model
  trained = made(source.model, 3)
  begin = jax.jit(lambda frozen: experiment.start(experiment.init(jax.random.key(0)), frozen))
  state = begin({extended.FIRST: trained})
  for params in (state.networks['denoiser'].params, state.eval_params['denoiser']):
    jax.tree.map(np.testing.assert_array_equal, params, trained)
  assert extended.FIRST not in experiment.frozen
  assert not experiments.build(config_of('unconditional'), 'refiner').starts


def test_students_and_controls_begin_as_they_do_anyway():
  config = config_of('text,consistency,control', **ELSEWHERE)
  assert extended.FIRST in experiments.build(config, 'refiner').starts
  for stage in ('consistency', 'control'):
    assert 'start' not in config[stage]
    assert not experiments.build(config, stage).starts


def test_each_stage_of_a_cascade_begins_as_the_one_of_its_name():
  config = config_of('cascade', **{'base.start.workdir': 'elsewhere', 'sr_16.start.workdir': 'elsewhere'})
  for stage in ('base', 'sr_16'):
    assert experiments.build(config, stage).starts[extended.FIRST].stage == stage


def test_a_network_that_is_trained_beside_it_is_refused():
  with pytest.raises(UserError, match="conditions.codes.training has another one trained beside it"):
    experiments.build(config_of('divae_joint', **ELSEWHERE), 'refiner')


def test_two_networks_to_begin_as_are_refused():
  with pytest.raises(UserError, match="refiner.start names 'elsewhere', and conditions.text.extends 'other'"):
    experiments.build(
      config_of('text', **ELSEWHERE, **{'refiner.conditions.text.extends.workdir': 'other'}), 'refiner'
    )
