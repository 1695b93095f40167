"""Flax modules as pure functions: the only seam between `models/` and the rest of the package.

Everything outside `models/` sees `init(key) -> Params` and `apply(params, ...) -> array`, and `Params` is
a plain nested dict. No mutable collections: networks hold parameters and nothing else.
"""

import dataclasses
from typing import Any, ClassVar

import jax
from flax import linen as nn

from vaediff.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """One architecture, any number of parameter trees.

  Attributes:
    module: the Flax module.
    inputs: shapes of the arguments of one forward pass with batch 1, in order (None = not given, a dict =
      values by name); used by `init` and by cost counting, so that neither needs data.
    entry: the module's method of a forward pass; None = its call. What it does not read is no part of the
      parameters.
  """

  module: nn.Module
  inputs: tuple[Any, ...]
  entry: str | None = None

  trainable: ClassVar[bool] = True
  """Whether there is a gradient of its parameters."""

  def init(self, key: jax.Array) -> Params:
    """Returns freshly initialised parameters."""
    zeros = jax.tree.map(lambda s: jax.numpy.zeros(s.shape, s.dtype), self.inputs)
    return self.module.init(key, *zeros, method=self.entry)['params']

  def apply(
    self,
    params: Params,
    *args: Any,
    method: str | None = None,
    key_dropout: jax.Array | None = None,
    **kwargs: Any,
  ) -> Any:
    """Applies the module (or its named method); dropout is on exactly when `key_dropout` is given."""
    if method is None:
      method = self.entry
      kwargs['deterministic'] = key_dropout is None
    rngs = None if key_dropout is None else {'dropout': key_dropout}
    return self.module.apply({'params': params}, *args, method=method, rngs=rngs, **kwargs)


def laid_over(params: Params, known: Params, path: str = '') -> Params:
  """Returns the parameters of a network with all those that a part of it has, such as a trained one.

  Args:
    params: of the whole; not changed.
    known: of the part, by the same names.
    path: of both in the whole, for messages.

  Raises:
    ValueError: for what the whole does not have, or has in another shape.
  """
  found = dict(params)
  for name, value in known.items():
    where = f'{path}{name}'
    if name not in params:
      raise ValueError(f'{where}: it is not here')
    if isinstance(value, dict):
      found[name] = laid_over(params[name], value, f'{where}/')
    elif value.shape != params[name].shape:
      raise ValueError(f'{where}: {value.shape} there, {params[name].shape} here')
    else:
      found[name] = value
  return found
