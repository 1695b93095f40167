"""The grids of Improved DDPM, guided diffusion and DiffuseVAE."""

import numpy as np
import pytest

from vaediff.diffusion import grids, schedules
from vaediff.errors import UserError

LINEAR = schedules.LinearBeta()
BOTH_ENDS_25 = (
  0, 42, 83, 125, 166, 208, 250, 291, 333, 375, 416, 458, 500, 541, 583, 624, 666, 708, 749, 791, 832, 874,
  916, 957, 999,
)  # fmt: skip


def indices(kind, num_steps, schedule=LINEAR):
  times = grids.time_grid(schedule, kind, num_steps)
  assert times[-1] == 0
  assert np.all(np.diff(times) < 0)
  return np.rint(times[:-1][::-1] * schedule.train_steps - 1).astype(int)


def new_betas(kind, num_steps):
  times = grids.time_grid(LINEAR, kind, num_steps)[::-1]
  return LINEAR.beta(times[:-1], times[1:])


def test_both_ends():
  assert indices('both_ends', 25).tolist() == list(BOTH_ENDS_25)
  assert indices('both_ends', 2).tolist() == [0, 999]
  assert grids.time_grid(LINEAR, 'both_ends', 1).tolist() == [1.0, 0.0]
  part = grids.time_grid(LINEAR, 'both_ends', 3, 0.5)
  np.testing.assert_allclose(part, [0.5, 0.251, 0.001, 0], atol=1e-12)


@pytest.mark.parametrize(
  ('kind', 'num_steps', 'second', 'last'),
  [
    ('both_ends', 25, 0.0219502840, 0.564394192),
    ('leading', 25, 0.0201350895, 0.532601823),
    ('both_ends', 50, 0.00616518795, 0.329809066),
    ('both_ends', 250, 0.000599065565, 0.077519345),
  ],
)
def test_betas_of_fewer_steps(kind, num_steps, second, last):
  betas = new_betas(kind, num_steps)
  np.testing.assert_allclose(betas[[0, 1, -1]], [1e-4, second, last], rtol=2e-9)


@pytest.mark.parametrize('kind', ['leading', 'published_uniform'])
def test_strides(kind):
  assert indices(kind, 25).tolist() == list(range(0, 1000, 40))
  assert indices(kind, 10).tolist() == list(range(0, 1000, 100))
  assert indices(kind, 1000).tolist() == list(range(1000))
  counts = []
  for number in range(2, 1001):
    try:
      counts.append(len(indices(kind, number)))
      assert counts[-1] == number
    except UserError:
      continue
  assert len(counts) == 62
  assert not {37, 41, 43, 45, 47, 49} & set(counts)
  with pytest.raises(UserError, match=r'num_steps is 37, but no stride .* near it 36 and 38 exist'):
    indices(kind, 37)


def test_the_field_of_the_steps_is_named():
  for kind, number in (('leading', 41), ('published_quadratic', 1001), ('uniform', 0)):
    with pytest.raises(UserError, match=rf'^sample.bound_steps (is|must be) .*{number}'):
      grids.time_grid(LINEAR, kind, number, field='sample.bound_steps')


def test_quadratic_has_each_index_once():
  assert indices('published_quadratic', 10).tolist() == [0, 9, 39, 88, 158, 246, 355, 483, 632, 800]
  assert len(indices('published_quadratic', 50)) == 49
  assert len(indices('published_quadratic', 100)) == 96


@pytest.mark.parametrize('kind', sorted(grids.PUBLISHED_GRIDS))
def test_what_published_grids_cannot(kind):
  with pytest.raises(UserError, match='needs a table of times'):
    grids.time_grid(schedules.Cosine(), kind, 10)
  with pytest.raises(UserError, match=r'sample.t_start must be 1 and t_end 0, got 0.5 and 0'):
    grids.time_grid(LINEAR, kind, 10, 0.5)
  for number in (1, 1001):
    with pytest.raises(UserError, match=rf'num_steps must be in 2 ... 1000 .* got {number}'):
      grids.time_grid(LINEAR, kind, number)
