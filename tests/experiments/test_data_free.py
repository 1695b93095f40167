"""The share of a batch that progressive distillation makes without data."""

import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest
from some_slow import some_slow

from vaediff import experiments
from vaediff.experiments import base, progressive
from vaediff.run import students

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parent.parent.parent)]
from random_parameters import frozen_of, made  # noqa: E402


def build(variant='distill,debug', stage='distill_2', **changes):
  config = importlib.import_module('configs.digits').get_config(variant)
  config.update_from_flattened_dict(changes)
  return experiments.build(students.resolve(config), stage)


@pytest.mark.parametrize(
  ('fraction', 'batch_size', 'microbatches', 'count'),
  some_slow(
    [(0.05, 64, 16, 3), (0.05, 64, 1, 3), (0.5, 8, 4, 4), (0.3, 8, 4, 2), (0.01, 8, 4, 1)], 0.5
  ),
)
def test_the_share_free_of_data_is_that_of_the_whole_batch(fraction, batch_size, microbatches, count):
  """.05 of 64 images in parts of 4 was one image of each part: 16, not 3."""
  changes = {
    'distill.data_free_fraction': fraction,
    'distill.train.batch_size': batch_size,
    'distill.train.microbatches': microbatches,
  }
  experiment = build(stage='distill_1', **changes)
  read = {**frozen_of(experiment), 'denoiser': made(experiment.student.denoiser.model, 7)}
  batch = experiment.marked({'image': jnp.zeros((batch_size, 8, 8, 1), jnp.uint8)})
  assert int(batch[progressive.FREE].sum()) == count

  def loss_fn(params, rows, key):
    zeros = jnp.zeros((batch_size // microbatches, 8, 8, 1))
    values = {'x0_vae': zeros + 7.0}  # what an image would have; decode(z) is in [-1, 1]
    _, mixed, _, _ = experiment.states(read, zeros, values, key, rows[progressive.FREE])
    changed = jnp.any(mixed['x0_vae'] != 7.0, axis=(1, 2, 3))
    return 0.0 * params['w'], {'free': jnp.mean(changed)}

  _, found = jax.jit(lambda: base.gradients(loss_fn, {'w': 1.0}, batch, jax.random.key(0), microbatches))()
  assert float(found['free']) * batch_size == pytest.approx(count)


@pytest.mark.slow
def test_labels_free_of_data_are_not_the_first_classes_alone():
  """One example free of data at each update was always of class 0."""
  experiment = build('label,distill,debug')
  read = frozen_of(experiment)
  drawn = {
    int(experiment.drawn_values(read, jax.random.key(seed), 1)['label'][0]) for seed in range(40)
  }
  assert len(drawn) > 5
