"""Where values enter a network: the only place in `models/` that knows a value's name.

A network declares its ports, and what is learned about a value (a stand-in, a projection, a table) is made
here, beside the network's own parameters:

    null_<name>    the stand-in of a dropped value that is concatenated or a vector; zero at first. Of a map
                   that enters inside it is one vector, for every position
    <name>_mlp     a vector, to the width of the embedding; where its port says so, zero at first, and float32
    <name>_table   a whole number below `classes`, to the width of the embedding; its last row is the null
    <name>         a number, as waves, to the width of the embedding; zero at first
    <name>_mlp     a level, as waves, to the same width; its last layer is zero at first, and null_<name>
                   stands for the waves
    <name>_tower   a transformer of the ids of words, with the null token among its parameters; of words that
                   are vectors that token is null_<name>
    <name>_words   a vector, to the words that are made of it
    <name>_mlp     the sum of its n tokens over sqrt(n), to the width of the embedding; its last layer is
                   zero at first

What is learned where a map or a text enters inside is made there (`models.token_injection`,
`models.text_attention`).

Must not import diffusion, experiments, run, config or data.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vaediff.models import layers, text_attention, text_tower
from vaediff.models.text_attention import Text, Texts
from vaediff.models.text_tower import TextTower, Tower, Words
from vaediff.models.token_injection import POSITIONS, WAYS, Entering, Tokens
from vaediff.models.unet_blocks import Mlp
from vaediff.types import Drop, Values

TEXT = 'text'
PLACES = ('concat', 'vector', *POSITIONS, TEXT)
NUMBER_SCALE = 250
"""Times a number, such as a guidance weight of 0 ... 4, before it is embedded as a step index is."""
LEVEL_SCALE = 1000
"""Times a level of noise in [0, 1], before it is embedded as a step index is, 0 ... 999."""
TABLE_DEVIATION = 0.02
"""Of the rows of a table at first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Port:
  """How one value enters a network.

  Attributes:
    enters: 'concat' (a map beside the state, along the channels), 'vector' (added to the time embedding), or
      inside a U-Net, a map at its 'encoder', 'middle' or 'decoder', or a 'text' wherever it has attention.
    shape: of one example; () = a number, or one of `classes`.
    classes: above 0, the value is a whole number below it, or those of a text are; a text of 0 is of vectors.
    made: a text is one vector, of which a linear map makes (words, numbers of each); () = it is not.
    zero: the embedding of the vector is zero at first, and computed in float32.
    level: the number is a time in [0, 1], how strongly another value is noised: embedded as the time is.
    droppable: it has a learned stand-in, which a dropped example reads.
    how: a map joins inside, one of `token_injection.WAYS`; a text, one of `text_attention.WAYS`.
    tower: of a text of whole numbers, which is one of words; None of others.
  """

  enters: str
  shape: tuple[int, ...]
  classes: int = 0
  made: tuple[int, ...] = ()
  zero: bool = False
  level: bool = False
  droppable: bool = False
  how: str = 'concat'
  tower: Tower | None = None

  def __post_init__(self):
    if self.enters not in PLACES:
      raise ValueError(f'A port enters at one of {", ".join(PLACES)}, not at {self.enters!r}.')
    ways = {TEXT: text_attention.WAYS, **dict.fromkeys(POSITIONS, WAYS)}
    if self.how not in ways.get(self.enters, ('concat',)):
      raise ValueError(
        f'A {self.enters} port cannot join by {self.how!r}; a map inside a network: {WAYS}, a text: '
        f'{text_attention.WAYS}.'
      )
    number = self.enters == 'vector' and not self.shape and not self.classes
    if not self._fits() or self.classes < 0 or (self.level and not number):
      raise ValueError(
        f'A {self.enters} port cannot have shape {self.shape} with {self.classes} classes'
        f'{" and be a level" if self.level else ""}{" and begin at zero" if self.zero else ""}.'
      )

  def _fits(self) -> bool:
    """Returns whether a value of its shape and classes can enter there."""
    if self.enters == TEXT:
      words = self.classes > 0
      if self.made and (words or len(self.made) != 2):
        return False
      dimensions = 1 if words or self.made else 2
      return not self.zero and len(self.shape) == dimensions and (self.tower is not None) == words
    if self.made:
      return False
    number = len(self.shape) <= 1 if self.enters == 'vector' else len(self.shape) == 3
    zero = not self.zero or (self.enters == 'vector' and self.shape)
    return bool(zero) and number and not (self.classes and self.shape) and self.tower is None

  @property
  def struct(self) -> jax.ShapeDtypeStruct:
    """Shape and type of the value of a batch of one."""
    return jax.ShapeDtypeStruct((1, *self.shape), jnp.int32 if self.classes else jnp.float32)


Named = tuple[tuple[str, Port], ...]
"""A network's ports, in the order in which their values are joined."""


def structs(ports: Mapping[str, Port]) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shapes and types of the values of a batch of one."""
  return {name: port.struct for name, port in ports.items()}


def channels(ports: Named) -> int:
  """Returns how many channels the concatenated values have together."""
  return sum(port.shape[-1] for _, port in ports if port.enters == 'concat')


def inside(module: nn.Module, ports: Named, values: Values, drop: Drop) -> dict[str, Entering]:
  """Returns the maps that enter inside, by position; call it within the module's compact method."""
  found = {position: () for position in POSITIONS}
  for name, port in ports:
    if port.enters in POSITIONS:
      kept = _kept(module, name, port, values[name], drop)
      found[port.enters] += (Tokens(name, port.how, kept),)
  return found


def texts(
  module: nn.Module,
  ports: Named,
  values: Values,
  drop: Drop,
  dtype: Any,
  known: Mapping[str, Words] | None = None,
) -> Texts:
  """Returns the tokens of the texts, a null token before them; call it in the module's compact method.

  Those that are `known` are not made here: another network's.
  """
  found = ()
  for name, port in ports:
    if port.enters != TEXT:
      continue
    if known is not None:
      words = Words(*known[name])
    elif port.tower:
      tower = TextTower(vocabulary=port.classes, tower=port.tower, dtype=dtype, name=f'{name}_tower')
      words = tower(values[name], drop.get(name))
    else:
      words = _vectors(module, name, port, values[name], drop, dtype)
    found += (Text(name, port.how, words),)
  return found


def word_structs(ports: Named, dtype: Any) -> dict[str, Words]:
  """Returns shapes and types of the tokens of the texts of a batch of one, by port; see `texts`."""
  found = {}
  for name, port in ports:
    if port.enters != TEXT:
      continue
    words, width = (port.shape[0], port.tower.width) if port.tower else (port.made or port.shape)
    count = words + (1 if port.tower or port.droppable else 0)
    kind = jnp.dtype(dtype) if port.tower or port.made else jnp.float32
    tokens = jax.ShapeDtypeStruct((1, count, width), kind)
    found[name] = Words(tokens, jax.ShapeDtypeStruct((1, count), jnp.bool_))
  return found


def _vectors(module: nn.Module, name: str, port: Port, value: Array, drop: Drop, dtype: Any) -> Words:
  """Returns words that are given as vectors, with their null token if they can be dropped; all are read."""
  if port.made:
    value = layers.dense(port.made[0] * port.made[1], name=f'{name}_words', dtype=dtype)(value)
    value = value.reshape(len(value), *port.made)
  read = jnp.ones(value.shape[:2], bool)
  if not port.droppable:
    return Words(value, read)
  null = module.param(f'null_{name}', nn.initializers.zeros, value.shape[-1:])
  first = jnp.broadcast_to(null, (len(value), 1, *value.shape[-1:])).astype(value.dtype)
  return Words(jnp.concatenate([first, value], axis=1), text_tower.behind_null(read, drop.get(name)))


def with_texts(emb: Float[Array, 'batch width'], found: Texts, dtype: Any) -> Float[Array, 'batch width']:
  """Returns the embedding with those of the sums of texts; latent diffusion's block has none."""
  for text in found:
    if text.how == 'attention':
      mlp = Mlp(features=emb.shape[-1], dtype=dtype, zero_init=True, name=f'{text.name}_mlp')
      emb = emb + mlp(text_tower.pooled(text.words))
  return emb


def check(ports: Named, values: Values, drop: Drop) -> None:
  """Raises ValueError unless values and drops are those that the ports want; says wanted and got."""
  known = dict(ports)
  if set(values) != set(known):
    raise ValueError(f'The network reads the values {sorted(known)}, got {sorted(values)}.')
  for name, port in ports:
    if values[name].shape[1:] != port.shape:
      raise ValueError(
        f'The network reads {name} of shape {port.shape} per example, got {values[name].shape[1:]}.'
      )
  for name in drop:
    if name not in known or not known[name].droppable:
      dropped = [name for name, port in ports if port.droppable]
      raise ValueError(f'{name!r} cannot be dropped; values with a learned stand-in: {dropped}.')


def join(
  module: nn.Module, ports: Named, x: Float[Array, 'batch height width _'], values: Values, drop: Drop
) -> Float[Array, 'batch height width _']:
  """Returns the state with the concatenated values behind it; call it within the module's compact method."""
  maps = [x]
  for name, port in ports:
    if port.enters == 'concat':
      maps.append(_kept(module, name, port, values[name], drop))
  return x if len(maps) == 1 else jnp.concatenate(maps, axis=-1)


def embed(
  module: nn.Module,
  ports: Named,
  emb: Float[Array, 'batch width'],
  values: Values,
  drop: Drop,
  waves: Callable[[Array], Array],
  dtype: Any,
) -> Float[Array, 'batch width']:
  """Returns the embedding with that of every vector, class and number added.

  Args:
    module: the network; this is called within its compact method.
    ports: of the network.
    emb: embedding of the time.
    values: by port.
    drop: by value.
    waves: numbers as step indices -> their sinusoidal embedding.
    dtype: type of the arithmetic.
  """
  width = emb.shape[-1]
  for name, port in ports:
    if port.enters != 'vector':
      continue
    if port.classes:
      emb = emb + _class_embedding(name, port, width, values[name], drop).astype(dtype)
    elif port.level:
      emb = emb + _level_embedding(module, name, port, width, values[name], drop, waves, dtype)
    elif port.shape:
      value = _kept(module, name, port, values[name], drop)
      own = jnp.float32 if port.zero else dtype
      mlp = Mlp(features=width, dtype=own, zero_init=port.zero, name=f'{name}_mlp')
      emb = emb + mlp(value).astype(dtype)
    else:
      value = _kept(module, name, port, values[name], drop)
      project = nn.Dense(width, use_bias=False, kernel_init=nn.initializers.zeros, dtype=dtype, name=name)
      emb = emb + project(waves(NUMBER_SCALE * value))
  return emb


def _class_embedding(name: str, port: Port, width: int, value: Array, drop: Drop) -> Array:
  """Returns the rows of the table; the row after the last class stands for a dropped one."""
  if name in drop:
    value = jnp.where(drop[name], port.classes, value)
  table = nn.Embed(
    port.classes + port.droppable, width,
    embedding_init=nn.initializers.normal(TABLE_DEVIATION), name=f'{name}_table',
  )  # fmt: skip
  return table(value)


def _level_embedding(
  module: nn.Module,
  name: str,
  port: Port,
  width: int,
  value: Array,
  drop: Drop,
  waves: Callable[[Array], Array],
  dtype: Any,
) -> Array:
  """Returns the embedding of levels; the stand-in of a dropped one takes the place of its waves."""
  embedded = _kept(module, name, port, waves(LEVEL_SCALE * value - 1.0), drop)
  return Mlp(features=width, dtype=dtype, zero_init=True, name=f'{name}_mlp')(embedded)


def _kept(module: nn.Module, name: str, port: Port, value: Array, drop: Drop) -> Array:
  """Returns the value with the stand-in where it is dropped; creates the stand-in.

  It has the shape of the value, or is one vector for all positions of a map that enters inside.
  """
  if not port.droppable:
    return value
  shape = value.shape[1:]
  own = shape[-1:] if port.enters in POSITIONS else shape
  null = module.param(f'null_{name}', nn.initializers.zeros, own)
  if name not in drop:
    return value
  mask = drop[name].reshape(-1, *[1] * len(shape))
  return jnp.where(mask, null.reshape(*[1] * (value.ndim - len(own)), *own), value)
