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
