"""Of many cases of one test some are tested by default, the others with `-m slow`."""

import pytest


def some_slow(cases, *quick):
  """Returns the cases for `parametrize`; slow is each that neither is among `quick` nor begins with one."""

  def names(one, case):
    return case == one or (isinstance(case, tuple) and case[0] == one)

  def marked(case):
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)

  assert quick, 'no case is quick'
  for one in quick:
    assert any(names(one, case) for case in cases), f'{one!r} is no case, nor does one begin with it'
  return [case if any(names(one, case) for one in quick) else marked(case) for case in cases]
