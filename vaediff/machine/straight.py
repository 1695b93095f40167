"""Programs without loops: what other formats take of a sampler, whose steps are one `lax.scan`.

A loop hides its body from what counts, measures or quantizes the operations of a program, so that every step
is written out. What a step makes of the table of the sampler alone, as the embedding of its time, is computed
then and there.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

MOST_FOLDED = 2**14
"""Numbers of the largest array that is computed at once: kernels in another order would be kept twice."""
OPENED = {
  'jit': 'jaxpr',
  'pjit': 'jaxpr',
  'closed_call': 'call_jaxpr',
  'core_call': 'call_jaxpr',
  'custom_jvp_call': 'call_jaxpr',
  'custom_vjp_call': 'call_jaxpr',
  'remat2': 'jaxpr',
  'checkpoint': 'jaxpr',
}
"""Operations that are a program of their own, and its name among their parameters."""


def reads(function: Callable[..., Any], *args: Any) -> tuple[bool, ...]:
  """Returns, for each of the arguments, whether what a function returns depends on it.

  Args:
    function: of arrays.
    args: trees of them, or of their shapes.
  """
  closed = jax.make_jaxpr(function)(*args)
  outputs = [True] * len(closed.jaxpr.outvars)
  used = iter(partial_eval.dce_jaxpr(closed.jaxpr, outputs)[1])
  return tuple(any([next(used) for _ in jax.tree.leaves(arg)]) for arg in args)


def types(function: Callable[..., Any], *args: Any) -> set[str]:
  """Returns the names of the types of all that a function computes, in its loops too."""
  found, waiting = set(), [jax.make_jaxpr(function)(*args).jaxpr]
  while waiting:
    program = waiting.pop()
    found |= {
      str(out.aval.dtype) for eqn in program.eqns for out in eqn.outvars if hasattr(out.aval, 'dtype')
    }
    waiting += [inner for eqn in program.eqns for inner in core_programs(eqn.params)]
  return found


def core_programs(parameters: dict[str, Any]) -> list[core.Jaxpr]:
  """Returns the programs that an operation runs."""
  found = []
  for value in parameters.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      if isinstance(item, core.ClosedJaxpr):
        found.append(item.jaxpr)
      elif isinstance(item, core.Jaxpr):
        found.append(item)
  return found


def straight(function: Callable[..., Any], *args: Any) -> Callable[..., list[jax.Array]]:
  """Returns a function of flat arrays that returns the leaves of what `function` does, without loops.

  Args:
    function: of arrays.
    args: their shapes.
  """
  closed = jax.make_jaxpr(function)(*args)
  outputs = [True] * len(closed.jaxpr.outvars)
  program, _ = partial_eval.dce_jaxpr(closed.jaxpr, outputs, instantiate=True)
  kept = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
  consts = [kept[variable] for variable in program.constvars]
  return lambda *flat: evaluate(program, consts, flat)


def evaluate(program: core.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
  """Returns what a program makes of arrays, its loops step by step."""
  known = {}

  def read(variable: Any) -> Any:
    return variable.val if isinstance(variable, core.Literal) else known[variable]

  known |= dict(zip((*program.constvars, *program.invars), (*consts, *args), strict=True))
  for eqn in program.eqns:
    inputs = [read(variable) for variable in eqn.invars]
    known |= dict(zip(eqn.outvars, operate(eqn, inputs), strict=True))
  return [read(variable) for variable in program.outvars]


def operate(eqn: core.JaxprEqn, inputs: list[Any]) -> list[Any]:
  """Returns what one operation makes of arrays: at once, where all of them are known and it is small."""
  name = eqn.primitive.name
  if name == 'scan':
    return scan(eqn.params, inputs)
  if name in OPENED and OPENED[name] in eqn.params:
    inner = eqn.params[OPENED[name]]
    closed = isinstance(inner, core.ClosedJaxpr)
    return evaluate(inner.jaxpr if closed else inner, inner.consts if closed else (), inputs)
  sizes = [math.prod(out.aval.shape) for out in eqn.outvars]
  if max(sizes, default=0) <= MOST_FOLDED and not any(isinstance(value, jax.core.Tracer) for value in inputs):
    with jax.ensure_compile_time_eval():
      found = bind(eqn, inputs)
    return [np.asarray(value) for value in found]
  return bind(eqn, inputs)


def bind(eqn: core.JaxprEqn, inputs: list[Any]) -> list[Any]:
  """Returns the results of an operation as it is."""
  found = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
  return list(found) if eqn.primitive.multiple_results else [found]


def scan(parameters: dict[str, Any], inputs: list[Any]) -> list[Any]:
  """Returns the last carry and the stacked rows of a loop that is written out."""
  fixed, carried = parameters['num_consts'], parameters['num_carry']
  consts, carry, rows = inputs[:fixed], inputs[fixed : fixed + carried], inputs[fixed + carried :]
  inner, length, found = parameters['jaxpr'], parameters['length'], []
  for number in reversed(range(length)) if parameters['reverse'] else range(length):
    row = [value[number] for value in rows]
    out = evaluate(inner.jaxpr, inner.consts, [*consts, *carry, *row])
    carry, more = out[:carried], out[carried:]
    found.append(more)
  if parameters['reverse']:
    found.reverse()
  columns = zip(*found, strict=True)
  return [*carry, *(jnp.concatenate([value[None] for value in column]) for column in columns)]
