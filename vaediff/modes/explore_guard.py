"""What stands before the page: requests of this machine's own pages alone, of a limited size.

A page of another site that is open in the same browser can reach localhost too. It is told apart by the
header Host, which names what the browser believes to speak with, and by Origin, which names the page that
asks. Both are checked before anything else is read. An ASGI middleware; no library of pages is imported.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

LOCAL = ('localhost', '127.0.0.1', '::1')
OVERHEAD = 2**16
"""Bytes of a request around the file that it carries."""
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class TooLarge(Exception):
  """A request whose body is larger than it may be, and did not say so."""


class Guard:
  """An application behind the guard.

  Args:
    app: what answers requests that may pass.
    max_bytes: of a file in a request.
  """

  def __init__(self, app: App, max_bytes: int):
    self._app, self._most = app, max_bytes + OVERHEAD

  async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
    """Answers a request, or refuses it: 403 for a foreign one, 413 for one that is too large."""
    if scope['type'] not in ('http', 'websocket'):
      return await self._app(scope, receive, send)
    headers = {name.decode('latin-1').lower(): value.decode('latin-1') for name, value in scope['headers']}
    if not is_own(headers):
      return await refuse(scope, receive, send, 403, 'this page is for the browser of this machine alone')
    length = headers['content-length'] if 'content-length' in headers else '0'
    if not length.isdecimal() or int(length) > self._most:
      return await refuse(scope, receive, send, 413, f'a request may have {self._most:,} bytes')
    return await self._counted(scope, receive, send)

  async def _counted(self, scope: Message, receive: Receive, send: Send) -> None:
    """Answers a request whose body is counted as it comes: its length need not be said, or true."""
    count, has_begun = 0, False

    async def counting() -> Message:
      nonlocal count
      message = await receive()
      if message['type'] == 'http.request':
        count += len(message['body']) if 'body' in message else 0
        if count > self._most:
          raise TooLarge
      return message

    async def noting(message: Message) -> None:
      nonlocal has_begun
      has_begun = True
      await send(message)

    try:
      await self._app(scope, counting, noting)
    except TooLarge:
      if not has_begun:
        await refuse(scope, receive, send, 413, f'a request may have {self._most:,} bytes')


def is_own(headers: MutableMapping[str, str]) -> bool:
  """Returns whether a request is of a page of this machine: Host is local, and Origin, if any, equal."""
  host = headers['host'] if 'host' in headers else ''
  try:
    if urlsplit(f'//{host}').hostname not in LOCAL:
      return False
    return 'origin' not in headers or urlsplit(headers['origin']).netloc == host
  except ValueError:  # brackets that do not match
    return False


async def refuse(scope: Message, receive: Receive, send: Send, status: int, why: str) -> None:
  """Sends a refusal."""
  if scope['type'] == 'websocket':
    await receive()
    await send({'type': 'websocket.close', 'code': 1008, 'reason': why})
    return
  headers = [(b'content-type', b'text/plain; charset=utf-8'), (b'connection', b'close')]
  await send({'type': 'http.response.start', 'status': status, 'headers': headers})
  await send({'type': 'http.response.body', 'body': why.encode()})
