"""Resized images on disk, made once: memory-mapped uint8 arrays that need no decoding.

    <data_dir>/vaediff/<name>-<image_size>px-<crop>-<resize>-<key>/
        {train,eval}-{images,labels}.npy   {train,eval}-captions.json   meta.json

The key covers everything that affects the bytes, so another setting or another file is another folder. A
folder is written under another name and renamed when complete: whoever finds it may read it, whatever was
killed meanwhile and however many processes build it at once. meta.json has shape, type and digests of the
arrays, which are compared when they are opened, and the fingerprint of each split: what its images are, by
content. Captions are no part of it: a network that reads images and labels alone does not depend on them.
They have a digest of their own, and are stored without `data.materialize` too.
"""

import contextlib
import glob
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

from vaediff.data import arrays, paths, resize
from vaediff.data.readers import Reader, check_readers, read_fitted
from vaediff.errors import UserError
from vaediff.storage import files, identity, places

FORMAT = 3  # Raise it when the same settings come to mean other bytes, or meta.json another form.
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
  'caption_feature',
)
DIGITS = 12  # Of the key, hexadecimal.
MAX_LISTED = 10  # Unusable images that an error names.
META = 'meta.json'


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
  """Returns the cache folder's path up to the key, which needs the data."""
  name = (data.name or data.source).replace('/', '_').replace(':', '_')
  crop = f'{data.crop}{data.crop_size or ""}'
  return data_root(data) / 'vaediff' / f'{name}-{data.image_size}px-{crop}-{data.resize}-'


def is_stored(data: ml_collections.ConfigDict) -> bool:
  """Returns whether there is a copy with these settings; the files may have changed since."""
  wanted = {'format': FORMAT, 'data': {field: data[field] for field in ('path', *FIELDS)}}
  prefix = cache_prefix(data)
  folders = prefix.parent.glob(f'{glob.escape(prefix.name)}{"?" * DIGITS}')
  complete = [folder for folder in folders if (folder / 'train-images.npy').is_file()]
  for folder in complete:
    with contextlib.suppress(UserError):  # One that was changed is named when it is opened, if it ever is.
      if wanted.items() <= read_meta(folder).items():
        return True
  return False


def ensure(
  data: ml_collections.ConfigDict,
  readers: Mapping[str, Reader],
  log: Callable[[str], None],
) -> pathlib.Path:
  """Returns the cache folder of these splits, after making it if it is not there.

  Without `data.materialize` every image is still decoded once, so that a broken one is found before
  training and not in the middle of it, and so that the fingerprint is known; no array is stored.

  Raises:
    UserError: some images are broken or do not fit, the splits share images, or the folder cannot be written.
  """
  facts = {'format': FORMAT, 'materialize': data.materialize} | {f: data[f] for f in FIELDS}
  facts |= {split: reader.fingerprint() for split, reader in readers.items()}
  digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:DIGITS]
  folder = pathlib.Path(f'{cache_prefix(data)}{digest}')
  if paths.is_file(folder / META):
    return folder
  if paths.is_folder(folder):
    raise files.Damaged(f'{folder / META} is missing; {_mend(folder)}')
  check_readers(readers, data)
  if data.source != 'image_folder':  # One set of images: settings that fit none fail at the first.
    for reader in readers.values():
      for index in (0, len(reader) - 1):  # The last: a wrong count, before room is made for so many.
        read_fitted(reader, data, index)
  temporary = folder.with_name(f'{folder.name}.incomplete-{uuid.uuid4().hex}')
  try:
    temporary.mkdir(parents=True)
    _build(temporary, data, readers, log)
    temporary.rename(folder)
  except OSError as error:
    if not (folder / META).is_file():  # Else another process was first: use its folder.
      raise UserError(
        f"data.data_dir: '{error.filename or folder}' cannot be written: {files.reason(error)}. Make room or"
        ' name another folder; nothing was left there'
      ) from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return folder


def read_meta(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the contents of meta.json.

  Raises:
    Damaged: it was changed after it was made.
  """
  meta = files.read_json(folder / META, _mend(folder))
  with files.reading(folder / META, _mend(folder)):
    identity.unsealed(meta)
  return meta


def load(folder: pathlib.Path, split: str) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
  """Returns images (memory-mapped), labels and the contents of meta.json of one split.

  Raises:
    Damaged: the folder was changed after it was made; the message says which file, and to delete the folder.
  """
  meta, mend = read_meta(folder), _mend(folder)
  facts = meta['splits'][split]
  count = facts['shape'][0]
  images = arrays.open_array(
    images_file(folder, split), tuple(facts['shape']), np.uint8, facts['images'], mend
  )
  labels = np.array(arrays.open_array(labels_file(folder, split), (count,), np.int32, facts['labels'], mend))
  if labels.min() < 0 or labels.max() >= max(1, meta['num_classes']):
    raise files.Damaged(
      f'{labels_file(folder, split)} is damaged (labels in [{labels.min()}, {labels.max()}] of'
      f' {meta["num_classes"]} classes); {mend}'
    )
  return images, labels, meta


def load_captions(folder: pathlib.Path, split: str) -> tuple[str, ...]:
  """Returns the caption of each image of a split, in order; () where none are stored.

  Raises:
    Damaged: the folder was changed after it was made; the message says which file, and to delete the folder.
  """
  facts, path, mend = read_meta(folder)['splits'][split], captions_file(folder, split), _mend(folder)
  if 'captions' not in facts:
    return ()
  if not paths.is_file(path):
    raise files.Damaged(f'{path} is missing; {mend}')
  captions = files.read_json(path, mend)
  with files.reading(path, mend):
    if arrays.digest_of_texts(captions) != facts['captions']:
      raise ValueError('it was changed after it was made: its digest is that of other captions')
  return tuple(captions)


def images_file(folder: pathlib.Path, split: str) -> pathlib.Path:
  """Returns where the images of a split are."""
  return folder / f'{split}-images.npy'


def labels_file(folder: pathlib.Path, split: str) -> pathlib.Path:
  """Returns where the labels of a split are."""
  return folder / f'{split}-labels.npy'


def captions_file(folder: pathlib.Path, split: str) -> pathlib.Path:
  """Returns where the captions of a split are, if it has any."""
  return folder / f'{split}-captions.json'


def _mend(folder: pathlib.Path) -> str:
  return f"delete its folder '{folder}': it is made again"


def _build(
  folder: pathlib.Path,
  data: ml_collections.ConfigDict,
  readers: Mapping[str, Reader],
  log: Callable[[str], None],
) -> None:
  failures, splits = [], {}
  for split, reader in readers.items():
    log(f'{"Writing" if data.materialize else "Checking"} {len(reader)} {split} images ({folder.parent}).')
    splits[split], wrong = _build_split(folder, split, data, reader)
    failures += wrong
  if failures:
    more = len(failures) - MAX_LISTED
    listed = failures[:MAX_LISTED] + ([f'and {more} more'] if more > 0 else [])
    raise UserError(
      f'{len(failures)} images of data.path={data.path!r} (data.name={data.name!r}) cannot be used;'
      ' mend or remove them:\n  ' + '\n  '.join(listed)
    )
  meta = {
    'format': FORMAT,
    'label_names': max((reader.label_names for reader in readers.values()), key=len),
    'num_classes': max(reader.num_classes for reader in readers.values()),
    'splits': splits,
    'data': {field: data[field] for field in ('path', *FIELDS)},
  }
  meta = identity.sealed(meta)
  (folder / META).write_text(json.dumps(meta, indent=2) + '\n')


def _build_split(
  folder: pathlib.Path, split: str, data: ml_collections.ConfigDict, reader: Reader
) -> tuple[dict[str, Any], list[str]]:
  """Writes what is stored of one split; returns what meta.json says of it, and what was wrong, in order."""
  shape = (len(reader), *resize.image_shape(data))
  labels, captions = np.zeros(len(reader), np.int32), [''] * len(reader)
  if data.materialize:
    with arrays.Writer(images_file(folder, split), shape, np.uint8) as writer:
      parts, failures = _convert(reader, data, labels, captions, writer.write)
    with arrays.Writer(labels_file(folder, split), labels.shape, np.int32) as writer:
      writer.write(0, labels)
  else:
    parts, failures = _convert(reader, data, labels, captions, lambda first, rows: None)
  digests = {'images': arrays.join(shape, np.uint8, parts), 'labels': arrays.digest_of(labels)}
  fingerprint = arrays.of_split(**digests)
  facts = {'count': len(reader), 'shape': shape, 'dtype': 'uint8', 'fingerprint': fingerprint, **digests}
  if data.caption_feature:
    facts['captions'] = arrays.digest_of_texts(captions)
    captions_file(folder, split).write_text(json.dumps(captions, indent=0) + '\n', encoding='utf-8')
  return facts, failures


def _convert(
  reader: Reader,
  data: ml_collections.ConfigDict,
  labels: np.ndarray,
  captions: list[str],
  write: Callable[[int, np.ndarray], None],
) -> tuple[list[bytes], list[str]]:
  """Fills labels and captions, writes the images.

  Returns:
    The sha256 of each part, and what was wrong, in order.
  """

  def convert(first: int) -> tuple[bytes, list[str]]:
    failures, part = [], hashlib.sha256()
    for i in range(first, min(first + arrays.ROWS, len(labels))):
      try:
        image, labels[i], captions[i] = read_fitted(reader, data, i)
      except UserError as error:
        failures.append(str(error))
      else:
        part.update(np.ascontiguousarray(image))
        write(i, image[None])
    return part.digest(), failures

  with futures.ThreadPoolExecutor(max(1, data.num_threads)) as pool:
    done = list(pool.map(convert, range(0, len(labels), arrays.ROWS)))
  return [part for part, _ in done], [text for _, texts in done for text in texts]
