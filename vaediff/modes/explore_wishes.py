"""What is asked of an explorer, and what it answers: records, and what a visitor's choices come to.

A wish holds all that a picture is made of, so that nothing else need be known of who asks.
No library of pages is imported here.
"""

import dataclasses
import hashlib
from collections.abc import Mapping

import numpy as np

from vaediff.experiments.base import NOISE
from vaediff.modes import explore_controls as controls
from vaediff.modes.interpolate import lerp, slerp
from vaediff.run import images
from vaediff.run.draw import HostArrays, own_image
from vaediff.run.trained import Trained

DRAWN, DATA, UPLOAD = 'drawn', 'data', 'upload'
"""Where an end comes from."""
ONE, FOUR, NINE, ROW = 'one', 'four', 'nine', 'row'
"""How many pictures: one, several that differ in their noise, or a row from one end to the other."""
COUNTS = {ONE: 1, FOUR: 4, NINE: 9}
LARGE = 384
"""Pixels: small pictures are enlarged by a whole factor to no less."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class End:
  """What one end of a picture is made of.

  Attributes:
    kind: `DRAWN` by seeds, or seen in an image: of the evaluation split (`DATA`), or of a file (`UPLOAD`).
    index: of an image of the evaluation split.
    image: of a file, uint8 [size, size, channels].
    seeds: of what is drawn, by input; in place of what is not named that of the stage.
    finds_noise: x_T is that of the image, by DDIM inversion.
  """

  kind: str = DRAWN
  index: int = 0
  image: np.ndarray | None = None
  seeds: Mapping[str, int] = dataclasses.field(default_factory=dict)
  finds_noise: bool = False

  @property
  def key(self) -> tuple:
    """What the end is of: equal for equal images."""
    return self.kind, self.index, b'' if self.image is None else hashlib.sha1(self.image.tobytes()).digest()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Wish:
  """What a visitor asks for.

  Attributes:
    stage: that draws.
    sampler: '' = the stage's own.
    num_steps: 0 = the stage's own.
    ends: one or two.
    weights: of the second end, a picture each; with one end their number alone counts.
    varies: each picture has noise of its own.
    chosen: classes and numbers, by input.
    captions: texts, by input.
    amounts: by the names of directions.
    replaced: inputs in whose place the ends' images are put.
  """

  stage: str
  sampler: str = ''
  num_steps: int = 0
  ends: tuple[End, ...] = (End(),)
  weights: tuple[float, ...] = (0.0,)
  varies: bool = False
  chosen: Mapping[str, float | int] = dataclasses.field(default_factory=dict)
  captions: Mapping[str, str] = dataclasses.field(default_factory=dict)
  amounts: Mapping[str, float] = dataclasses.field(default_factory=dict)
  replaced: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Shown:
  """Pictures.

  Attributes:
    images: uint8 [count, height, width, channels] by name, the stage's own last.
    titles: of each.
    what: what drew them, for people.
    seconds: that it took.
    is_new: a program was compiled for it.
    is_quick: they are those that one sees while one drags.
    wish: that they are of.
    program: what drew them.
  """

  images: HostArrays
  titles: Mapping[str, str]
  what: str
  seconds: float
  is_new: bool
  is_quick: bool
  wish: Wish
  program: Trained


@dataclasses.dataclass(frozen=True, kw_only=True)
class Offer:
  """What a visitor can choose of a stage.

  Attributes:
    stage: its name.
    controls: of its inputs.
    directions: of its codes.
    samplers: names, its own first; () = it has none, or knows its own alone.
    num_steps: the same of numbers of steps.
    about: how it draws, where that cannot be chosen.
    ends: kinds of ends, the usual one first.
    finds_noise: the noise of an image can be found.
    tasks: that an image can be restored of.
    has_quick: there is something to see while one drags.
    notes: what is missing, and why.
  """

  stage: str
  controls: tuple[controls.Control, ...]
  directions: tuple[controls.Direction, ...]
  samplers: tuple[str, ...]
  num_steps: tuple[int, ...]
  about: str
  ends: tuple[str, ...]
  finds_noise: bool
  tasks: tuple[str, ...]
  has_quick: bool
  notes: tuple[str, ...]


@dataclasses.dataclass(kw_only=True)
class Choice:
  """What one visitor has chosen so far, and changes.

  Attributes:
    stage: that draws.
    sampler: '' = the stage's own.
    num_steps: 0 = the stage's own.
    ends: both.
    has_two: the second counts.
    weight: of the second.
    shape: how many pictures.
    num_points: of a row.
    chosen: classes and numbers, by input.
    captions: texts, by input.
    amounts: by the names of directions.
    replaced: inputs in whose place the ends' images are put.
  """

  stage: str
  sampler: str = ''
  num_steps: int = 0
  ends: list[End] = dataclasses.field(default_factory=lambda: [End(), End(seeds={})])
  has_two: bool = False
  weight: float = 0.0
  shape: str = ONE
  num_points: int = 9
  chosen: dict[str, float | int] = dataclasses.field(default_factory=dict)
  captions: dict[str, str] = dataclasses.field(default_factory=dict)
  amounts: dict[str, float] = dataclasses.field(default_factory=dict)
  replaced: set[str] = dataclasses.field(default_factory=set)

  def change_end(self, number: int, **changes: object) -> None:
    """Puts other values into one end."""
    self.ends[number] = dataclasses.replace(self.ends[number], **changes)

  def seed(self, number: int, name: str, seed: int) -> None:
    """Puts another seed of one input into one end."""
    self.change_end(number, seeds={**self.ends[number].seeds, name: seed})

  def wish(self) -> Wish:
    """Returns the wish that all of it comes to, which later changes do not touch."""
    row = self.shape == ROW and self.has_two
    weights = np.linspace(0.0, 1.0, self.num_points) if row else [self.weight] * COUNTS.get(self.shape, 1)
    return Wish(
      stage=self.stage,
      sampler=self.sampler,
      num_steps=self.num_steps,
      ends=tuple(self.ends[: 2 if self.has_two else 1]),
      weights=tuple(float(weight) for weight in weights),
      varies=self.shape in (FOUR, NINE),
      chosen=dict(self.chosen),
      captions=dict(self.captions),
      amounts=dict(self.amounts),
      replaced=tuple(sorted(self.replaced)),
    )


def picture(value: np.ndarray, *, is_row: bool = False, least: int = LARGE) -> np.ndarray:
  """Returns one uint8 picture [height, width, channels] of images [n, h, w, c], at least so many pixels wide.

  Pixels are repeated, never blended: what is seen is what was drawn.
  """
  if len(value) == 1:
    factor = max(1, -(-least // max(value.shape[1:3])))
    return value[0].repeat(factor, axis=0).repeat(factor, axis=1)
  columns = len(value) if is_row else round(np.sqrt(len(value)))
  return images.grid(value, columns, max(least // columns, least // 4))


def whole_picture(shown: Shown) -> np.ndarray:
  """Returns all that is shown as one picture: beside each other, rows below each other."""
  own = own_image(shown.images)
  parts = [value for value in shown.images.values() if value.shape == own.shape]
  is_row = len(set(shown.wish.weights)) > 1
  return np.concatenate([picture(value, is_row=is_row) for value in parts], axis=0 if is_row else 1)


def between(a: HostArrays, b: HostArrays, weights: tuple[float, ...]) -> HostArrays:
  """Returns what pictures between two ends are made of, a row for each weight of the second.

  Noise on the great circle, codes and images on the straight line, whole numbers of the nearer end.
  """
  found = {}
  for name in a.keys() & b.keys():
    left, right = a[name], b[name]
    if not np.issubdtype(left.dtype, np.floating):
      found[name] = np.stack([right[k] if w > 0.5 else left[k] for k, w in enumerate(weights)])
      continue
    way = slerp if name == NOISE else lerp
    rows = [way(left[k], right[k], np.array([w], np.float32))[0] for k, w in enumerate(weights)]
    found[name] = np.stack(rows).astype(left.dtype)
  return found
