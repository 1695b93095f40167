"""Whether this machine multiplies whole numbers of 8 bits faster than floats, and how.

On CPUs it is a library that has such products (YNNPACK); where XLA does not call it, its own loops take ten
to thirty times as long. Convolutions are products of windows there: with the flag that `vaediff.main` sets
(`machine.runtime`) the library gets no convolutions, and products it gets in any case.
"""

import functools
import pathlib
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp

CONVOLUTIONS, PRODUCTS, WIDE, FLOATS = 'convolutions', 'products', 'wide products', 'floats'
"""Convolutions of whole numbers as such; as products of windows; so in wide layers alone, where CPUs gain;
none: floats made of the stored numbers."""
CPU_FLAGS = ('avx512f', 'avx512_vnni', 'avx_vnni', 'avx512_bf16', 'amx_int8', 'asimddp', 'i8mm')
"""What processors have, or not, that such products take."""


@functools.cache
def arithmetic() -> str:
  """Returns how quantized networks compute on the devices of this process; compiles a small program once."""
  platform = jax.default_backend()
  if platform == 'tpu' and _compiled(_convolution, (4, 10, 10, 32), (32, 3, 3, 32)):
    return CONVOLUTIONS
  text = _compiled(_product, (256, 128), (128, 128))
  if platform != 'cpu':
    return PRODUCTS if text else FLOATS
  return WIDE if text and in_library(text) == (1, 0) else FLOATS


def cpu_flags() -> tuple[str, ...]:
  """Returns which of `CPU_FLAGS` this processor has; () where Linux does not say."""
  path = pathlib.Path('/proc/cpuinfo')
  words = set(path.read_text(errors='replace').split()) if path.exists() else set()
  return tuple(flag for flag in CPU_FLAGS if flag in words)


def in_library(text: str) -> tuple[int, int]:
  """Returns how many convolutions and products of whole numbers a compiled CPU program gives to the library.

  Behind them those that it does itself, in loops.

  Args:
    text: of the compiled program.
  """
  inside, outside, library = 0, 0, _library_computations(text)
  for name, body in _computations(text):
    found = sum(bool(re.search(r'= s32\[[\d,]*\]\S* (convolution|dot)\(', line)) for line in body)
    inside, outside = (inside + found, outside) if name in library else (inside, outside + found)
  return inside, outside


def _library_computations(text: str) -> set[str]:
  """Returns the names of the computations that fusions of the library call."""
  lines = (line for line in text.splitlines() if 'kind=kCustom' in line and 'ynn_fusion' in line)
  return {match.group(1) for line in lines if (match := re.search(r'calls=%?([\w.\-]+)', line))}


def _computations(text: str) -> list[tuple[str, list[str]]]:
  """Returns the computations of a module: their names, and their lines."""
  found = []
  for line in text.splitlines():
    if match := re.match(r'(?:ENTRY )?%?([\w.\-]+) \(.*\{$', line):
      found.append((match.group(1), []))
    elif found:
      found[-1][1].append(line)
  return found


def _product(rows: jax.Array, matrix: jax.Array) -> jax.Array:
  return jax.lax.dot_general(rows, matrix, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)


def _convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
  numbers = ('NHWC', 'OHWI', 'NHWC')
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), 'VALID', dimension_numbers=numbers, preferred_element_type=jnp.int32
  )


def _compiled(function: Callable[..., jax.Array], *shapes: tuple[int, ...]) -> str:
  """Returns the text of a program on whole numbers, compiled; '' where the backend has none such."""
  arguments = [jax.ShapeDtypeStruct(shape, jnp.int8) for shape in shapes]
  try:
    return jax.jit(function).lower(*arguments).compile().as_text()
  except (jax.errors.JaxRuntimeError, NotImplementedError):
    return ''
