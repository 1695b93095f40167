"""Images as stored, from one npz file (`numpy.savez`)."""

import functools
import pathlib
import zipfile
import zlib
from typing import Any

import ml_collections
import numpy as np

from vaediff.data.readers import Reader, parse_split, select_shuffled, stamp
from vaediff.errors import UserError

KEYS = {'images': 'labels', 'image': 'label', 'x_train': 'y_train', 'arr_0': 'arr_1'}
"""Names of the images, and of the labels that belong to them ('labels' is always understood)."""


class NpzReader(Reader):
  """The images of `data.path`, in a fixed shuffled order, of which `data.*_split` are slices."""

  label_names: tuple[str, ...] = ()

  def __init__(self, data: ml_collections.ConfigDict, split: str):
    self._file = pathlib.Path(data.path).expanduser()
    self._field = f'{split}_split'
    self._expression = data[self._field]
    parse_split(self._expression, self._field)
    if not self._file.is_file():
      raise UserError(f"data.path={data.path!r} is no file; data.source='npz' needs a .npz file")

  @functools.cached_property
  def _content(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    images, labels = load_npz(self._file)
    indices = select_shuffled(self._expression, self._field, len(images))
    if labels is None:
      return images[indices], np.zeros(len(indices), np.int32), indices, 0
    return images[indices], labels[indices], indices, int(labels.max()) + 1

  @property
  def num_classes(self) -> int:
    """See `Reader`."""
    return self._content[3]

  def __len__(self) -> int:
    return len(self._content[0])

  def fingerprint(self) -> Any:
    """See `Reader`."""
    return stamp(self._file)

  def read(self, index: int) -> tuple[np.ndarray, int]:
    """See `Reader`."""
    images, labels, _, _ = self._content
    return images[index], int(labels[index])

  def locate(self, index: int) -> str:
    """See `Reader`."""
    return f'{self._file}, image {self._content[2][index]}'


def load_npz(file: pathlib.Path) -> tuple[np.ndarray, np.ndarray | None]:
  """Returns the images, uint8 [N, H, W, C], and labels of an npz file.

  Raises:
    UserError: the file is damaged, has no images under a known name, or not as uint8.
  """
  try:
    with zipfile.ZipFile(file):  # np.load would take a .npy or a pickle for one.
      pass
    with np.load(file) as arrays:
      return _images_and_labels(file, arrays)
  except UserError:
    raise
  except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
    raise UserError(
      f'{file} cannot be read as npz ({error}): write it with numpy.savez(file, images=...)'
    ) from error


def _images_and_labels(file: pathlib.Path, arrays: Any) -> tuple[np.ndarray, np.ndarray | None]:
  key = next((k for k in KEYS if k in arrays), None)
  if key is None:
    raise UserError(f'{file} holds {sorted(arrays)}, but images are looked for under {tuple(KEYS)}')
  images = arrays[key]
  if images.dtype != np.uint8 or images.ndim not in (3, 4):
    raise UserError(
      f'{file}: {key!r} is {images.dtype}{list(images.shape)}, but must be uint8 [N, H, W] or'
      ' [N, H, W, C]. Convert x in [0, 1] with np.round(255 * x).astype(np.uint8), x in [-1, 1]'
      ' with np.round(127.5 * (x + 1)).clip(0, 255).astype(np.uint8), and channels that come first'
      ' with x.transpose(0, 2, 3, 1)'
    )
  images = images[..., None] if images.ndim == 3 else images
  label_key = next((k for k in ('labels', KEYS[key]) if k in arrays), None)
  if label_key is None:
    return images, None
  labels = arrays[label_key]
  if labels.shape != (len(images),) or labels.dtype.kind not in 'iu' or labels.min(initial=0) < 0:
    raise UserError(
      f'{file}: {label_key!r} is {labels.dtype}{list(labels.shape)}, but must be one non-negative'
      f' integer per image, [{len(images)}]'
    )
  return images, labels
