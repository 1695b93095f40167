"""How data that cannot be used are refused: in both ways of opening them, and nothing is left."""

import pathlib

import pytest

from vaediff.data.sources import open_source
from vaediff.errors import UserError


def refused(data, message, split='train'):
  """Opens the data in both ways; asserts the message, and that nothing is left; returns it."""
  for materialize in (True, False):
    data.materialize = materialize
    with pytest.raises(UserError, match=message) as raised:
      open_source(data, split)
    left = pathlib.Path(data.data_dir) / 'vaediff'
    assert not left.is_dir() or not list(left.iterdir()), list(left.iterdir())
  return str(raised.value)
