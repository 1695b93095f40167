"""StableHLO: a function of arrays as bytes that any program with JAX runs, on the platforms it is made for.

`jax.export` writes the operations, loops as loops, and the weights as constants of them; the versions of JAX
that can read it are those of six months after and three weeks before (its promise for `jax.export`). Nothing
of this package is needed to run it:

    images = jax.export.deserialize(bytearray(content)).call({'noise': noise, 'z': z})

JAX writes and reads the bytes with the package flatbuffers: the extra `[stablehlo]`.
"""

import importlib.util
from collections.abc import Callable, Mapping

import jax
import jax.export
import numpy as np

from vaediff.errors import UserError

PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
BATCH = 'batch'
"""Name of the number of images where it is open."""
PACKAGE = 'flatbuffers'


def check_installed() -> None:
  """Raises UserError where the package of the extra `[stablehlo]` is not installed."""
  if importlib.util.find_spec(PACKAGE) is None:
    raise UserError(
      f"config.export.format is stablehlo, which jax.export writes with the package {PACKAGE}; it is not "
      "installed: pip install -e '.[stablehlo]'"
    )


def convert(
  function: Callable[[dict[str, jax.Array]], jax.Array],
  inputs: Mapping[str, jax.ShapeDtypeStruct],
  platforms: tuple[str, ...],
  *,
  any_batch: bool,
) -> bytes:
  """Returns a function of arrays by name as StableHLO.

  Args:
    function: what it closes over are constants.
    inputs: shapes and types of its arguments, the batch first.
    platforms: of `PLATFORMS`, each of which gets a program of its own where they differ.
    any_batch: the size of the batch is open: one program for all; else that of `inputs`.

  Raises:
    UserError: when the function has no such form.
  """
  shapes = {name: jax.ShapeDtypeStruct(struct.shape, struct.dtype) for name, struct in inputs.items()}
  if any_batch:
    (batch,) = jax.export.symbolic_shape(BATCH)
    shapes = {
      name: jax.ShapeDtypeStruct((batch, *struct.shape[1:]), struct.dtype) for name, struct in inputs.items()
    }
  try:
    return bytes(jax.export.export(jax.jit(function), platforms=platforms)(shapes).serialize())
  except Exception as error:  # of operations that ask for a number, or that one platform does not have
    lines = str(error).strip().splitlines() or [type(error).__name__]
    fixed = '. With --config.export.any_batch=False the size of a batch is config.export.batch_size'
    named = ', '.join(platforms)
    raise UserError(
      f'jax.export cannot write this sampler for {named}: {lines[0]}{fixed if any_batch else ""}'
    ) from error


def runner(content: bytes) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
  """Returns what runs such bytes on this machine, compiled once for each size of a batch."""
  call = jax.jit(jax.export.deserialize(bytearray(content)).call)
  return lambda given: jax.device_get(call(dict(given)))


def about(content: bytes) -> dict[str, str]:
  """Returns what the bytes themselves say: platforms, shapes, and the version of their form."""
  found = jax.export.deserialize(bytearray(content))
  return {
    'platforms': ', '.join(found.platforms),
    'shapes': ', '.join(aval.str_short() for aval in found.in_avals),
    'calling convention': str(found.calling_convention_version),
  }
