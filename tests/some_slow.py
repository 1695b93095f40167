"""Of many cases of one test some are tested by default, the others with `-m slow`."""

import pytest


def some_slow(cases, *quick):
  """Returns the cases for `parametrize`; slow is each that neither is among `quick` nor begins with one."""

  def is_quick(case):
    return case in quick or (isinstance(case, tuple) and case[0] in quick)

  def marked(case):
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)

  found = [case if is_quick(case) else marked(case) for case in cases]
  assert any(is_quick(case) for case in cases), f'none of {quick} is a case'
  return found
