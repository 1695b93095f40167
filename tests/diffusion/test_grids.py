"""Time grids: exact ends and counts, distinct table points, and the three spacings."""

import numpy as np
import pytest

from vaediff.diffusion import samplers, schedules
from vaediff.errors import UserError

LINEAR = schedules.LinearBeta()
COSINE = schedules.Cosine()
GRIDS = sorted(samplers.GRIDS)


@pytest.mark.parametrize('ends', [(1.0, 0.0), (0.3, 0.0), (1.0, 0.002), (0.7, 0.1)])
@pytest.mark.parametrize('num_steps', [1, 2, 3, 10, 49, 50, 100, 250, 500, 999, 1000, 1500])
@pytest.mark.parametrize('kind', GRIDS)
def test_table_grids(kind, num_steps, ends):
  grid = samplers.time_grid(LINEAR, kind, num_steps, *ends)
  assert grid.dtype == np.float64
  assert len(grid) == num_steps + 1
  assert (grid[0], grid[-1]) == ends
  assert np.all(np.diff(grid) < 0)
  if num_steps <= round((ends[0] - ends[1]) * 1000):
    index = grid * 1000
    np.testing.assert_allclose(index, np.rint(index), atol=1e-9)


@pytest.mark.parametrize('kind', GRIDS)
def test_as_many_steps_as_the_table_is_the_whole_table(kind):
  grid = samplers.time_grid(LINEAR, kind, 1000)
  np.testing.assert_allclose(grid, np.arange(1000, -1, -1) / 1000, atol=1e-12)


@pytest.mark.parametrize('num_steps', [1, 2, 5, 64, 2000])
@pytest.mark.parametrize('kind', GRIDS)
@pytest.mark.parametrize('ends', [(1.0, 0.0), (0.001, 0.0), (0.9, 0.2)])
def test_continuous_grids(kind, num_steps, ends):
  grid = samplers.time_grid(COSINE, kind, num_steps, *ends)
  assert len(grid) == num_steps + 1
  assert (grid[0], grid[-1]) == ends
  assert np.all(np.diff(grid) < 0)


def test_spacings():
  grid = samplers.time_grid(COSINE, 'uniform', 8, 0.9, 0.1)
  np.testing.assert_allclose(np.diff(grid), -0.1, rtol=1e-9)
  grid = samplers.time_grid(COSINE, 'quadratic', 10)
  np.testing.assert_allclose(grid, np.linspace(1, 0, 11) ** 2, atol=1e-12)

  def level(t):
    return np.exp(-0.5 * COSINE.logsnr(t))

  roots = level(samplers.time_grid(COSINE, 'karras', 10, 0.9, 0.1)) ** (1 / 7)
  np.testing.assert_allclose(np.diff(roots), np.diff(roots)[0], rtol=1e-6)
  grid = samplers.time_grid(COSINE, 'karras', 18)
  assert level(grid[-2]) == pytest.approx(0.002, rel=1e-6)
  np.testing.assert_allclose(np.diff(level(grid[:-1]) ** (1 / 7), 2), 0, atol=1e-5)


def test_karras_on_a_table_ends_at_its_first_point():
  grid = samplers.time_grid(LINEAR, 'karras', 20)
  assert grid[-2] == 0.001
  assert grid[-3] > 0.001


def test_a_snapped_grid_stays_within_half_a_table_step_where_it_is_sparse():
  wanted = np.linspace(1, 0, 34)
  grid = samplers.time_grid(LINEAR, 'uniform', 33)
  assert np.max(abs(grid - wanted)) <= 0.0005 + 1e-12


@pytest.mark.parametrize(
  'options, message',
  [
    ({'kind': 'uniform', 'num_steps': 0}, r'sample\.num_steps must be >= 1, got 0'),
    ({'kind': 'log', 'num_steps': 4}, r"sample\.grid must be one of .*'uniform'.*got 'log'"),
    ({'kind': 'uniform', 'num_steps': 4, 't_start': 1.1}, r't_start=1.1'),
    ({'kind': 'uniform', 'num_steps': 4, 't_end': -0.1}, r't_end=-0.1'),
    ({'kind': 'uniform', 'num_steps': 4, 't_start': 0.5, 't_end': 0.5}, r'< t_start'),
  ],
)
def test_bad_grids(options, message):
  with pytest.raises(UserError, match=message):
    samplers.time_grid(LINEAR, **options)
