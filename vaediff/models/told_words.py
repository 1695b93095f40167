"""The vectors of a text, given to a network in the place of those that its own tower makes of words.

    ids -> tower -> vectors -> the network          as it was trained
    ids            given vectors -> the network     within `given`

Which of them are read the ids say, as ever. Of a dropped example the network reads what its tower makes of
the null: that stays what it was. The network itself is not changed: the call of its tower is intercepted.

Must not import diffusion, experiments, run, config or data.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vaediff.models import observed, text_tower
from vaediff.models.functional import Model
from vaediff.models.ports import Port
from vaediff.models.text_tower import TextTower, Words
from vaediff.types import Mask, Params

TOKENS = 'tokens'
"""The one parameter of the network that `vectors` describes."""

Vectors = Float[Array, 'batch tokens width']


class Parameters(nn.Module):
  """Vectors that are themselves what is trained.

  Attributes:
    shape: (tokens, width).
  """

  shape: tuple[int, int]

  @nn.compact
  def __call__(self, *, deterministic: bool = True) -> Float[Array, 'tokens width']:
    """Returns them; zeros at first."""
    del deterministic
    return self.param(TOKENS, nn.initializers.zeros, self.shape)


def vectors(port: Port) -> Model:
  """Returns the network whose parameters are the vectors of one text that enters by a port."""
  return Model(module=Parameters((port.shape[0] + 1, port.tower.width)), inputs=())


def tower_of(params: Params, name: str) -> Params:
  """Returns the parameters of the tower by which a network reads the text of this name."""
  return params[f'{name}_tower']


def of_words(params: Params, name: str, port: Port, dtype: str, ids: Int[Array, 'batch words']) -> Vectors:
  """Returns what a network's tower makes of captions, float32: the null token's vector, then the words'.

  Args:
    params: of the network.
    name: of the text.
    port: by which it enters.
    dtype: the network's type of arithmetic.
    ids: of the captions.
  """
  tower = TextTower(vocabulary=port.classes, tower=port.tower, dtype=jnp.dtype(dtype))
  return tower.apply({'params': tower_of(params, name)}, ids).tokens.astype(jnp.float32)


@contextlib.contextmanager
def given(tokens: Vectors) -> Iterator[None]:
  """Gives a network these vectors in the place of those of its tower, wherever it is applied within."""

  def visit(
    module: nn.Module, path: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
  ) -> Any:
    del path
    if not isinstance(module, TextTower):
      return call(*args, **kwargs)
    return _told(call, tokens.astype(module.dtype), *args, **kwargs)

  with observed.visiting(visit):
    yield


def _told(
  call: Callable[..., Words], tokens: Vectors, ids: Int[Array, 'batch words'], drop: Mask | None = None
) -> Words:
  """Returns the given vectors; of dropped examples what the tower makes of the null."""
  allowed = text_tower.behind_null(ids != text_tower.PAD, drop)
  if drop is None:
    return Words(tokens, allowed)
  null = call(ids, jnp.ones_like(drop)).tokens
  return Words(jnp.where(drop[:, None, None], null, tokens), allowed)
