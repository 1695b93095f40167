"""Pictures: grids of images, and their PNG files."""

import io
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image as PilImage
from PIL import ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from vaediff.storage import files

MIN_SIDE = 64
"""Images narrower than this are enlarged by a whole factor in grids, so that they can be seen."""
MIN_SIDE_BELOW_TEXT = 128
"""The same where each has a text above it."""
GAP = 2
MIN_LETTERS, MAX_LETTERS = 11, 20
"""Size of text beside rows, in pixels."""
MADE_OF = 'vaediff'
"""Key of a PNG file's text that says what the picture was made of, as JSON."""


def grid(images: np.ndarray, columns: int, least: int = MIN_SIDE) -> np.ndarray:
  """Returns one uint8 picture [height, width, channels] of uint8 images [n, h, w, c], row by row."""
  count, height, width, channels = images.shape
  factor = max(1, -(-least // max(height, width)))
  images = images.repeat(factor, axis=1).repeat(factor, axis=2)
  height, width = height * factor, width * factor
  rows = -(-count // columns)
  canvas = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, channels), 255, np.uint8)
  for k, image in enumerate(images):
    top, left = GAP + k // columns * (height + GAP), GAP + k % columns * (width + GAP)
    canvas[top : top + height, left : left + width] = image
  return canvas


def beside_rows(picture: np.ndarray, left: Sequence[str], right: Sequence[str]) -> np.ndarray:
  """Returns a grid with text to the left and right of its rows, of which there are as many as texts.

  The letters are as large as fits between the rows, at least 11 pixels high.
  """
  height, width, channels = picture.shape
  row = (height - GAP) // len(left)
  lines = max(text.count('\n') + 1 for text in (*left, *right))
  font = ImageFont.load_default(size=min(MAX_LETTERS, max(MIN_LETTERS, (row - GAP) // (lines + 1))))
  pen = ImageDraw.Draw(PilImage.new('L', (1, 1)))
  margins = [
    round(max(pen.multiline_textbbox((0, 0), text, font=font)[2] for text in texts)) + 4 * GAP
    for texts in (left, right)
  ]
  canvas = PilImage.new('L', (margins[0] + width + margins[1], height), 255)
  pen = ImageDraw.Draw(canvas)
  for number, texts in enumerate(zip(left, right, strict=True)):
    for text, x in zip(texts, (2 * GAP, margins[0] + width + 2 * GAP), strict=True):
      y = GAP + number * row + (row - GAP) / 2
      pen.multiline_text((x, y), text, fill=0, font=font, anchor='lm')
  whole = np.repeat(np.asarray(canvas)[..., None], channels, axis=2)
  whole[:, margins[0] : margins[0] + width] = picture
  return whole


def captioned(images: np.ndarray, columns: int, texts: Sequence[str]) -> np.ndarray:
  """Returns a grid of uint8 images with the text of each above it; a row of one text has it once."""
  rows, font = [], ImageFont.load_default(size=MIN_LETTERS)
  for start in range(0, len(images), columns):
    row = grid(images[start : start + columns], columns, MIN_SIDE_BELOW_TEXT)
    own = list(texts[start : start + columns])
    alone = len(set(own)) == 1
    cell = row.shape[1] - GAP if alone else (row.shape[1] - GAP) // columns
    blocks = [wrapped(text, cell - 2 * GAP, font) for text in (own[:1] if alone else own)]
    high = max(block.count('\n') + 1 for block in blocks) * (MIN_LETTERS + 2 * GAP) + GAP
    canvas = PilImage.new('L', (row.shape[1], high), 255)
    pen = ImageDraw.Draw(canvas)
    for number, block in enumerate(blocks):
      where = (2 * GAP + number * cell, high - GAP)
      pen.multiline_text(where, block, fill=0, font=font, anchor='ld')
    rows += [np.repeat(np.asarray(canvas)[..., None], row.shape[2], axis=2), row]
  return np.concatenate(rows)


def wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
  """Returns a text in lines that are no wider than so many pixels, but for words that alone are wider."""
  lines = ['']
  for word in text.split():
    longer = f'{lines[-1]} {word}'.strip()
    if lines[-1] and font.getlength(longer) > width:
      lines.append(word)
    else:
      lines[-1] = longer
  return '\n'.join(lines)


def in_groups(count: int, num_groups: int) -> np.ndarray:
  """Returns the order of images 0 .. count - 1 that has those of one group, i modulo `num_groups`, together.

  Only of whole turns; without groups it is all of them, as they are.
  """
  if not 0 < num_groups <= count:
    return np.arange(count)
  turns = count // num_groups
  return np.arange(turns * num_groups).reshape(turns, num_groups).T.reshape(-1)


def side_by_side(*columns: np.ndarray) -> np.ndarray:
  """Returns [n * k, ...]: image i of each of the k arrays in turn, so that a grid shows them together."""
  return np.stack(columns, axis=1).reshape(-1, *columns[0].shape[1:])


def write_png(path: pathlib.Path, picture: np.ndarray, made_of: Mapping[str, str] | None = None) -> None:
  """Writes a uint8 picture [height, width, 1 | 3] and, as the text `MADE_OF`, what it was made of."""
  with files.replacing(path) as temporary:
    temporary.write_bytes(png(picture, made_of))


def png(picture: np.ndarray, made_of: Mapping[str, str] | None = None) -> bytes:
  """Returns the bytes of the file that `write_png` writes."""
  text, file = PngInfo(), io.BytesIO()
  if made_of:
    text.add_text(MADE_OF, json.dumps(dict(made_of), sort_keys=True))
  image = PilImage.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
  image.save(file, 'PNG', pnginfo=text)
  return file.getvalue()
