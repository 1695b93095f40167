"""Multiply-accumulates and bytes, counted from the traced program: nothing is allocated."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def macs(function: Callable[..., Any], *args: Any) -> int:
  """Returns the multiply-accumulates of all convolutions and matrix products in one call.

  The zeros that a transposed convolution, and the gradient of one with strides, has between its pixels are
  no factors; those of padding are.

  Args:
    function: anything traceable.
    *args: arrays or ShapeDtypeStructs.
  """
  return _count(jax.make_jaxpr(function)(*args).jaxpr)


def macs_and_once(function: Callable[..., Any], *args: Any) -> tuple[int, int]:
  """Returns `macs`, and the same with the body of every loop counted once, which is how XLA counts."""
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  return _count(jaxpr), _count(jaxpr, once=True)


def num_bytes(tree: Any) -> int:
  """Returns the bytes of all leaves of a tree of arrays or ShapeDtypeStructs."""
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def device_bytes(tree: Any) -> int:
  """Returns the bytes of a tree of arrays in the memory of a device, as XLA lays them out as arguments."""
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
  program = jax.jit(lambda tree: 0.0, keep_unused=True).lower(shapes).compile()
  return program.memory_analysis().argument_size_in_bytes


def num_parameters(tree: Any) -> int:
  """Returns the number of scalars in a tree."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _count(jaxpr: core.Jaxpr, *, once: bool = False) -> int:
  total = 0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == 'dot_general':
      (contract, _), _ = params['dimension_numbers']
      shape = equation.invars[0].aval.shape
      total += math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contract)
    elif name == 'conv_general_dilated':
      total += _of_convolution(equation.invars[1].aval.shape, equation.outvars[0].aval.shape, params)
    else:
      times = params['length'] if name == 'scan' and not once else 1
      inner = [_count(sub, once=once) for value in params.values() for sub in _jaxprs(value)]
      total += times * (max(inner) if name == 'cond' and inner else sum(inner))
  return total


def _of_convolution(kernel: tuple[int, ...], out: tuple[int, ...], params: dict[str, Any]) -> int:
  """Returns the products of a convolution without those of zeros that `lhs_dilation` puts between pixels."""
  numbers = params['dimension_numbers']
  total = out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * kernel[numbers.rhs_spec[1]]
  for axis, (out_axis, kernel_axis) in enumerate(
    zip(numbers.out_spec[2:], numbers.rhs_spec[2:], strict=True)
  ):
    stride, spread, dilation, (before, _) = (
      params[name][axis] for name in ('window_strides', 'rhs_dilation', 'lhs_dilation', 'padding')
    )
    total *= sum(  # pixels are at the multiples of `dilation`, also those that padding stands for
      (place * stride + tap * spread - before) % dilation == 0
      for place in range(out[out_axis])
      for tap in range(kernel[kernel_axis])
    )
  return total


def _jaxprs(value: Any):
  if isinstance(value, core.ClosedJaxpr):
    yield value.jaxpr
  elif isinstance(value, core.Jaxpr):
    yield value
  elif isinstance(value, tuple | list):
    for item in value:
      yield from _jaxprs(item)
