"""What a halving's loss weighs, and the guidance weights that its examples are drawn with."""

import dataclasses
import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vaediff import experiments
from vaediff.diffusion import schedules
from vaediff.optim import Optimizer
from vaediff.run import students

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import toy_denoiser  # noqa: E402


@pytest.fixture(scope='module')
def student():
  """A student of single predictions, with networks of slopes, and what it reads."""
  config = importlib.import_module('configs.digits').get_config('unconditional,distill,debug')
  built = experiments.build(students.resolve(config), 'distill_1')
  schedule = schedules.make_schedule('cosine')
  optimizer = Optimizer(transform=optax.identity(), ema_decay=0.0, ema_warmup=False)
  own, teacher = toy_denoiser.diffusion(built.student, schedule, optimizer)
  slopes = toy_denoiser.exact(schedule, 0.5)
  read = {'teacher': slopes, 'denoiser': {'slopes': slopes['slopes'] + 0.1}}
  return dataclasses.replace(built, student=own, teacher=teacher, num_steps=0), read


def test_the_error_of_x0_has_the_weight_of_the_config(student):
  experiment, read = student
  y0 = np.random.default_rng(0).normal(0, 0.5, (32, 8, 8, 1)).astype(np.float32)

  @jax.jit
  def each(y0):
    weighted = [dataclasses.replace(experiment, loss_weight=one) for one in ('truncated_snr', 'constant')]
    return [
      one.example_losses(read, {}, y0, {}, jax.random.key(5), jnp.int32(0), training=True) for one in weighted
    ]

  truncated, constant = (np.asarray(loss) for loss in each(y0))
  _, t = experiment.times(read, jax.random.split(jax.random.key(5), 5)[0], 32)
  schedule, t = experiment.student.denoiser.schedule, np.asarray(t, np.float64)
  snr = (schedule.alpha(t) / schedule.sigma(t)) ** 2
  assert np.sum(snr < 1) > 4 and np.sum(snr > 2) > 4
  np.testing.assert_allclose(truncated / constant, np.maximum(snr, 1), rtol=1e-3)


def test_guidance_weights_are_uniform_between_the_least_and_the_most(student):
  experiment, read = student
  guided = dataclasses.replace(experiment, guidance_weights=(0.5, 3.5))
  y0 = np.zeros((2000, 1, 1, 1), np.float32)
  _, values, _, _ = jax.jit(lambda y0, key: guided.states(read, y0, {}, key, None))(y0, jax.random.key(2))
  drawn = np.asarray(values['guidance'])
  assert drawn.shape == (2000,)
  assert drawn.min() == pytest.approx(0.5, abs=0.02) and drawn.max() == pytest.approx(3.5, abs=0.02)
  assert drawn.mean() == pytest.approx(2.0, abs=0.08) and drawn.std() == pytest.approx(3 / 12**0.5, abs=0.05)
