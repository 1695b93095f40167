"""A chain of stages: what is given to the last reaches those that read it, and what each part costs."""

import time
import types

import jax
import jax.numpy as jnp
import pytest

from vaediff.run import chain

struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)


def stage(name, inputs, before=None, cost=1):
  """A stage that one other feeds, or none."""
  makers = (before,) if before else ()
  experiment = types.SimpleNamespace(inputs=inputs, makers=makers, num_function_evaluations=cost)
  return types.SimpleNamespace(
    experiment=experiment, stage=name, workdir='', has_maker=lambda source: True, maker=lambda source: source,
    spent=chain.Spent(),
  )  # fmt: skip


def test_inputs_are_those_of_all_stages_and_the_nearest_of_a_name():
  prior = stage('prior', {'tokens': struct(3), 'noise': struct(8)}, cost=4)
  decoder = stage('decoder', {'embedding': struct(8), 'noise': struct(4, 4)}, prior, cost=10)
  larger = stage('larger', {'low': struct(4, 4), 'noise': struct(8, 8)}, decoder, cost=5)
  found = chain.inputs_of(larger)
  assert set(found) == {'tokens', 'embedding', 'low', 'noise'}
  assert found['noise'] == struct(8, 8) and chain.inputs_of(decoder)['noise'] == struct(4, 4)
  assert [one.stage for one in chain.stages_of(larger)] == ['prior', 'decoder', 'larger']
  rows = chain.cost_rows(larger)
  assert [row['network evaluations per image'] for row in rows] == [4, 10, 5]
  assert chain.cost_rows(prior)[0]['seconds per image'] is None


def test_the_first_batch_is_left_out_of_the_seconds_per_image():
  one = stage('one', {})
  for seconds, count in ((0.05, 2), (0.02, 4)):
    with one.spent.on(count):
      time.sleep(seconds)
  (row,) = chain.cost_rows(one)
  assert row['images drawn'] == 6 and row['of them in the first batch'] >= 0.05
  assert row['seconds'] >= 0.07 and row['seconds per image'] == pytest.approx(0.02 / 4, abs=0.004)
