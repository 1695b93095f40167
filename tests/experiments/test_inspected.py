"""A guidance weight that is given, and what stands beside a sample: of which stages."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from configs import digits
from vaediff import experiments
from vaediff.experiments import inspected
from vaediff.run import students


def build(variant, stage='refiner', **changes):
  config = digits.get_config(f'{variant},debug')
  config.update_from_flattened_dict(changes)
  return experiments.build(students.resolve(config), stage)


def test_a_weight_becomes_an_input_that_no_network_reads():
  before = build('label', **{'refiner.conditions.label.dropout': 0.1, 'refiner.sample.guidance_weight': 1.5})
  after = inspected.with_free_weight(before)
  assert set(after.inputs) - set(before.inputs) == {'guidance'}
  assert after.conditions.ports == before.conditions.ports
  # those before it keep their places, and so their keys
  assert after.conditions.each[:-1] == before.conditions.each
  assert after.conditions.droppable == before.conditions.droppable
  assert after.num_function_evaluations == before.num_function_evaluations
  given = after.conditions.each[-1].draw({}, jax.random.split(jax.random.key(0), 3), jnp.arange(3))
  assert given['guidance'].tolist() == [1.5] * 3
  assert dataclasses.replace(after.denoiser, conditions=before.conditions) == before.denoiser


@pytest.mark.parametrize(
  ('variant', 'stage'), [('formulation1', 'refiner'), ('latent', 'ddgan'), ('', 'vae')]
)
def test_what_cannot_be_guided_stays_as_it_is(variant, stage):
  before = build(variant, stage) if variant else experiments.build(digits.get_config('debug'), stage)
  assert inspected.with_free_weight(before) is before
