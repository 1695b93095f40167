"""How the tensors of a published network and our parameters belong together: one table, read both ways.

A family of networks gives, for the parameters of ours, one `Entry` each. Its `Layout` is how the axes of the
two arrays belong together; `Reorder` is for networks whose channels come in another order.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from vaediff.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
"""Of tensors by their published name, or of our parameters by their path, joined by '/'."""
Arrays = dict[str, np.ndarray]
MOST_SHOWN = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """How the axes of an array of theirs become ours: [out, in, ...] -> [..., in, out].

  Attributes:
    to_own: our array of theirs.
    to_official: theirs of ours.
  """

  to_own: Callable[[np.ndarray], np.ndarray]
  to_official: Callable[[np.ndarray], np.ndarray]


LAYOUTS = {
  'same': Layout(to_own=lambda a: a, to_official=lambda a: a),
  'linear': Layout(to_own=lambda a: a.T, to_official=lambda a: a.T),
  # 1x1 convolutions are linear maps of the last axis here
  'conv1d': Layout(to_own=lambda a: a[:, :, 0].T, to_official=lambda a: a.T[:, :, None]),
  'conv1x1': Layout(to_own=lambda a: a[:, :, 0, 0].T, to_official=lambda a: a.T[:, :, None, None]),
  'conv': Layout(to_own=lambda a: a.transpose(2, 3, 1, 0), to_official=lambda a: a.transpose(3, 2, 0, 1)),
}
"""The last four are kernels: of linear maps, of convolutions in one and two dimensions."""


@dataclasses.dataclass(frozen=True)
class Reorder:
  """Another order along an axis of our array: place i of ours is place order[i] of theirs."""

  axis: int
  order: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
  """One parameter.

  Attributes:
    path: ours, joined by '/'.
    name: theirs; '' = they have none.
    layout: of `LAYOUTS`.
    reorders: what else is different.
    fill: the value of ours where they have none.
  """

  path: str
  name: str
  layout: str = 'same'
  reorders: tuple[Reorder, ...] = ()
  fill: float = 0.0

  def to_own(self, array: np.ndarray) -> np.ndarray:
    """Returns our array of theirs."""
    array = LAYOUTS[self.layout].to_own(array)
    for reorder in self.reorders:
      array = np.take(array, reorder.order, reorder.axis)
    return np.ascontiguousarray(array)

  def to_official(self, array: np.ndarray) -> np.ndarray:
    """Returns their array of ours."""
    for reorder in reversed(self.reorders):
      array = np.take(array, np.argsort(reorder.order), reorder.axis)
    return np.ascontiguousarray(LAYOUTS[self.layout].to_official(array))

  def official_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of their array, by that of ours."""
    if {'linear': 2, 'conv1d': 2, 'conv1x1': 2, 'conv': 4}.get(self.layout, len(shape)) != len(shape):
      return ()
    return LAYOUTS[self.layout].to_official(np.broadcast_to(np.float32(0), shape)).shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """Networks that were published under the same names.

  Attributes:
    name: of the family.
    title: in words.
    experiment: of the stage whose network it is.
    network: its name in that stage.
    signature: names that only these networks have.
    entries: (shapes of ours, options) -> the table. Options are what shapes do not say: `layers` of a VAE,
      (kind, name) for each half; `order`, that of the channels of a generator.
    fields: shapes of theirs -> what they say of the network.
    refused: patterns of names of relatives that have no place here, and what these are.
  """

  name: str
  title: str
  experiment: str
  network: str
  signature: tuple[str, ...]
  entries: Callable[[Shapes, Mapping[str, Any]], list[Entry]]
  fields: Callable[[Shapes], dict[str, Any]]
  refused: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def is_of(self, names: Collection[str]) -> bool:
    """Returns whether a state dict with these names is one of the family."""
    return all(name in names for name in self.signature)


def affine(path: str, name: str, layout: str, *, bias: bool = True) -> Iterator[Entry]:
  """Yields kernel and bias."""
  yield Entry(f'{path}/kernel', f'{name}.weight', layout)
  if bias:
    yield Entry(f'{path}/bias', f'{name}.bias')


def norm(path: str, name: str) -> Iterator[Entry]:
  """Yields scale and bias of a norm."""
  yield Entry(f'{path}/scale', f'{name}.weight')
  yield Entry(f'{path}/bias', f'{name}.bias')


def count(names: Iterable[str], pattern: str) -> int:
  """Returns how many of pattern.format(0), pattern.format(1), ... begin a name."""
  names, number = list(names), 0
  while any(name.startswith(pattern.format(number)) for name in names):
    number += 1
  return number


def whole(width: int, channels: int) -> int:
  """Returns a level's multiplier; raises UserError where its width is no multiple of the channels."""
  if width % channels:
    raise UserError(f'a level has {width} channels, which are no multiple of the first {channels}')
  return width // channels


def alike(values: Iterable[int], what: str) -> int:
  """Returns the one value of all; raises UserError where there are several."""
  values = list(values)
  if len(set(values)) != 1:
    raise UserError(f'{what} are {values}: they must be the same in all levels')
  return values[0]


def problems(entries: list[Entry], own: Shapes, found: Shapes) -> list[str]:
  """Returns what does not fit between our parameters and a state dict, a line each."""
  paths = [entry.path for entry in entries]
  said = [
    f'{path} would be set {paths.count(path)} times' for path in dict.fromkeys(paths) if paths.count(path) > 1
  ]
  said += [f'nothing sets {path}' for path in own if path not in set(paths)]
  for entry in entries:
    if entry.path not in own:
      said.append(f'{entry.name} has no place: there is no {entry.path}')
    elif entry.name and entry.name not in found:
      said.append(f'{entry.name} is missing')
    elif entry.name:
      wanted = entry.official_shape(tuple(own[entry.path]))
      if tuple(found[entry.name]) != wanted:
        said.append(f'{entry.name} has shape {tuple(found[entry.name])}, and {wanted} is expected')
  return said


def in_words(said: list[str]) -> str:
  """Returns the first problems and how many there are."""
  more = f' (and {len(said) - MOST_SHOWN} more)' if len(said) > MOST_SHOWN else ''
  return '; '.join(said[:MOST_SHOWN]) + more


def to_own(entries: list[Entry], own: Shapes, found: Mapping[str, np.ndarray]) -> Arrays:
  """Returns our parameters by path, float32, of a state dict that has no `problems`."""
  return {
    entry.path: entry.to_own(np.asarray(found[entry.name], np.float32))
    if entry.name
    else np.full(own[entry.path], entry.fill, np.float32)
    for entry in entries
  }


def to_official(entries: list[Entry], arrays: Mapping[str, np.ndarray]) -> Arrays:
  """Returns a state dict of our parameters by path, float32."""
  return {
    entry.name: entry.to_official(np.asarray(arrays[entry.path], np.float32))
    for entry in entries
    if entry.name
  }
