"""Images as stored, from TensorFlow Datasets on disk (array_record), without TensorFlow."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import ml_collections
import numpy as np
import tensorflow_datasets as tfds

from vaediff.data.builders import OWN_BUILDERS, check_emoji_package
from vaediff.data.cache import data_root
from vaediff.data.readers import Reader
from vaediff.errors import UserError


class TfdsReader(Reader):
  """One split of a TFDS data set; `digits` and `noto_emoji` are built if they are not there yet."""

  def __init__(self, data: ml_collections.ConfigDict, split: str, log: Callable[[str], None]):
    field = f'{split}_split'
    self._name, self._expression = data.name, data[field]
    builder = open_builder(data, log)
    try:
      self._records = builder.as_data_source(split=self._expression)
      count = len(self._records)
    except NotImplementedError as error:
      state = 'is there, but in another format' if builder.is_prepared() else 'is not there yet'
      raise UserError(
        f'data.name={data.name!r}: TFDS data in array_record format is needed, and'
        f' {builder.data_dir} {state}. {how_to_get(data.name, data_root(data))}'
      ) from error
    except (ValueError, KeyError, AssertionError) as error:
      raise UserError(
        f'data.{field}={self._expression!r} is no split of {data.name} ({error}); it has'
        f' {sorted(builder.info.splits)}'
      ) from error
    if not count:
      raise UserError(f'data.{field}={self._expression!r} selects no image of {data.name}')
    features = builder.info.features
    label = features['label'] if 'label' in features else None
    self._has_labels = isinstance(label, tfds.features.ClassLabel)
    self.label_names = tuple(label.names) if self._has_labels else ()
    self.num_classes = label.num_classes if self._has_labels else 0
    self._builder = builder

  def __len__(self) -> int:
    return len(self._records)

  def fingerprint(self) -> Any:
    """See `Reader`."""
    # Shards tell apart two preparations of one version, as when a user's source files changed.
    splits = self._builder.info.splits
    shards = {name: [splits[name].num_bytes, list(splits[name].shard_lengths)] for name in splits}
    return [self._builder.info.full_name, shards]

  def read(self, index: int) -> tuple[np.ndarray, int]:
    """See `Reader`."""
    example = self._records[index]
    return example['image'], int(example['label']) if self._has_labels else 0

  def locate(self, index: int) -> str:
    """See `Reader`."""
    return f'{self._name}, image {index} of {self._expression}'


def open_builder(data: ml_collections.ConfigDict, log: Callable[[str], None]) -> tfds.core.DatasetBuilder:
  """Returns the TFDS builder of `data.name`, after building the data set if it is one of our own.

  Raises:
    UserError: TFDS knows no such name, or what a builder of our own reads is missing.
  """
  root = data_root(data)
  if data.name in OWN_BUILDERS:
    return _build(data, root, log)
  try:
    return tfds.builder(data.name, data_dir=root)
  except (ValueError, RuntimeError, ImportError, AssertionError) as error:
    reason = str(error).splitlines()[0]
    raise UserError(
      f'data.name={data.name!r} cannot be opened by TFDS ({reason}); write NAME or NAME/CONFIG as'
      " in https://www.tensorflow.org/datasets/catalog, such as 'cifar10' or 'celeb_a_hq/256', or"
      f' one of {tuple(OWN_BUILDERS)}'
    ) from error


def _build(
  data: ml_collections.ConfigDict, root: pathlib.Path, log: Callable[[str], None]
) -> tfds.core.DatasetBuilder:
  make = functools.partial(OWN_BUILDERS[data.name], data_dir=root, file_format='array_record')
  builder = make()
  if builder.is_prepared():
    return builder
  package = check_emoji_package(data.path) if data.name == 'noto_emoji' else None
  log(f'Building {data.name} in {builder.data_dir}.')
  config = tfds.download.DownloadConfig(manual_dir=package)
  tfds.disable_progress_bar()
  try:
    builder.download_and_prepare(download_config=config)
  except PermissionError as error:
    raise UserError(f"data.data_dir: cannot write to '{root}' ({error})") from error
  except OSError:
    # TFDS writes to a folder of its own and renames it: another process may have been first.
    if not make().is_prepared():
      raise
  return make()


def how_to_get(name: str, root: pathlib.Path) -> str:
  """Returns what to run, once and in an environment with TensorFlow, to have a TFDS data set."""
  command = f'tfds build {name} --data_dir={root} --file_format=array_record'
  size = name.split('/')[-1].split(':')[0]
  hints = {
    'celeb_a_hq': f'First put data{size}x{size}.tar (CelebA-HQ, made as its authors describe) into'
    ' a folder, and add --manual_dir=THAT_FOLDER to the command.',
    'lsun': 'TFDS also needs `pip install tensorflow_io` for it; or export the images to files and'
    " use data.source='image_folder'.",
    'fashion_mnist': 'Without TensorFlow: apt-get install dataset-fashion-mnist, then'
    " data.source='idx' and data.path='/usr/share/datasets/fashion-mnist'.",
  }
  base = name.split('/')[0].split(':')[0]
  hint = f' {hints[base]}' if base in hints else ''
  return f"Run once: pip install 'vaediff[prepare]' && {command}.{hint}"
