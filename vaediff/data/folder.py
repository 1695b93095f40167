"""Images as stored, from a folder: png, jpg, jpeg, webp and bmp files at any depth."""

import contextlib
import dataclasses
import io
import os
import pathlib
import stat
import warnings
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
from PIL import Image, ImageOps

from vaediff.data import paths, sidecar
from vaediff.data.readers import Example, Reader, Stretch, select_shuffled, shuffled_stretch, stamps
from vaediff.data.resize import on_white
from vaediff.errors import UserError
from vaediff.storage import places
from vaediff.storage.files import reason

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp')
FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP')
MODES = ('1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'CMYK')
"""Of PIL, which its own conversions turn into RGB or grey as they should."""
GREY_16 = ('I', 'I;16', 'I;16B')
MAX_LISTED = 10  # Unusable files that an error names.


class FolderReader(Reader):
  """All images under `data.path`, in a fixed shuffled order, of which `data.*_split` are slices.

  The label is the subfolder of `data.path` that an image lies in; 0 when there are no subfolders.
  Hidden files and folders are left out. Captions are in a file of `sidecar.FILES` in `data.path`.
  """

  def __init__(self, data: ml_collections.ConfigDict, split: str):
    self._root = places.fetched(data.path, 'data.path')
    self._channels = data.channels
    listed = list_images(self._root, data.path)
    files = sorted(listed)
    classes = [file.split('/')[0] if '/' in file else '' for file in files]
    self.label_names = tuple(sorted(set(classes) - {''}))
    self.num_classes = len(self.label_names)
    if self.num_classes and '' in classes:
      raise UserError(
        f'data.path={data.path!r}: {classes.count("")} images lie in the folder itself and'
        f' {len(files) - classes.count("")} in subfolders such as {self.label_names[0]!r}.'
        ' Subfolders are classes: move all images into subfolders, or none'
      )
    field = f'{split}_split'
    indices = select_shuffled(data[field], field, len(files))
    self._stretches = shuffled_stretch(data[field], field, len(files))
    self._stamps = [[files[i], *listed[files[i]]] for i in indices]
    label_of = {name: i for i, name in enumerate(self.label_names)} | {'': 0}
    self._files = [files[i] for i in indices]
    self._labels = [label_of[classes[i]] for i in indices]
    self._captions, self._of_captions = {}, []
    if data.caption_feature:
      file = sidecar.find(self._root, data.path)
      self._captions = sidecar.captions(file, data.caption_feature, files)
      self._of_captions = stamps([file])
    self.has_captions = bool(data.caption_feature)

  def __len__(self) -> int:
    return len(self._files)

  def fingerprint(self) -> Any:
    """See `Reader`."""
    return [*self._stamps, *self._of_captions]

  def stretches(self) -> Sequence[Stretch]:
    """See `Reader`."""
    return self._stretches

  def read(self, index: int) -> Example:
    """See `Reader`."""
    name = self._files[index]
    caption = self._captions[name] if self.has_captions else ''
    return Example(decode(self._root / name, self._channels), self._labels[index], caption)

  def locate(self, index: int) -> str:
    """See `Reader`."""
    return str(self._root / self._files[index])


def list_images(root: pathlib.Path, shown: str) -> dict[str, tuple[int, int]]:
  """Returns size and time of change, in nanoseconds, of the images under a folder.

  By path relative to it, with '/' between the parts.

  Raises:
    UserError: there is no such folder, it cannot be read, or no image is in it; a link leads nowhere, or to
      what lies in it already; a pipe or device is named like an image. `shown` is the path as the user wrote
      it.
  """
  if not shown or not paths.is_folder(root):
    raise UserError(f"data.path={shown!r} is no folder; data.source='image_folder' needs one")
  walk = _Walk(root)
  waiting = [walk.enter('', root)]
  while waiting:
    waiting += walk.look(waiting.pop())
  if walk.wrong:
    more = len(walk.wrong) - MAX_LISTED
    listed = sorted(walk.wrong)[:MAX_LISTED] + ([f'and {more} more'] if more > 0 else [])
    raise UserError(
      f'{len(walk.wrong)} files or folders of data.path={shown!r} cannot be used; mend or remove them:\n  '
      + '\n  '.join(listed)
    )
  if not walk.found:
    raise UserError(f'data.path={shown!r} holds no image ({", ".join(SUFFIXES)}) at any depth')
  return walk.found


@dataclasses.dataclass
class _Walk:
  """What a walk through a folder has met; each real file and folder may be met once."""

  root: pathlib.Path
  found: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
  wrong: list[str] = dataclasses.field(default_factory=list)
  met: dict[tuple[int, int], tuple[str, bool]] = dataclasses.field(default_factory=dict)
  """By device and number of what is really there: where, and whether through a link."""

  def enter(self, name: str, path: pathlib.Path) -> str:
    """Returns the name, after noting the folder."""
    with contextlib.suppress(OSError):  # Looking into it says what is wrong.
      status = path.stat()
      self.met[status.st_dev, status.st_ino] = (name or '.', path.is_symlink())
    return name

  def look(self, folder: str) -> list[str]:
    """Notes the images of one folder; returns the folders in it. Hidden ones are left out."""
    try:
      with os.scandir(self.root / folder) as entries:
        listed = sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name))  # Links come last.
    except OSError as error:
      raise UserError(
        f"the folder '{self.root / folder}' of data.path cannot be read: {reason(error)}. Without it"
        ' images are missing and classes are numbered otherwise: make it readable, or move it away'
      ) from error
    inside = []
    for entry in listed:
      if not entry.name.startswith('.'):
        inside += self._note(entry, f'{folder}/{entry.name}' if folder else entry.name)
    return inside

  def _note(self, entry: os.DirEntry, name: str) -> list[str]:
    """Notes a file; returns the name of a folder, to be looked into."""
    image, link = name.lower().endswith(SUFFIXES), entry.is_symlink()
    try:
      if not link and not image and not entry.is_dir():
        return []
      status = entry.stat()
    except FileNotFoundError:
      self.wrong.append(f"{self.root / name} is a link to '{os.readlink(entry.path)}', which is not there")
      return []
    except OSError as error:
      self.wrong.append(f'{self.root / name}: {reason(error)}')
      return []
    folder = stat.S_ISDIR(status.st_mode)
    if not folder and not image:
      return []
    if not folder and not stat.S_ISREG(status.st_mode):
      self.wrong.append(f'{self.root / name} is no file but a pipe, socket or device')
      return []
    place = (status.st_dev, status.st_ino)
    before, by_link = self.met.get(place, ('', False))
    if before and (folder or link or by_link):
      self.wrong.append(
        f"{self.root / name} is the same {'folder' if folder else 'file'} as '{before}' there, by a link: its"
        ' images would count twice'
      )
      return []
    self.met[place] = (name, link)
    if folder:
      return [name]
    self.found[name] = (status.st_size, status.st_mtime_ns)
    return []


def decode(
  file: pathlib.Path,
  channels: int,
  content: bytes | None = None,
  formats: Sequence[str] | None = FORMATS,
) -> np.ndarray:
  """Returns an image file as uint8 [height, width, channels], upright, transparency on white.

  Its `content` is read where that is given; then `file` is what it is called. Grey becomes RGB when
  `channels` is 3, and colour becomes grey (ITU-R 601 luma) when it is 1. With `formats` None it may be of any
  that Pillow reads.

  Raises:
    UserError: the file is empty or broken, of another format than its name may stand for, or of a kind that
      cannot be turned into bytes without loss of its meaning.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # PIL warns of odd metadata, which does not matter here.
      with Image.open(file if content is None else io.BytesIO(content), formats=formats) as image:
        packed = _packed(image)
        image.load()
        picture = _to_mode(ImageOps.exif_transpose(image), packed, 'L' if channels == 1 else 'RGB')
  except Exception as error:  # PIL's decoders raise almost anything on damaged files.
    why = _why(file, error) if content is None else _said(error)
    raise UserError(f'{file} cannot be read: {why}') from error
  pixels = np.asarray(picture)
  return pixels[..., None] if channels == 1 else pixels


def _why(file: pathlib.Path, error: Exception) -> str:
  with contextlib.suppress(OSError):
    if not file.stat().st_size:
      return 'it is empty'
  return _said(error)


def _said(error: Exception) -> str:
  if isinstance(error, Image.UnidentifiedImageError):
    return f'it is none of {", ".join(FORMATS)}, whatever its name says; save it as PNG'
  return reason(error)


def _packed(image: Image.Image) -> str:
  """Returns how pixels lie in the file, such as 'L;4' and 'RGB;16B'; known until they are loaded."""
  for tile in image.tile:
    arguments = tile[3]
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)
  return ''


def _to_mode(image: Image.Image, packed: str, mode: str) -> Image.Image:
  """Returns an image in 'L' or 'RGB', what is transparent shown white."""
  if image.mode in GREY_16:
    image = _from_16_bits(image)
  if image.mode not in MODES:
    raise ValueError(f'its pixels are of the kind {image.mode!r}, and may be of {MODES}; save it as RGB')
  clear = image.info.get('transparency')
  if clear is not None and packed in ('L;2', 'L;4'):  # PIL scales the pixels, but not the grey that is clear.
    image.info['transparency'] = clear * 255 // (2 ** int(packed[2:]) - 1)
  if clear is not None and packed == 'RGB;16B':
    raise ValueError('one of its 16-bit colours is transparent, of which 8 bits are read; save it with alpha')
  if image.has_transparency_data:
    image = on_white(image)
  return image.convert(mode)


def _from_16_bits(image: Image.Image) -> Image.Image:
  """Returns a 16-bit grey image in 8 bits; PIL's own conversion would clip at 255."""
  values, clear = np.asarray(image).astype(np.int64), image.info.get('transparency')
  if values.min() < 0 or values.max() >= 2**16:
    raise ValueError(f'its grey values are from {values.min()} to {values.max()}, and may be from 0 to 65535')
  grey = (values >> 8).astype(np.uint8)
  return Image.fromarray(grey if clear is None else np.where(values == clear, np.uint8(255), grey))
