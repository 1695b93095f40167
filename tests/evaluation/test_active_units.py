"""Which units of z are in use: the variance of the posterior's mean over images, not its deviation."""

import numpy as np

from vaediff.evaluation import likelihoods


def test_a_unit_is_active_where_the_variance_of_its_mean_is_above_a_hundredth():
  """Deviations of 0, 0.05, 0.09, 0.11 and 1, around 3."""
  signs = np.array([1.0, -1.0, 1.0, -1.0])[:, None]
  mean = 3.0 + signs * np.array([0.0, 0.05, 0.09, 0.11, 1.0])
  assert likelihoods.active_units(mean) == 2
  assert likelihoods.active_units(mean[:, :3]) == 0
