"""Multiply-accumulates and bytes, counted from the traced program: nothing is allocated."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def macs(function: Callable[..., Any], *args: Any) -> int:
  """Returns the multiply-accumulates of all convolutions and matrix products in one call.

  Args:
    function: anything traceable.
    *args: arrays or ShapeDtypeStructs.
  """
  return _count(jax.make_jaxpr(function)(*args).jaxpr)


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


def _count(jaxpr: core.Jaxpr) -> int:
  total = 0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == 'dot_general':
      (contract, _), _ = params['dimension_numbers']
      shape = equation.invars[0].aval.shape
      total += math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contract)
    elif name == 'conv_general_dilated':
      kernel = equation.invars[1].aval.shape
      out_axis = params['dimension_numbers'].rhs_spec[0]
      per_output = math.prod(kernel) // kernel[out_axis]
      total += math.prod(equation.outvars[0].aval.shape) * per_output
    else:
      times = params['length'] if name == 'scan' else 1
      inner = [_count(sub) for value in params.values() for sub in _jaxprs(value)]
      total += times * (max(inner) if name == 'cond' and inner else sum(inner))
  return total


def _jaxprs(value: Any):
  if isinstance(value, core.ClosedJaxpr):
    yield value.jaxpr
  elif isinstance(value, core.Jaxpr):
    yield value
  elif isinstance(value, tuple | list):
    for item in value:
      yield from _jaxprs(item)
