"""Scenes of one shape, drawn here: shape x colour x size x position x background, with captions.

5,184 compositions, of which those whose colour has the number of their shape are in the split `held_out`
alone. Captions leave out what their writer leaves out, and never tell the nuisances: where exactly, how large
exactly, which shade. So p(image | caption) is no point, and what an image shows can be read out of it exactly
(`vaediff.data.oracle`).

A scene is a function of its split and number; every byte is the same on every machine: RandomState's stream
is frozen (NEP 19), and Pillow draws masks with whole coordinates.
"""

import dataclasses
import hashlib
import re
from collections.abc import Sequence

import ml_collections
import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image, ImageDraw

from vaediff.errors import UserError

ATTRIBUTES = ('shape', 'colour', 'size', 'position', 'background')
SHAPES = ('circle', 'square', 'triangle', 'diamond', 'cross', 'ring')
COLOURS = {
  'red': (214, 39, 40),
  'orange': (255, 140, 0),
  'yellow': (250, 220, 40),
  'green': (40, 150, 60),
  'cyan': (60, 200, 220),
  'blue': (40, 80, 200),
  'purple': (140, 60, 170),
  'pink': (250, 150, 190),
}
SIZES = {'small': 0.14, 'medium': 0.19, 'large': 0.25}
"""The radius over the side of the image."""
POSITIONS = (
  'top left', 'top center', 'top right', 'center left', 'center', 'center right', 'bottom left', 'bottom'
  ' center',
  'bottom right',
)  # fmt: skip
CENTRES = (0.28, 0.5, 0.72)
"""Of rows and columns, over the side."""
BACKGROUNDS = {'black': (16, 16, 16), 'gray': (128, 128, 128), 'white': (240, 240, 240), 'navy': (10, 20, 80)}
NAMES = (SHAPES, tuple(COLOURS), tuple(SIZES), POSITIONS, tuple(BACKGROUNDS))
"""Of each attribute, by number."""
ALL = tuple(tuple(range(len(names))) for names in NAMES)
MINI = ((0, 1, 2), (0, 1, 2, 3), (2,), (0, 2, 6, 8), (0, 2))
"""What the small set has of each attribute: for networks that train in minutes."""
COUNTS = {'train': 20_000, 'test': 2_000, 'held_out': 2_000}
JITTER, GROWTH, SHADE, GLOW = 1.5 / 32, (0.93, 1.07), (0.9, 1.0), 8.0
"""Nuisances: of the centre over the side, of the radius, of the colour; and of each background channel,
bytes."""
OMITTED = {'colour': 0.1, 'size': 0.25, 'position': 0.25, 'background': 0.25}
"""How often a caption leaves an attribute out; it never leaves out the shape."""
LOOK = 'caption_look'
"""The feature whose captions tell shape, colour and background alone."""
NUM_ORDERS, UNWRITTEN = 3, 3
"""Orders of words that captions have; and one that none has."""
FINER = 8
"""Masks are drawn so many times as large, and averaged."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
  """One image before it has pixels.

  Attributes:
    attributes: the number of each of `ATTRIBUTES`.
    offset: of the centre, (x, y) over the side.
    growth: of the radius.
    shade: of the colour.
    glow: of the background, by channel, bytes.
    caption: of one of three orders, with what its writer tells.
    caption_full: with everything that captions can tell.
  """

  attributes: tuple[int, ...]
  offset: tuple[float, float] = (0.0, 0.0)
  growth: float = 1.0
  shade: float = 1.0
  glow: tuple[float, ...] = (0.0, 0.0, 0.0)
  caption: str = ''

  @property
  def caption_full(self) -> str:
    """Tells all attributes."""
    return in_words(self.attributes)

  @property
  def caption_look(self) -> str:
    """Tells what it looks like, and neither how large it is nor where: what a control image is to say."""
    return in_words(self.attributes, left_out={'size', 'position'})

  def telling(self, feature: str) -> str:
    """Returns a caption that tells all that captions of a feature can tell, in the words that they have."""
    return self.caption_look if feature == LOOK else self.caption_full

  def reordered(self, feature: str) -> str:
    """Returns one that tells the same in an order that no caption of the feature has."""
    if feature == LOOK:
      return in_words(self.attributes, 2, {'size', 'position'})
    return in_words(self.attributes, UNWRITTEN)


def is_named(data: ml_collections.ConfigDict) -> bool:
  """Returns whether a config's images are of this data set."""
  return data.source == 'tfds' and data.name.split('/')[0] == 'shapes'


def is_mini(data: ml_collections.ConfigDict) -> bool:
  """Returns whether they are of its small set."""
  return is_named(data) and data.name.endswith('/mini')


def is_held_out(attributes: tuple[int, ...]) -> bool:
  """Returns whether a composition is of the split `held_out`: shape and colour have the same number."""
  return attributes[0] == attributes[1]


def scene(split: str, index: int, *, mini: bool = False) -> Scene:
  """Returns the scene with a number in a split of `COUNTS`.

  The same of every size; those of the small set are others.
  """
  seed = hashlib.sha256(f'{split}/{index}'.encode()).digest()
  random = np.random.RandomState(np.frombuffer(seed, '<u4'))
  choices = MINI if mini else ALL
  while True:
    attributes = tuple(int(numbers[random.randint(len(numbers))]) for numbers in choices)
    if split == 'held_out':
      attributes = (attributes[0], attributes[0], *attributes[2:])
    if is_held_out(attributes) == (split == 'held_out'):
      break
  offset = random.uniform(-JITTER, JITTER, 2).tolist()
  growth, shade = random.uniform(*GROWTH), random.uniform(*SHADE)
  glow = random.uniform(-GLOW, GLOW, 3).tolist()
  order, chances = int(random.randint(NUM_ORDERS)), random.uniform(size=len(OMITTED))
  left_out = {name for name, chance in zip(OMITTED, chances, strict=True) if chance < OMITTED[name]}
  return Scene(
    attributes=attributes,
    offset=tuple(offset),
    growth=float(growth),
    shade=float(shade),
    glow=tuple(glow),
    caption=in_words(attributes, order, left_out),
  )


def in_words(attributes: tuple[int, ...], order: int = 0, left_out: set[str] = frozenset()) -> str:
  """Returns the caption of a composition, as 'a small red ring at the top left on a black background'.

  Args:
    attributes: the number of each.
    order: 0 as above, 1 with the place first, 2 with the background first, 3 with the place last.
    left_out: names of attributes that it does not tell.
  """
  shape, colour, size, position, background = (
    '' if name in left_out else names[number]
    for name, names, number in zip(ATTRIBUTES, NAMES, attributes, strict=True)
  )
  words = ' '.join(word for word in (size, colour, shape) if word)
  what = f'{"an" if words[0] in "aeiou" else "a"} {words}'
  where = f'at the {position}' if position else ''
  behind = f'on a {background} background' if background else ''
  orders = (
    ('', (what, where, behind)),
    (where, (what, behind)),
    (behind, (what, where)),
    ('', (what, behind, where)),
  )
  first, rest = orders[order]
  said = ' '.join(part for part in rest if part)
  return f'{first}, {said}' if first else said


def told(caption: str) -> Int32[np.ndarray, ' attributes']:
  """Returns the number of each attribute that a caption tells; -1 where it does not.

  Raises:
    UserError: for a text that is none of these captions.
  """
  text = caption.strip().casefold()
  found = re.fullmatch(_GRAMMAR, text)
  if found is None:
    raise UserError(
      f'{caption!r} is no caption of the data set shapes; write one as'
      f' {in_words((5, 0, 0, 0, 0))!r}, {in_words((5, 0, 0, 0, 0), 1)!r} or'
      f' {in_words((5, 0, 0, 0, 0), 2)!r}, of the words'
      f' {", ".join(name for names in NAMES for name in names)}'
    )
  said = {name.rstrip('_'): value for name, value in found.groupdict().items() if value}
  numbers = [
    names.index(said[name]) if name in said else -1 for name, names in zip(ATTRIBUTES, NAMES, strict=True)
  ]
  return np.array(numbers, np.int32)


def _grammar() -> str:
  """Returns the captions as a regular expression: a group for each attribute, its name or that and '_'."""
  choice = {name: '|'.join(names) for name, names in zip(ATTRIBUTES, NAMES, strict=True)}

  def group(name: str, times: int) -> str:
    return f'(?P<{name}{"_" * times}>{choice[name]})'

  def place(times: int) -> str:
    # 'center' stands at the beginning of others
    longest = '|'.join(sorted(POSITIONS, key=len, reverse=True))
    return f'at the (?P<position{"_" * times}>{longest})'

  def behind(times: int) -> str:
    return f'on an? {group("background", times)} background'

  what = f'an? (?:{group("size", 0)} )?(?:{group("colour", 0)} )?{group("shape", 0)}'
  where = f'(?:(?: {place(0)})?(?: {behind(0)})?| {behind(2)} {place(2)})'
  return f'(?:(?:{place(1)}|{behind(1)}),? )?{what}{where}'


_GRAMMAR = _grammar()


def render(one: Scene, size: int) -> UInt8[np.ndarray, 'size size 3']:
  """Returns the image of a scene: rint(m f + (1 - m) b) of the mask m and the two colours."""
  _, colour, _, _, background = one.attributes
  front = np.array(COLOURS[NAMES[1][colour]], np.float64) * one.shade
  back = np.array(BACKGROUNDS[NAMES[4][background]], np.float64) + one.glow
  covered = mask(one, size).astype(np.float64)[..., None] / 255
  return np.rint(covered * front + (1 - covered) * back).clip(0, 255).astype(np.uint8)


def mask(one: Scene, size: int) -> UInt8[np.ndarray, 'size size']:
  """Returns how much of each pixel the shape covers, 0 ... 255."""
  shape, _, extent, position, _ = one.attributes
  radius = tuple(SIZES.values())[extent] * one.growth
  x = CENTRES[position % 3] + one.offset[0]
  y = CENTRES[position // 3] + one.offset[1]
  scale = size * FINER
  canvas = Image.new('L', (scale, scale), 0)
  draw = ImageDraw.Draw(canvas)

  def points(corners: Sequence[tuple[float, float]]) -> list[tuple[int, int]]:
    """Returns corners, given in radii from the centre, in whole pixels of the canvas."""
    return [(round((x + radius * a) * scale), round((y + radius * b) * scale)) for a, b in corners]

  def box(half_width: float, half_height: float) -> list[tuple[int, int]]:
    # what Pillow draws to holds its last pixel
    (left, top), (right, bottom) = points([(-half_width, -half_height), (half_width, half_height)])
    return [(left, top), (max(left, right - 1), max(top, bottom - 1))]

  match SHAPES[shape]:
    case 'circle':
      draw.ellipse(box(1.0, 1.0), fill=255)
    case 'square':
      draw.rectangle(box(0.5**0.5, 0.5**0.5), fill=255)
    case 'triangle':
      wide, low = 1.15 * 0.75**0.5, 1.15 * 0.5
      draw.polygon(points([(0.0, -1.15), (wide, low), (-wide, low)]), fill=255)
    case 'diamond':
      draw.polygon(points([(0.0, -1.15), (0.7, 0.0), (0.0, 1.15), (-0.7, 0.0)]), fill=255)
    case 'cross':
      draw.rectangle(box(1.0, 0.36), fill=255)
      draw.rectangle(box(0.36, 1.0), fill=255)
    case 'ring':
      draw.ellipse(box(1.0, 1.0), fill=255)
      draw.ellipse(box(0.55, 0.55), fill=0)
  return np.asarray(canvas.reduce(FINER))


def images(
  split: str, indices: range, size: int, *, mini: bool = False
) -> UInt8[np.ndarray, 'n size size 3']:
  """Returns the images of some scenes of a split."""
  return np.stack([render(scene(split, index, mini=mini), size) for index in indices])


def control(
  image: UInt8[np.ndarray, 'n height width channels'], least: float = 0.06
) -> UInt8[np.ndarray, 'n height width 1']:
  """Returns the edges of images, 255 on them and 0 elsewhere: a function of the image alone.

  An edge is where the Sobel filter of any channel, of pixels in [0, 1] and normalised to the change from a
  pixel to the next, is above `least`: in grey a green shape on grey would have none.
  """
  x = np.pad(image.astype(np.float64) / 255, ((0, 0), (1, 1), (1, 1), (0, 0)), mode='edge')
  across = (x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]) / 4
  along = (x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]) / 4
  right = (across[:, :, 2:] - across[:, :, :-2]) / 2
  down = (along[:, 2:] - along[:, :-2]) / 2
  strongest = np.hypot(right, down).max(axis=-1, keepdims=True)
  return np.where(strongest > least, np.uint8(255), np.uint8(0))
