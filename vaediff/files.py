"""Files that are written at once: a kill leaves the old file or the new one, never half of it."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a path to write to, which takes the place of `path` once that is done; makes the folder."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  try:
    yield temporary
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a text file."""
  with replacing(path) as temporary:
    temporary.write_text(text, encoding='utf-8')


def write_json(path: pathlib.Path, value: Any, **options: Any) -> None:
  """Writes a JSON file, indented; `options` are those of `json.dumps`."""
  write_text(path, json.dumps(value, indent=2, **options))


def write_npz(path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
  """Writes arrays as npz, uncompressed."""
  with replacing(path) as temporary, open(temporary, 'wb') as file:
    np.savez(file, **arrays)
