"""Image files: grids as PNG, arrays as npz. Everything is written to a temporary name, then renamed."""

import os
import pathlib
from collections.abc import Mapping

import numpy as np
from PIL import Image as PilImage

MIN_SIDE = 64
"""Images narrower than this are enlarged by a whole factor in grids, so that they can be seen."""
GAP = 2


def to_uint8(images: np.ndarray) -> np.ndarray:
  """Returns uint8 in [0, 255] from float in [-1, 1], rounded."""
  return np.clip(np.round((np.asarray(images, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)


def grid(images: np.ndarray, columns: int) -> np.ndarray:
  """Returns one uint8 picture [height, width, channels] of uint8 images [n, h, w, c], row by row."""
  count, height, width, channels = images.shape
  factor = max(1, -(-MIN_SIDE // max(height, width)))
  images = images.repeat(factor, axis=1).repeat(factor, axis=2)
  height, width = height * factor, width * factor
  rows = -(-count // columns)
  canvas = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, channels), 255, np.uint8)
  for k, image in enumerate(images):
    top, left = GAP + k // columns * (height + GAP), GAP + k % columns * (width + GAP)
    canvas[top : top + height, left : left + width] = image
  return canvas


def side_by_side(*columns: np.ndarray) -> np.ndarray:
  """Returns [n * k, ...]: image i of each of the k arrays in turn, so that a grid shows them together."""
  return np.stack(columns, axis=1).reshape(-1, *columns[0].shape[1:])


def write_png(path: pathlib.Path, picture: np.ndarray) -> None:
  """Writes a uint8 picture [height, width, 1 | 3]."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  PilImage.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(temporary, 'PNG')
  os.replace(temporary, path)


def write_npz(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes the arrays, uncompressed."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  with open(temporary, 'wb') as file:
    np.savez(file, **arrays)
  os.replace(temporary, path)
