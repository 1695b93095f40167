"""Losses of adversarial distillation, of heads and of a student that say what is written here."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaediff import experiments
from vaediff.experiments.adversarial_distillation import AdversarialDistillation
from vaediff.experiments.denoiser import Denoiser
from vaediff.run import students

MEANS = np.array([0.2, 0.6, -0.3, 0.9], np.float32)
X0 = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
X0 += MEANS[:, None, None, None] - X0.mean(axis=(1, 2, 3), keepdims=True)


class Opposite(Denoiser):
  """A student that draws the negative."""

  def x0_hat(self, read, values, without=()):
    return lambda y, t: jnp.asarray(-X0)


class ByMean(AdversarialDistillation):
  """One head, whose logit is the mean of the image itself."""

  def feature_maps(self, read, x0, values, t, eps):
    return [x0]

  def judge(self, params, t, maps):
    return [jnp.mean(x, axis=(1, 2, 3))[:, None] for x in maps]


def remade(known, kind, **changes):
  """Returns an object of a subclass with the same fields but for some."""
  fields = {field.name: getattr(known, field.name) for field in dataclasses.fields(known)}
  return kind(**{**fields, **changes})


@pytest.fixture(scope='module')
def losses():
  """By `r1_gamma`, the discriminator's loss and metrics."""
  config = importlib.import_module('configs.digits').get_config('unconditional,adversarial,debug')
  known = experiments.build(students.resolve(config), 'adversarial')
  student = dataclasses.replace(known.student, denoiser=remade(known.student.denoiser, Opposite))
  experiment = remade(known, ByMean, student=student)

  @functools.partial(jax.jit, static_argnums=0)
  def run(gamma):
    stage, rows = dataclasses.replace(experiment, r1_gamma=gamma), {'x0': jnp.asarray(X0), 'values': {}}
    probabilities = jnp.asarray(stage.start_probabilities)
    return stage.discriminator_loss({}, {}, rows, jax.random.key(6), probabilities)

  return {gamma: jax.device_get(run(gamma)) for gamma in (0.0, 10.0)}


def test_the_heads_are_to_say_more_of_the_data_than_of_the_student(losses):
  loss, metrics = losses[0.0]
  assert metrics['logits/real'] == pytest.approx(MEANS.mean(), abs=1e-5)
  assert metrics['logits/fake'] == pytest.approx(-MEANS.mean(), abs=1e-5)
  hinge = np.mean(np.maximum(0, 1 - MEANS) + np.maximum(0, 1 + -MEANS))
  assert loss == pytest.approx(hinge, abs=1e-5)
  assert metrics['loss/discriminator'] == loss and 'r1' not in metrics


def test_r1_is_added_with_its_weight(losses):
  """Of a mean of 64 pixels the slope has the square 1/64."""
  (without, _), (loss, metrics) = losses[0.0], losses[10.0]
  assert metrics['r1'] == pytest.approx(1 / 64)
  assert metrics['loss/discriminator'] == without
  assert loss - without == pytest.approx(10 / 64, abs=1e-5)
