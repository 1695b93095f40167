"""Images as stored, from parquet files in the layout of Hugging Face's `datasets`, through pyarrow.

    data.path/                          or data.path/data/, or one file
      train-00000-of-00002.parquet      columns image {bytes, path}, label, and texts
      test-00000-of-00001.parquet

The split of a file is the word before its first '-' or '.'. What a column is, and the names of classes, stand
in the schema of the files; where they do not, the image is the first column with `bytes` in it.
"""

import bisect
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np

from vaediff.data import paths
from vaediff.data.folder import decode
from vaediff.data.readers import Example, Reader, Stretch, parse_split, select, stamps
from vaediff.errors import UserError
from vaediff.storage import files, places

SUFFIX = '.parquet'
MEND = 'get it again'
MOST_OPEN = 4  # Groups of rows in memory.


class ParquetReader(Reader):
  """The rows that `data.*_split` select of the files of a split, in their order."""

  def __init__(self, data: ml_collections.ConfigDict, split: str):
    self._pq = _library()
    field = f'{split}_split'
    self._expression, self._channels = data[field], data.channels
    name, _, _ = parse_split(self._expression, field)
    self._files = find(places.fetched(data.path, 'data.path'), data.path, name, field)
    self._groups = []  # file, number of the group in it
    self._starts = [0]
    for file in self._files:
      with files.reading(file, MEND):
        meta = self._pq.read_metadata(file)
        for group in range(meta.num_row_groups):
          self._groups.append((file, group))
          self._starts.append(self._starts[-1] + meta.row_group(group).num_rows)
    self._rows = select(self._expression, field, self._starts[-1])
    with files.reading(self._files[0], MEND):
      self._schema = self._pq.read_schema(self._files[0])
      features = features_of(self._schema)
    self._image = image_column(self._files[0], self._schema, features)
    self._label, self.label_names = label_column(self._schema, features)
    self.num_classes = len(self.label_names) or self._count_labels()
    self._caption = text_column(self._files[0], self._schema, data.caption_feature)
    self.has_captions = bool(self._caption)
    self._group = functools.lru_cache(MOST_OPEN)(self._read_group)

  def __len__(self) -> int:
    return len(self._rows)

  def fingerprint(self) -> Any:
    """See `Reader`."""
    return [stamps(self._files), self._rows.start, self._rows.stop]

  def stretches(self) -> Sequence[Stretch]:
    """See `Reader`."""
    return [(str(self._files[0]), self._rows.start, self._rows.stop)]

  def read(self, index: int) -> Example:
    """See `Reader`."""
    row = self._rows[index]
    number = bisect.bisect_right(self._starts, row) - 1
    columns, row = self._group(number), row - self._starts[number]
    content = columns[self._image][row]
    content = content['bytes'] if isinstance(content, dict) else content
    if not isinstance(content, bytes):
      raise UserError(f'{self.locate(index)} has no bytes of an image in {self._image!r}; {MEND}')
    label = columns[self._label][row] if self._label else 0
    caption = columns[self._caption][row] if self._caption else ''
    for name, value, kind in ((self._label, label, int), (self._caption, caption, str)):
      if not isinstance(value, kind):
        raise UserError(f'{self.locate(index)} has {value!r} in {name!r}, and must have a value there')
    return Example(decode(pathlib.Path(self.locate(index)), self._channels, content), label, caption)

  def locate(self, index: int) -> str:
    """See `Reader`."""
    return f'{self._files[0].parent}, image {index} of {self._expression}'

  def _read_group(self, number: int) -> dict[str, list[Any]]:
    """Returns the columns that are read of a group of rows."""
    file, group = self._groups[number]
    wanted = [name for name in (self._image, self._label, self._caption) if name]
    with files.reading(file, MEND):
      table = self._pq.ParquetFile(file).read_row_group(group, columns=wanted)
      return {name: table.column(name).to_pylist() for name in wanted}

  def _count_labels(self) -> int:
    """Returns one more than the largest label of all files; 0 without labels."""
    if not self._label:
      return 0
    largest = 0
    for file in self._files:
      with files.reading(file, MEND):
        column = self._pq.read_table(file, columns=[self._label]).column(0).to_numpy()
      largest = max(largest, int(np.max(column, initial=0)))
    return largest + 1


def _library() -> Any:
  """Returns the module that reads the files.

  Raises:
    UserError: when it is not installed.
  """
  try:
    from pyarrow import parquet
  except ImportError as error:
    raise UserError("data.source='parquet' needs the package pyarrow: pip install pyarrow") from error
  return parquet


def find(place: pathlib.Path, shown: str, split: str, field: str) -> list[pathlib.Path]:
  """Returns the files of a split, in order.

  Raises:
    UserError: when there are none; lists the splits that there are.
  """
  if shown and paths.is_file(place):
    found = [place]
  else:
    inside = [folder for folder in (place, place / 'data') if shown and paths.is_folder(folder)]
    found = sorted(file for folder in inside for file in folder.glob(f'*{SUFFIX}') if paths.is_file(file))
  if not found:
    raise UserError(
      f"data.path={shown!r} is no {SUFFIX} file and no folder with such files, in it or in its folder 'data';"
      " data.source='parquet' needs one"
    )
  by_split: dict[str, list[pathlib.Path]] = {}
  for file in found:
    by_split.setdefault(file.name.split('.')[0].split('-')[0], []).append(file)
  if split not in by_split:
    raise UserError(
      f'data.{field} is of {split!r}, but data.path={shown!r} has files of {", ".join(sorted(by_split))};'
      f' slices'
      " such as 'train[:95%]' and 'train[95%:]' make two splits of one"
    )
  return by_split[split]


def features_of(schema: Any) -> dict[str, Any]:
  """Returns what `datasets` says of each column; {} where it does not."""
  said = (schema.metadata or {}).get(b'huggingface')
  if said is None:
    return {}
  features = json.loads(said)['info']['features']
  return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


def image_column(file: pathlib.Path, schema: Any, features: dict[str, Any]) -> str:
  """Returns the name of the column with images.

  Raises:
    UserError: when there is none.
  """
  import pyarrow as pa

  said = [
    name for name, feature in features.items() if feature.get('_type') == 'Image' and name in schema.names
  ]
  holding = [
    field.name for field in schema if pa.types.is_struct(field.type) and 'bytes' in _names(field.type)
  ]
  plain = [field.name for field in schema if pa.types.is_binary(field.type)]
  if not (said or holding or plain):
    raise UserError(
      f'{file} has the columns {", ".join(schema.names)}, and none of images: a struct with the field bytes'
    )
  return (said or holding or plain)[0]


def _names(kind: Any) -> list[str]:
  return [kind.field(i).name for i in range(kind.num_fields)]


def label_column(schema: Any, features: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
  """Returns the name of the column with labels, or '', and the names of the classes, or ()."""
  import pyarrow as pa

  for name, feature in features.items():
    if feature.get('_type') == 'ClassLabel' and name in schema.names:
      return name, tuple(map(str, feature.get('names') or ()))
  is_number = 'label' in schema.names and pa.types.is_integer(schema.field('label').type)
  return ('label' if is_number else ''), ()


def text_column(file: pathlib.Path, schema: Any, feature: str) -> str:
  """Returns the name of the column with captions; '' where none are asked for.

  Raises:
    UserError: when it is none of the texts; lists them.
  """
  import pyarrow as pa

  is_text = lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind)
  texts = [field.name for field in schema if is_text(field.type)]
  if feature and feature not in texts:
    raise UserError(
      f'data.caption_feature={feature!r} is no text column of {file}; those are {", ".join(texts) or "none"}'
    )
  return feature
