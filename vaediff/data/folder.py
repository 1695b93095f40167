"""Images as stored, from a folder: png, jpg, jpeg, webp and bmp files at any depth."""

import os
import pathlib
import warnings
from typing import Any

import ml_collections
import numpy as np
from PIL import Image, ImageOps

from vaediff.data.readers import Reader, select_shuffled
from vaediff.data.resize import on_white
from vaediff.errors import UserError

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp')


class FolderReader(Reader):
  """All images under `data.path`, in a fixed shuffled order, of which `data.*_split` are slices.

  The label is the subfolder of `data.path` that an image lies in; 0 when there are no subfolders.
  Hidden files and folders are left out.
  """

  def __init__(self, data: ml_collections.ConfigDict, split: str):
    self._root = pathlib.Path(data.path).expanduser()
    self._channels = data.channels
    files = list_images(self._root, data.path)
    classes = [file.split('/')[0] if '/' in file else '' for file in files]
    self.label_names = tuple(sorted(set(classes) - {''}))
    self.num_classes = len(self.label_names)
    if self.num_classes and '' in classes:
      raise UserError(
        f'data.path={data.path!r}: {classes.count("")} images lie in the folder itself and'
        f' {len(files) - classes.count("")} in subfolders such as {self.label_names[0]!r}.'
        ' Subfolders are classes: move all images into subfolders, or none'
      )
    indices = select_shuffled(data[f'{split}_split'], f'{split}_split', len(files))
    label_of = {name: i for i, name in enumerate(self.label_names)} | {'': 0}
    self._files = [files[i] for i in indices]
    self._labels = [label_of[classes[i]] for i in indices]

  def __len__(self) -> int:
    return len(self._files)

  def fingerprint(self) -> Any:
    """See `Reader`."""
    statuses = [(name, os.stat(self._root / name)) for name in self._files]
    return [[name, status.st_size, status.st_mtime_ns] for name, status in statuses]

  def read(self, index: int) -> tuple[np.ndarray, int]:
    """See `Reader`."""
    return decode(self._root / self._files[index], self._channels), self._labels[index]

  def locate(self, index: int) -> str:
    """See `Reader`."""
    return str(self._root / self._files[index])


def list_images(root: pathlib.Path, shown: str) -> list[str]:
  """Returns the images under a folder, sorted, as paths relative to it with '/' between the parts.

  Raises:
    UserError: there is no such folder, or no image in it; `shown` is the path as the user wrote it.
  """
  if not shown or not root.is_dir():
    raise UserError(f"data.path={shown!r} is no folder; data.source='image_folder' needs one")
  found = []
  for folder, subfolders, names in os.walk(root, followlinks=True):
    subfolders[:] = [name for name in subfolders if not name.startswith('.')]
    for name in names:
      if name.lower().endswith(SUFFIXES) and not name.startswith('.'):
        found.append((pathlib.Path(folder) / name).relative_to(root).as_posix())
  if not found:
    raise UserError(f'data.path={shown!r} holds no image ({", ".join(SUFFIXES)}) at any depth')
  return sorted(found)


def decode(file: pathlib.Path, channels: int) -> np.ndarray:
  """Returns an image file as uint8 [height, width, channels], upright, transparency on white.

  Grey becomes RGB when `channels` is 3, and colour becomes grey (ITU-R 601 luma) when it is 1.

  Raises:
    UserError: the file is empty or broken.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # PIL warns of odd metadata, which does not matter here.
      with Image.open(file) as image:
        image.load()
        picture = _to_mode(ImageOps.exif_transpose(image), 'L' if channels == 1 else 'RGB')
  except Exception as error:  # PIL's decoders raise almost anything on damaged files.
    reason = 'it is empty' if file.is_file() and not file.stat().st_size else str(error)
    raise UserError(f'{file} cannot be read: {reason}') from error
  pixels = np.asarray(picture)
  return pixels[..., None] if channels == 1 else pixels


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
  if image.mode.startswith('I'):  # 16-bit grey: PIL's own conversion would clip at 255.
    image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
  if image.has_transparency_data:
    image = on_white(image)
  return image.convert(mode)
