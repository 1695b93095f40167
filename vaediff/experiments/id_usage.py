"""Which ids a tokenizer has made of the training images: whether a prior can learn anything of them."""

import numpy as np

from vaediff.errors import UserError
from vaediff.spaces import tokenizers

LEAST_PERPLEXITY = 2.0
"""Of the ids of a level: below it there is nothing to learn, and samples of the lower levels are noise."""
ROWS = 2**16
"""Images whose ids are counted at a time."""


def check(name: str, ids: np.ndarray, size: int, stage: str) -> None:
  """Raises UserError when the ids of a level of a tokenizer cannot be learned.

  Args:
    name: of the ids.
    ids: of all training images, [images, ...].
    size: how many codes there are: ids are in 0 ... `size` - 1.
    stage: the tokenizer.

  Raises:
    UserError: for an id that is no code, or ids with a perplexity below `LEAST_PERPLEXITY`.
  """
  counts = counts_of(name, ids, size)
  found = tokenizers.perplexity(counts / counts.sum())
  if found < LEAST_PERPLEXITY:
    raise UserError(
      f'the ids {name!r} of the tokenizer {stage!r} have a perplexity of {found:.3g} over the training '
      f'images, of {size} codes; it must be at least {LEAST_PERPLEXITY:g}: the level says next to nothing of '
      'an image. Train the tokenizer anew, with fewer levels, fewer codes, or loss.restart_below above 0'
    )


def counts_of(name: str, ids: np.ndarray, size: int) -> np.ndarray:
  """Returns how often each id occurs; raises UserError for one that is outside 0 ... size - 1."""
  counts = np.zeros(size, np.int64)
  for first in range(0, len(ids), ROWS):
    part = np.asarray(ids[first : first + ROWS]).reshape(-1)
    outside = part[(part < 0) | (part >= size)]
    if len(outside):
      raise UserError(
        f'the ids {name!r} hold {outside[0]}; those of a tokenizer of {size} codes are 0 ... {size - 1}'
      )
    counts += np.bincount(part, minlength=size)
  return counts
