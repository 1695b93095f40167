"""How tests are spread over workers."""

import os

import pytest


@pytest.mark.xdist_group('together')
def test_tests_that_share_what_is_dear_stay_together(request):
  """Without it the same tests pass, in nearly twice the time: a worker takes a group whose name it sees."""
  if 'PYTEST_XDIST_WORKER' not in os.environ:
    pytest.skip('one process runs all')
  assert request.node.nodeid.endswith('@together'), 'pytest-xdist knows no groups with this version of pytest'
