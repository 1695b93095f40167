"""Pictures that a user names, as images of the data: decoded, cropped and resized as `config.data` says."""

import ml_collections
import numpy as np
from jaxtyping import UInt8

from vaediff.data import folder, resize
from vaediff.errors import UserError
from vaediff.storage import places


def read(
  paths: str, data: ml_collections.ConfigDict, field: str
) -> UInt8[np.ndarray, 'n size size channels']:
  """Returns the pictures of files, joined by commas.

  Args:
    paths: of PNG, JPEG, WebP or BMP files.
    data: `config.data`.
    field: that named them, for messages.

  Raises:
    UserError: when one cannot be read, or does not fit the data; names it and the field.
  """
  found = []
  for path in filter(None, (path.strip() for path in paths.split(','))):
    try:
      found.append(resize.fit(folder.decode(places.expanded(path, field), data.channels), data))
    except UserError as error:
      raise UserError(f'{field}: {path}: {error}') from error
  if not found:
    raise UserError(f'{field} is {paths!r}: it names no file')
  return np.stack(found)
