"""Captions of a folder of images: one file in it that names each image and has a text for it.

    captions.jsonl, metadata.jsonl    {"file_name": "cats/1.png", "text": "a cat"} in each line
    metadata.csv                      a first line of names, such as file_name,text

That is the layout of image folders of Hugging Face's `datasets`. Paths are relative to the folder.
"""

import csv
import json
import pathlib
from collections.abc import Collection, Iterator
from typing import Any

from vaediff.data import paths
from vaediff.errors import UserError
from vaediff.storage import files

FILES = ('captions.jsonl', 'metadata.jsonl', 'metadata.csv')
FILE_NAME = 'file_name'
MEND = 'mend it, or leave data.caption_feature empty'
MAX_LISTED = 10  # Images that an error names.


def find(root: pathlib.Path, shown: str) -> pathlib.Path:
  """Returns the file with the captions of a folder; `shown` is the folder as the user wrote it.

  Raises:
    UserError: when there is none, or more than one.
  """
  found = [root / name for name in FILES if paths.is_file(root / name)]
  if len(found) != 1:
    there = f'both {found[0].name} and {found[1].name}' if found else 'none of them'
    raise UserError(
      f'data.caption_feature is set, and data.path={shown!r} has {there}: captions are read of one file'
      f' there,'
      f' {", ".join(FILES)}'
    )
  return found[0]


def captions(file: pathlib.Path, feature: str, images: Collection[str]) -> dict[str, str]:
  """Returns the caption of each image by its path in the folder; lines of other files are left out.

  Args:
    file: of `FILES`.
    feature: the name of the captions in it.
    images: that must have one.

  Raises:
    UserError: when the file cannot be read, has no such captions, two for an image, or none.
  """
  wanted, found = set(images), {}
  with files.reading(file, MEND):
    for number, row in _rows(file):
      if FILE_NAME not in row or feature not in row:
        have = ', '.join(map(repr, row))
        missing = FILE_NAME if FILE_NAME not in row else feature
        raise UserError(
          f'{file}, line {number}: has no {missing!r} but {have}; every line names an image by'
          f' {FILE_NAME!r} and'
          f' has its caption under the name in data.caption_feature={feature!r}'
        )
      name, text = row[FILE_NAME], row[feature]
      if not isinstance(name, str) or not isinstance(text, str):
        raise UserError(
          f'{file}, line {number}: {FILE_NAME!r} and {feature!r} must be texts, one caption each'
        )
      name = str(pathlib.PurePosixPath(name))
      if name in found:
        raise UserError(f'{file}, line {number}: {name} has a caption already; leave one for each image')
      if name in wanted:
        found[name] = text
  missing = sorted(wanted - found.keys())
  if missing:
    more = f' and {len(missing) - MAX_LISTED} more' if len(missing) > MAX_LISTED else ''
    raise UserError(
      f'{file}: {len(missing)} of the {len(wanted)} images have no caption:'
      f' {", ".join(missing[:MAX_LISTED])}{more};'
      ' add them, or move the images away'
    )
  return found


def _rows(file: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields each row with the number of its line."""
  with open(file, encoding='utf-8', newline='') as lines:
    if file.suffix == '.csv':
      table = csv.DictReader(lines, strict=True)
      for row in table:
        if None in row or None in row.values():
          raise ValueError(f'line {table.line_num} has another number of fields than the first')
        yield table.line_num, row
      return
    for number, line in enumerate(lines, 1):
      if line.strip():
        row = json.loads(line)
        if not isinstance(row, dict):
          raise ValueError(f'line {number} is no object')
        yield number, row
