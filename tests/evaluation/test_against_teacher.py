"""Pairs of images of one condition and two noises, and the temperature that both sides start with."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from vaediff.evaluation import against_teacher
from vaediff.run.trained import Trained


class Stub(Trained):
  """Draws numbers that say what they were made of: condition, noise and seed."""

  amplitude = 5  # of the noise in its pictures

  def __init__(self, log=None, **sample):
    self.stage, self.log = 'refiner', [] if log is None else log
    known = {'batch_size': 2, 'seed': 5, 'num_steps': 4, 'guidance_weight': 0.5, 'temperature': 1.0}
    self.config = ConfigDict({'refiner': {'sample': {**known, **sample}}})

  def with_settings(self, **changes):
    known = {name: value for name, value in changes.items() if name in self.settings}
    return Stub(self.log, **{**self.settings.to_dict(), **known})

  def draw_inputs(self, indices, seed):
    numbers = np.random.default_rng(seed).standard_normal((2, 100))
    return {'z': numbers[0, indices], 'noise': numbers[1, indices]}

  def draw(self, indices, given=None, seed=None):
    given = {**self.draw_inputs(indices, seed), **(given or {})}
    self.log.append((indices, given, seed, self.settings.temperature))
    value = 100 + 20 * given['z'] + self.amplitude * self.settings.temperature * given['noise']
    return {'x0': np.clip(value, 0, 255).astype(np.uint8)[:, None, None, None]}


def test_the_first_of_a_pair_is_the_sample_of_its_seed_and_the_second_has_its_condition():
  trained = Stub()
  first, second = against_teacher.pairs(trained, 5, 5)
  alone = np.concatenate([trained.draw(np.arange(k, min(k + 2, 5)), seed=5)['x0'] for k in (0, 2, 4)])
  np.testing.assert_array_equal(first, alone / 255)
  assert len(second) == 5 and np.any(first != second, axis=(1, 2, 3)).sum() > 3
  for one, two in zip(trained.log[0:6:2], trained.log[1:6:2], strict=True):
    np.testing.assert_array_equal(one[1]['z'], two[1]['z'])
    assert np.all(one[1]['noise'] != two[1]['noise'])
    assert one[2] == 5 and two[2] == 5 + against_teacher.SECOND_SEED


def test_the_teacher_starts_with_the_temperature_of_the_student():
  """A teacher whose pictures are drawn with 0.8 is no other teacher: the noise of both is the same."""
  root = Stub(temperature=0.8)
  teacher = against_teacher.Teacher(root, 4, 4)
  student = Stub()
  assert teacher.compare(student) == {'rmse to teacher': 0.0, 'diversity ratio': 1.0}
  assert {temperature for *_, temperature in root.log} == {1.0}


class Quiet(Stub):
  """Half of the noise of the others."""

  amplitude = 2.5


def test_a_student_that_leaves_noise_out_has_less_diversity_than_its_teacher():
  """Squares of half as much: a quarter, of the student over the teacher."""
  found = against_teacher.Teacher(Stub(), 4, 60).compare(Quiet())
  assert found['diversity ratio'] == pytest.approx(0.25, rel=0.1)
  noise = Stub().draw_inputs(np.arange(60), 5)['noise']
  assert found['rmse to teacher'] == pytest.approx(2.5 * np.sqrt(np.mean(noise**2)) / 255, rel=0.1)
