"""The mean part of the correction of a quantized network's output (PTQD: He et al. 2023, 2305.10657).

`vaediff.diffusion.noise_correction` measures it. Imports jax only.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from vaediff.types import Time


def row_of(times: Float[Array, ' rows'], t: Time) -> Array:
  """Returns the index of the row that is nearest in time to each t; of two as near the first."""
  return jnp.argmin(jnp.abs(times[None, :] - t[:, None]), axis=1)


def corrected(
  table: Mapping[str, Array], output: Float[Array, 'batch *shape channels'], t: Time
) -> Float[Array, 'batch *shape channels']:
  """Returns (output - bias) / (1 + gain), with the row of the table that is nearest to each t.

  Args:
    table: `times` [rows], `gain` and `bias` [rows, channels]. Where both are 0 the output is as it was, bit
      by bit.
    output: of the quantized network.
    t: of each example.
  """
  row = row_of(table['times'], t)
  shape = (output.shape[0], *(1,) * (output.ndim - 2), output.shape[-1])
  gain, bias = (table[name][row].reshape(shape) for name in ('gain', 'bias'))
  return (output - bias) / (1 + gain)
