"""Locks in buckets: one holder; who is gone is succeeded at once or after patience; who has lost it ends."""

import json
import threading
import time

import memory_bucket
import pytest

from vaediff.errors import UserError
from vaediff.storage import buckets, files, leases
from vaediff.storage.buckets import BucketPath


@pytest.fixture
def folder(monkeypatch):
  store = memory_bucket.Store()
  monkeypatch.setattr(buckets, 'filesystem', lambda scheme: store)
  monkeypatch.setattr(leases, 'RENEW_SECONDS', 0.02)
  monkeypatch.setattr(leases, 'PATIENCE_SECONDS', 0.4)
  return BucketPath('s3://bucket/run')


def left_by(folder, **facts):
  (folder / files.LOCK).put(json.dumps({'holder': 'process 1 on host a', 'token': 'x', **facts}).encode())


def test_a_second_is_refused_while_the_first_renews(folder):
  with files.lock(folder, 'a test') as waited:
    assert not waited
    begun = time.monotonic()
    with pytest.raises(UserError, match=r'bucket/run is in use by process \d+ on host \S+ \(a test\)'):
      with files.lock(folder, 'another'):
        pass
    assert time.monotonic() - begun < 0.35
  assert not (folder / files.LOCK).exists()


def test_one_that_was_killed_is_succeeded_after_patience(folder, capsys):
  left_by(folder)
  begun = time.monotonic()
  with files.lock(folder, 'a test') as waited:
    assert waited and time.monotonic() - begun > 0.3
  assert 'process 1 on host a has not moved for 0.4 s; its lock is taken over' in capsys.readouterr().err


def test_one_of_this_machine_that_is_gone_is_succeeded_at_once(folder):
  here = leases.whereabouts()
  if not here['place']:
    pytest.skip('this system does not say where a number of a process means it')
  assert not leases.is_gone(here) and not leases.is_gone({**here, 'pid': 2**22 + 1, 'place': 'elsewhere'})
  left_by(folder, **{**here, 'pid': 2**22 + 1})
  begun = time.monotonic()
  with files.lock(folder, 'a test') as waited:
    assert not waited and time.monotonic() - begun < 0.3


def test_who_waits_gets_it_when_the_first_ends(folder):
  held, ended = threading.Event(), threading.Event()

  def hold():
    with files.lock(folder, 'first'):
      held.set()
      ended.wait()

  thread = threading.Thread(target=hold)
  thread.start()
  held.wait()
  threading.Timer(0.2, ended.set).start()
  with files.lock(folder, 'second', wait=True) as waited:
    assert waited and ended.is_set()
  thread.join()


def test_who_finds_another_there_ends(folder, monkeypatch, capsys):
  status = []
  monkeypatch.setattr(leases.os, '_exit', status.append)
  with files.lock(folder, 'a test'):
    left_by(folder)
    until = time.monotonic() + 5
    while not status and time.monotonic() < until:
      time.sleep(0.01)
  assert status[0] == leases.LOST
  assert 'bucket/run is held by process 1 on host a now' in capsys.readouterr().err


def test_a_store_that_does_not_answer_is_said(folder, monkeypatch):
  buckets.filesystem('s3').broken = True
  with pytest.raises(UserError, match='s3://bucket/run cannot be written: the store does not answer'):
    with files.lock(folder, 'a test'):
      pass


def test_a_lock_whose_answer_was_lost_is_held(folder, monkeypatch):
  create = BucketPath.create
  monkeypatch.setattr(BucketPath, 'create', lambda path, content: create(path, content) and False)
  begun = time.monotonic()
  with files.lock(folder, 'a test') as waited:
    assert not waited and time.monotonic() - begun < 0.3
