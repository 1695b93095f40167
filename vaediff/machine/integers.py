"""Whether this machine multiplies whole numbers of 8 bits, and what its compiler has to be told for it.

On CPUs it is a library that has such convolutions and products (YNNPACK); without it, XLA's own loops take
thirty times as long as float32. `vaediff.main` sends convolutions elsewhere, which is faster for float32
(`machine.runtime`): programs with whole numbers are compiled with options of their own.
"""

import functools
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp

FUSIONS = 'xla_cpu_experimental_ynn_fusion_type'
CPU_OPTIONS = {
  FUSIONS: 'LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT',
}
"""Of the compiler: convolutions and products of a program go to the library, whatever XLA_FLAGS say."""
INTEGER, FLOAT_SUMS, DEQUANTIZED = 'integer', 'float_sums', 'dequantized'
"""Sums in int32; those of convolutions in float32; floats made of the stored numbers where they are used."""


@functools.cache
def arithmetic() -> str:
  """Returns how quantized networks compute on the devices of this process; compiles small programs once."""
  platform = jax.default_backend()
  for kind, sums in ((INTEGER, jnp.int32), (FLOAT_SUMS, jnp.float32)):
    text = _compiled(sums, compiler_options())
    if text and (platform != 'cpu' or in_library(text) == (2, 0)):
      return kind
  return DEQUANTIZED


def compiler_options() -> Mapping[str, str]:
  """Returns what `jax.jit` is told for a program with whole numbers; {} where that is nothing."""
  return CPU_OPTIONS if jax.default_backend() == 'cpu' and _knows_options() else {}


def in_library(text: str) -> tuple[int, int]:
  """Returns how many convolutions and products of whole numbers a compiled CPU program gives to the library.

  Behind them those that it does itself, in loops.

  Args:
    text: of the compiled program.
  """
  inside, outside, library = 0, 0, _library_computations(text)
  for name, body in _computations(text):
    found = [line for line in body if re.search(r'= s32\[[\d,]*\]\S* (convolution|dot)\(', line)]
    inside, outside = (inside + len(found), outside) if name in library else (inside, outside + len(found))
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


@functools.cache
def _knows_options() -> bool:
  try:
    jax.jit(lambda x: x + 1, compiler_options=CPU_OPTIONS).lower(jnp.float32(0)).compile()
  except jax.errors.JaxRuntimeError:
    return False
  return True


def _compiled(sums: jnp.dtype, options: Mapping[str, str]) -> str:
  """Returns the text of a convolution and a product of whole numbers, compiled; '' where that cannot be."""

  def both(
    x: jax.Array, kernel: jax.Array, rows: jax.Array, matrix: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    numbers = ('NHWC', 'HWIO', 'NHWC')
    convolved = jax.lax.conv_general_dilated(
      x, kernel, (1, 1), 'VALID', dimension_numbers=numbers, preferred_element_type=sums
    )
    return convolved, jax.lax.dot(rows, matrix, preferred_element_type=jnp.int32)

  shapes = ((4, 10, 10, 32), (3, 3, 32, 32), (64, 32), (32, 32))
  try:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.int8) for shape in shapes]
    return jax.jit(both, compiler_options=dict(options)).lower(*arguments).compile().as_text()
  except (jax.errors.JaxRuntimeError, NotImplementedError):  # what a backend says that it does not have
    return ''
