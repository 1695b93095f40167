"""What a thing is and what it was made of, by content: whatever is derived knows its sources.

A saved state has an id made of its arrays, a split of a data set the fingerprint of all its bytes, a part of
a config a digest. What is derived stores those of all that it was made of, and they are compared when it is
read. Names, paths and step numbers are no identity.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from vaediff.errors import UserError

MadeOf = Mapping[str, str]
"""By name of a source, such as 'network vae' or 'training images', its id."""
DIGITS = 16
"""Of an id, hexadecimal."""
SEAL = 'digest'
"""In a JSON object: the digest of all else in it."""


class Stale(UserError):
  """What was made of other sources than those that are there now."""


def digest(value: Any) -> str:
  """Returns the digest of a value that JSON can hold; the order of keys does not matter."""
  text = json.dumps(value, sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what a JSON object holds, as it will be read, and under `SEAL` the digest of that."""
  plain = json.loads(json.dumps(content, default=str))
  return {**plain, SEAL: digest(plain)}


def unsealed(stored: Any) -> dict[str, Any]:
  """Returns what a sealed JSON object holds, without its digest.

  Raises:
    ValueError: when it is none, or was changed after it was written.
  """
  if not isinstance(stored, dict) or SEAL not in stored:
    raise ValueError('it does not hold what was written there')
  content = {name: value for name, value in stored.items() if name != SEAL}
  if digest(content) != stored[SEAL]:
    raise ValueError('it was changed after it was written: its digest is that of another content')
  return content


def of_parts(parts: Iterable[bytes]) -> str:
  """Returns the digest of bytes that come in pieces, wherever they are cut."""
  found = hashlib.sha256()
  for part in parts:
    found.update(part)
  return found.hexdigest()[:DIGITS]


def compare(what: str, stored: MadeOf, wanted: MadeOf, mend: str) -> None:
  """Does nothing where what a thing was made of is what is there now.

  Args:
    what: the thing, for the message.
    stored: what it was made of.
    wanted: what it would be made of now.
    mend: what to do, for the message.

  Raises:
    Stale: names the thing and the first source that is another now.
  """
  for name in sorted({*stored, *wanted}):
    before, now = stored.get(name, 'none'), wanted.get(name, 'none')
    if before != now:
      raise Stale(
        f'{what} was made of {name} {before}, which is {now} now: the two do not belong together. {mend}'
      )


def sum_of(value: np.ndarray, first: tuple[int, ...] = ()) -> int:
  """Returns a 64-bit sum of an array's bits, each weighted by its place: one changed bit changes it.

  The sums of the parts of an array add up to its own, modulo 2^64, however it is split over devices.

  Args:
    value: any array of numbers, or a part of one.
    first: where the part begins in the whole, one index per axis; () = at its beginning.
  """
  bits = np.ascontiguousarray(value).reshape(*value.shape, 1).view(np.uint8)
  words = bits.view(np.uint32) if bits.shape[-1] % 4 == 0 else bits
  begin = (*(first or (0,) * value.ndim), 0)
  total = words
  for axis in range(words.ndim - 1, -1, -1):
    total = _weighted(total, _weights(axis, begin[axis], words.shape[axis]))
  return int(total)


def _weighted(words: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Returns the weighted sums over the last axis, modulo 2^64."""
  return np.asarray(np.einsum('...i,i->...', words, weights, dtype=np.uint64, casting='unsafe'))


def _weights(axis: int, first: int, count: int) -> np.ndarray:
  """Returns odd multipliers, uint64 [count], of the places of an axis from `first` on (splitmix64)."""
  place = np.arange(first, first + count, dtype=np.uint64) + np.uint64((axis + 1) << 40)
  mixed = place * np.uint64(0x9E3779B97F4A7C15)
  mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return (mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)
