"""What is in use of codebooks, of how often each code occurs over a whole split.

A batch says less: of few vectors no more codes than vectors can be in use, and perplexity is capped with it.
"""

from collections.abc import Mapping

import numpy as np

USED, PERPLEXITY, UNUSED = 'used', 'perplexity', 'unused'


def figures(counts: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Returns of each codebook `<name>/used`, `<name>/perplexity` and `<name>/unused`.

  The first is the fraction of the codes that occur, the last the number of those that do not; perplexity is
  exp(-sum p log(p + 1e-10)), as many codes as would be as hard to guess if all were used alike.

  Args:
    counts: by codebook, one number per code, not all 0.
  """
  found = {}
  for name, count in counts.items():
    count = np.asarray(count, np.float64)
    p = count / count.sum()
    found[f'{name}/{USED}'] = float(np.mean(count > 0))
    found[f'{name}/{PERPLEXITY}'] = float(np.exp(-np.sum(p * np.log(p + 1e-10))))
    found[f'{name}/{UNUSED}'] = float(np.sum(count == 0))
  return found
