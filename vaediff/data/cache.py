"""Resized images on disk, made once: memory-mapped uint8 arrays that need no decoding.

    <data_dir>/vaediff/<name>-<image_size>px-<crop>-<resize>-<fingerprint>/
        {train,eval}-{images,labels}.npy   meta.json

The fingerprint covers everything that affects the bytes, so another setting or another file is
another folder. A folder is written under another name and renamed when complete: whoever finds it
may read it, whatever was killed meanwhile and however many processes build it at once.
"""

import hashlib
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Mapping
from concurrent import futures
from typing import Any

import ml_collections
import numpy as np

from vaediff import places
from vaediff.data.readers import Reader, read_fitted
from vaediff.errors import UserError

FORMAT = 1  # Raise it when the same settings come to mean other bytes.
FIELDS = (
  'source',
  'name',
  'train_split',
  'eval_split',
  'image_size',
  'channels',
  'crop',
  'crop_size',
  'resize',
)
DIGITS = 12  # Of the fingerprint, hexadecimal.
CHUNK = 64  # Images per task of a thread.
MAX_LISTED = 10  # Unusable images that an error names.


def data_root(data: ml_collections.ConfigDict) -> pathlib.Path:
  """Returns where data sets lie: `data.data_dir`, or $TFDS_DATA_DIR, or ~/tensorflow_datasets."""
  for root, meant in (
    (data.data_dir, 'config.data.data_dir'),
    (os.environ.get('TFDS_DATA_DIR'), 'TFDS_DATA_DIR'),
  ):
    if root:
      return places.expanded(root, meant)
  return places.home('config.data.data_dir, or TFDS_DATA_DIR') / 'tensorflow_datasets'


def cache_prefix(data: ml_collections.ConfigDict) -> pathlib.Path:
  """Returns the cache folder's path up to the fingerprint, which needs the data."""
  name = (data.name or data.source).replace('/', '_').replace(':', '_')
  crop = f'{data.crop}{data.crop_size or ""}'
  return data_root(data) / 'vaediff' / f'{name}-{data.image_size}px-{crop}-{data.resize}-'


def is_stored(data: ml_collections.ConfigDict) -> bool:
  """Returns whether there is a copy with these settings; the files may have changed since."""
  wanted = {field: data[field] for field in ('path', *FIELDS)}
  prefix = cache_prefix(data)
  folders = prefix.parent.glob(f'{prefix.name}{"?" * DIGITS}')
  complete = [folder for folder in folders if (folder / 'train-images.npy').is_file()]
  return any(json.loads((f / 'meta.json').read_text())['data'] == wanted for f in complete)


def ensure(
  data: ml_collections.ConfigDict,
  readers: Mapping[str, Reader],
  log: Callable[[str], None],
) -> pathlib.Path:
  """Returns the cache folder of these splits, after making it if it is not there.

  Without `data.materialize` every image is still decoded once, so that a broken one is found before
  training and not in the middle of it, and only that this was done is stored.

  Raises:
    UserError: some images are broken or do not fit, or the folder cannot be written.
  """
  facts = {'format': FORMAT, 'materialize': data.materialize} | {f: data[f] for f in FIELDS}
  facts |= {split: reader.fingerprint() for split, reader in readers.items()}
  digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:DIGITS]
  folder = pathlib.Path(f'{cache_prefix(data)}{digest}')
  if (folder / 'meta.json').is_file():
    return folder
  if data.source != 'image_folder':  # One set of images: settings that fit none fail at the first.
    for reader in readers.values():
      read_fitted(reader, data, 0)
  temporary = folder.with_name(f'{folder.name}.incomplete-{uuid.uuid4().hex}')
  try:
    temporary.mkdir(parents=True)
    _build(temporary, data, readers, log)
    temporary.rename(folder)
  except OSError as error:
    if not (folder / 'meta.json').is_file():  # Else another process was first: use its folder.
      raise UserError(f"data.data_dir: cannot write '{folder}' ({error})") from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return folder


def load(folder: pathlib.Path, split: str) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
  """Returns images (memory-mapped), labels and the contents of meta.json of one split.

  Raises:
    UserError: the folder was damaged after it was made.
  """
  try:
    meta = json.loads((folder / 'meta.json').read_text())
    images = np.load(folder / f'{split}-images.npy', mmap_mode='r')
    return images, np.load(folder / f'{split}-labels.npy'), meta
  except (OSError, ValueError) as error:
    raise UserError(f"'{folder}' is damaged ({error}): delete it, it will be made again") from error


def _build(
  folder: pathlib.Path,
  data: ml_collections.ConfigDict,
  readers: Mapping[str, Reader],
  log: Callable[[str], None],
) -> None:
  failures = []
  for split, reader in readers.items():
    count, size = len(reader), data.image_size
    log(f'{"Writing" if data.materialize else "Checking"} {count} {split} images ({folder.parent}).')
    images = None
    if data.materialize:
      images = np.lib.format.open_memmap(
        folder / f'{split}-images.npy', 'w+', np.uint8, (count, size, size, data.channels)
      )
    labels = np.zeros(count, np.int32)
    failures += _convert(reader, data, images, labels)
    if data.materialize:
      np.save(folder / f'{split}-labels.npy', labels)
  if failures:
    more = len(failures) - MAX_LISTED
    listed = failures[:MAX_LISTED] + ([f'and {more} more'] if more > 0 else [])
    raise UserError(
      f'{len(failures)} images of data.path={data.path!r} (data.name={data.name!r}) cannot be used;'
      ' mend or remove them:\n  ' + '\n  '.join(listed)
    )
  meta = {
    'label_names': max((reader.label_names for reader in readers.values()), key=len),
    'num_classes': max(reader.num_classes for reader in readers.values()),
    'num_images': {split: len(reader) for split, reader in readers.items()},
    'data': {field: data[field] for field in ('path', *FIELDS)},
  }
  (folder / 'meta.json').write_text(json.dumps(meta, indent=2) + '\n')


def _convert(
  reader: Reader,
  data: ml_collections.ConfigDict,
  images: np.ndarray | None,
  labels: np.ndarray,
) -> list[str]:
  """Fills `images` and `labels` and returns what was wrong, in order."""

  def convert(first: int) -> list[str]:
    failures = []
    for i in range(first, min(first + CHUNK, len(labels))):
      try:
        image, labels[i] = read_fitted(reader, data, i)
      except UserError as error:
        failures.append(str(error))
      else:
        if images is not None:
          images[i] = image
    return failures

  with futures.ThreadPoolExecutor(max(1, data.num_threads)) as pool:
    return [text for texts in pool.map(convert, range(0, len(labels), CHUNK)) for text in texts]
