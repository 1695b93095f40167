"""The mode: what it refuses before a page is there."""

import importlib.util
import pathlib
import socket

import pytest

from configs import digits
from vaediff.errors import UserError
from vaediff.modes import explore
from vaediff.run.config import Run


def run_of(folder, **changes):
  config = digits.get_config('debug')
  config.update_from_flattened_dict({f'explore.{name}': value for name, value in changes.items()})
  return Run(config, pathlib.Path(folder), tuple(config.stages))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'port': 0}, r'config.explore.port must be in \[1, 65535\]'),
    ({'num_points': 1}, 'config.explore.num_points'),
  ],
)
def test_settings_that_cannot_be(changes, message, tmp_path):
  with pytest.raises(UserError, match=message):
    explore.mode(run_of(tmp_path, **changes))


def test_without_the_library_its_extra_is_named(tmp_path, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"by nicegui, which is not installed: pip install -e '.\[explore\]'"):
    explore.mode(run_of(tmp_path))


def test_a_run_without_a_trained_stage(tmp_path, monkeypatch, one_device):
  monkeypatch.setattr(explore, 'check_installed', lambda: None)
  with pytest.raises(UserError, match='has no trained stage that draws images among vae, refiner; train one'):
    explore.mode(run_of(tmp_path))


def test_a_port_that_is_taken():
  with socket.socket() as other:
    other.bind(('127.0.0.1', 0))
    other.listen()
    port = other.getsockname()[1]
    with pytest.raises(UserError, match=f'config.explore.port is {port}, which cannot be listened to'):
      explore.check_port(port)
  explore.check_port(port)
