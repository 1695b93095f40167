"""Requests that the page answers, and those that it refuses, whoever sends them."""

import asyncio

import pytest

from vaediff.modes import explore_guard

OWN = {'host': 'localhost:8080'}


def answered(headers, body=(), kind='http', most=100, reads=True):
  """The status of the answer, or None where the application saw it to its end; 'closed' of a web socket."""
  sent, parts = [], [{'type': 'http.request', 'body': part, 'more_body': True} for part in body]

  async def app(scope, receive, send):
    while reads and parts:
      await receive()

  async def receive():
    return parts.pop(0) if parts else {'type': 'websocket.connect'}

  async def send(message):
    sent.append(message)

  scope = {'type': kind, 'headers': [(name.encode(), value.encode()) for name, value in headers.items()]}
  asyncio.run(explore_guard.Guard(app, most)(scope, receive, send))
  if not sent:
    return None
  return sent[0]['status'] if kind == 'http' else sent[0]['type']


@pytest.mark.parametrize(
  'headers',
  [
    OWN,
    {'host': '127.0.0.1:9'},
    {'host': '[::1]:8080'},
    {**OWN, 'origin': 'http://localhost:8080'},
    {**OWN, 'content-length': '100'},
  ],
)
def test_the_browser_of_this_machine_is_answered(headers):
  assert answered(headers) is None


@pytest.mark.parametrize(
  'headers',
  [
    {},
    {'host': 'evil.example'},
    {'host': 'localhost.evil.example:8080'},
    {'host': '127.0.0.1.evil.example'},
    {'host': '[::1'},
    {**OWN, 'origin': 'http://evil.example'},
    {**OWN, 'origin': 'http://localhost:3000'},
    {**OWN, 'origin': 'null'},
  ],
)
@pytest.mark.parametrize(('kind', 'wanted'), [('http', 403), ('websocket', 'websocket.close')])
def test_pages_of_other_sites_are_refused(headers, kind, wanted):
  assert answered(headers, kind=kind) == wanted


@pytest.mark.parametrize('length', ['70000', '-1', 'many'])
def test_a_request_that_says_it_is_too_large_is_refused_unread(length):
  assert answered({**OWN, 'content-length': length}, reads=False) == 413


def test_one_that_does_not_say_so_is_counted():
  part = b'x' * 2**14
  assert answered(OWN, body=[part] * 4) is None
  assert answered(OWN, body=[part] * 5) == 413
  assert answered({**OWN, 'content-length': '5'}, body=[part] * 5) == 413
