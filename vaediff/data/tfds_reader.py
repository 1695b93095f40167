"""Images as stored, from TensorFlow Datasets on disk (array_record), without TensorFlow."""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
import tensorflow_datasets as tfds

from vaediff.data import paths
from vaediff.data.builders import OWN_BUILDERS, check_emoji_package
from vaediff.data.cache import data_root
from vaediff.data.readers import Example, Reader, Stretch, stamps
from vaediff.errors import UserError
from vaediff.storage import files


class TfdsReader(Reader):
  """One split of a TFDS data set; those of our own are built if they are not there yet."""

  def __init__(self, data: ml_collections.ConfigDict, split: str, log: Callable[[str], None]):
    field = f'{split}_split'
    self._name, self._expression = data.name, data[field]
    builder = open_builder(data, log)
    self._mend = mend(data, builder)
    try:
      self._records = builder.as_data_source(split=self._expression)
      count = len(self._records)
      self._parts = _parts(builder, self._expression)
    except NotImplementedError as error:
      state = 'is there, but in another format' if builder.is_prepared() else 'is not there yet'
      raise UserError(
        f'data.name={data.name!r}: TFDS data in array_record format is needed, and'
        f' {builder.data_dir} {state}. {how_to_get(data.name, data_root(data))}'
      ) from error
    except (ValueError, KeyError, AssertionError) as error:
      counts = [split.num_examples for split in builder.info.splits.values()]
      if not builder.is_prepared() or min(counts, default=0) < 1:
        raise files.Damaged(
          f"'{builder.data_dir}' has no dataset_info.json with splits that hold images; {self._mend}"
        ) from error
      raise UserError(
        f'data.{field}={self._expression!r} is no split of {data.name} ({error}); it has'
        f' {sorted(builder.info.splits)}'
      ) from error
    if not count or any(part.take <= 0 for part in self._parts):
      raise UserError(
        f'data.{field}={self._expression!r} selects no image of {data.name}, or a part without one'
      )
    features = builder.info.features
    label = features['label'] if 'label' in features else None
    self._has_labels = isinstance(label, tfds.features.ClassLabel)
    self.label_names = tuple(label.names) if self._has_labels else ()
    self.num_classes = label.num_classes if self._has_labels else 0
    self._caption = caption_feature(data, features)
    self.has_captions = bool(self._caption)
    self._builder = builder

  def __len__(self) -> int:
    return len(self._records)

  def fingerprint(self) -> Any:
    """See `Reader`."""
    # Shards tell apart two preparations of one version, as when a user's source files changed.
    splits = self._builder.info.splits
    shards = {name: [splits[name].num_bytes, list(splits[name].shard_lengths)] for name in splits}
    parts = sorted({pathlib.Path(part.filename) for part in self._parts})
    for file in parts:
      if not paths.is_file(file):
        raise files.Damaged(f'{file} is missing; {self._mend}')
    return [self._builder.info.full_name, shards, stamps(parts)]

  def stretches(self) -> Sequence[Stretch]:
    """See `Reader`."""
    return [(part.filename, part.skip, part.skip + part.take) for part in self._parts]

  def read(self, index: int) -> Example:
    """See `Reader`."""
    try:
      example = self._records[index]
    except Exception as error:  # Whatever the reader of records and the decoder of images raise.
      file = self._file(index)
      with files.reading(file, self._mend):
        with open(file, 'rb') as content:  # What the system refuses is no damage.
          content.read(1)
        raise ValueError(f'image {index} of {self._expression}: {files.reason(error)}') from error
    label = int(example['label']) if self._has_labels else 0
    if not self._caption:
      return Example(example['image'], label)
    text = example[self._caption]
    try:
      return Example(example['image'], label, text.decode() if isinstance(text, bytes) else str(text))
    except UnicodeDecodeError as error:
      raise UserError(
        f'{self.locate(index)}: its caption is no UTF-8 text ({files.reason(error)})'
      ) from error

  def _file(self, index: int) -> pathlib.Path:
    """Returns the file of an image."""
    for part in self._parts:
      if index < part.take:
        return pathlib.Path(part.filename)
      index -= part.take
    return pathlib.Path(self._builder.data_dir)

  def locate(self, index: int) -> str:
    """See `Reader`."""
    return f'{self._name}, image {index} of {self._expression}'


def caption_feature(data: ml_collections.ConfigDict, features: tfds.features.FeaturesDict) -> str:
  """Returns the name of the feature that holds captions; '' where none are asked for.

  Raises:
    UserError: when there is no such feature, or it is not one text for each image; lists those that are.
  """
  name = data.caption_feature
  texts = [key for key, feature in features.items() if isinstance(feature, tfds.features.Text)]
  if name and name not in texts:
    is_there = 'is not one text for each image' if name in features else 'is no feature'
    raise UserError(
      f'data.caption_feature={name!r} {is_there} of {data.name}; texts are {", ".join(texts) or "none there"}'
    )
  return name


def open_builder(data: ml_collections.ConfigDict, log: Callable[[str], None]) -> tfds.core.DatasetBuilder:
  """Returns the TFDS builder of `data.name`, after building the data set if it is one of our own.

  Raises:
    UserError: TFDS knows no such name, or what a builder of our own reads is missing.
  """
  root = data_root(data)
  if data.name.split('/')[0] in OWN_BUILDERS:
    return _build(data, root, log)
  try:
    return tfds.builder(data.name, data_dir=root)
  except Exception as error:  # Whatever its parsers of names, of JSON and of messages raise.
    _check_stored(root / data.name.replace(':', '/'), mend_folder(data.name, root), error)
    raise UserError(
      f'data.name={data.name!r} cannot be opened by TFDS ({files.reason(error)}); write NAME or NAME/CONFIG'
      " as in https://www.tensorflow.org/datasets/catalog, such as 'cifar10' or 'celeb_a_hq/256', or"
      f' one of {tuple(OWN_BUILDERS)}'
    ) from error


def _build(
  data: ml_collections.ConfigDict, root: pathlib.Path, log: Callable[[str], None]
) -> tfds.core.DatasetBuilder:
  name, _, chosen = data.name.partition('/')
  valid = [f'{name}/{config}' for config in OWN_BUILDERS[name].builder_configs] or [name]
  if data.name not in valid:
    raise UserError(f'data.name={data.name!r} is no data set of its own; valid: {", ".join(valid)}')
  options = {'config': chosen} if chosen else {}
  make = functools.partial(OWN_BUILDERS[name], data_dir=root, file_format='array_record', **options)
  builder = _made(make, data.name, root)
  if builder.is_prepared():
    return builder
  package = check_emoji_package(data.path) if data.name == 'noto_emoji' else None
  log(f'Building {data.name} in {builder.data_dir}.')
  config = tfds.download.DownloadConfig(manual_dir=package)
  tfds.disable_progress_bar()
  try:
    builder.download_and_prepare(download_config=config)
  except OSError as error:
    # TFDS writes to a folder of its own and renames it: another process may have been first.
    if not _made(make, data.name, root).is_prepared():
      raise UserError(
        f"data.data_dir: '{error.filename or root}' cannot be written: {files.reason(error)}. Make room or"
        ' name another folder'
      ) from error
  return _made(make, data.name, root)


def _made(
  make: Callable[[], tfds.core.DatasetBuilder], name: str, root: pathlib.Path
) -> tfds.core.DatasetBuilder:
  """Returns a builder of our own; it reads what is stored."""
  try:
    return make()
  except Exception as error:  # Whatever its parsers raise of a damaged file.
    _check_stored(root / name, mend_folder(name, root), error)
    raise UserError(
      f"data.data_dir: {name} cannot be opened in '{root}': {files.reason(error)}; {mend_folder(name, root)}"
    ) from error


def _check_stored(folder: pathlib.Path, remedy: str, error: Exception) -> None:
  """Names the file that is to blame where TFDS cannot open what is stored; does nothing where none is there.

  Raises:
    Damaged: naming the file.
    UserError: the system does not let it be read.
  """
  if not paths.is_folder(folder):
    return
  for file in sorted(folder.rglob('dataset_info.json')) + sorted(folder.rglob('features.json')):
    files.read_json(file, remedy)
  for file in sorted(folder.rglob('dataset_info.json')):
    raise files.Damaged(f'{file} is damaged ({files.reason(error)}); {remedy}') from error


def _parts(builder: tfds.core.DatasetBuilder, expression: str) -> list[Any]:
  """Returns which images of which files a split selects; [] where TFDS makes them up (its own mock data)."""
  splits = builder.info.splits
  return list(splits[expression].file_instructions) if splits else []


def mend(data: ml_collections.ConfigDict, builder: tfds.core.DatasetBuilder) -> str:
  """Returns what to do about damaged records."""
  return mend_folder(data.name, data_root(data), pathlib.Path(builder.data_dir))


def mend_folder(name: str, root: pathlib.Path, folder: pathlib.Path | None = None) -> str:
  """Returns what to do about a damaged file of a TFDS data set."""
  own = name.split('/')[0] in OWN_BUILDERS
  again = 'it is built again' if own else f'make it again. {how_to_get(name, root)}'
  return f"delete its folder '{folder or root / name.replace(':', '/')}': {again}"


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
  return f"Run once: pip install -e '.[prepare]' && {command}.{hint}"
