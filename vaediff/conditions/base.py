"""What a condition is: one file each, the unit that is dropped and guided.

A condition says what it can be given (`inputs`), how it sees that in an image (`observe`) or draws it of
nothing (`draw`), and what the network reads of it (`values`, each entering by a port).
"""

import abc
import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from vaediff import reads
from vaediff.models.functional import Model
from vaediff.models.ports import Named, Port
from vaediff.types import Batch, Drop, Given, Image, Keys, Read, Values

LAST = 2**32 - 1
"""The largest number that can be folded into a key."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedNetwork:
  """A network of a condition that the stage trains beside its own.

  Attributes:
    model: its architecture: an encoder with a bottleneck.
    settings: of the bottleneck while it trains.
    start: the name in `read` of a network whose parameters it starts with; '' = fresh ones.
  """

  model: Model
  settings: Mapping[str, Any]
  start: str = ''


class Condition(abc.ABC):
  """One condition; a frozen dataclass.

  Attributes:
    name: by which it is dropped and guided, as 'vae' or 'label'.
    title: what it is called in a table.
    dropout: probability, per example, that training drops it; 0 = it is always read.
    frozen: what it reads.
    stored: of what it is given, the arrays that are observed once for every training image and then read
      beside the batch: shape and type of one image.
    titles: of the images that it shows, for tables.
    reads_codes: what it observes of an image are the codes of a tokenizer.
    num_groups: its samples come in so many kinds, in turn: image i is of kind i modulo this; 0 = in none.
    classes: the classes of the data set that its samples are asked to be of, in turn; () = of none.
    reconstructs: what it observes of an image says what the image looks like.
    maker: the stage whose samples are one of its inputs in sampling; None = none.
    max_level: of the noise that training adds to what it observes; 0 = none.
    bounds_images: what it observes of an image is drawn from a known prior, or has a density of its own in
      `nats`, so that a loss given it bounds -log p of the image.
    trained: networks that the stage trains beside its own, by their names in `read`.
    limits: of its inputs, the least and the largest number of those that have them.
    ranges: of its inputs, what the numbers of those are that have no limits and are no image in [-1, 1].
    seen: inputs that only an image or another stage can supply, because `draw` cannot.
    borrowed: the subset of `seen` that samples take from evaluation images, in order, when nothing is given:
      what they follow, which says less than the image.
    added_to: (stage, run) of a trained network, the stage's own but for this condition, which training begins
      as; None = it begins fresh.
    losses: of the values of training, those that are terms of the loss, a number per example: their weights.
  """

  name: str
  title: str
  dropout: float
  frozen: Mapping[str, reads.Reads] = {}
  stored: Mapping[str, jax.ShapeDtypeStruct] = {}
  titles: Mapping[str, str] = {}
  reads_codes = False
  num_groups = 0
  classes: tuple[int, ...] = ()
  reconstructs = False
  maker: reads.Sampled | None = None
  max_level = 0.0
  bounds_images = True
  trained: Mapping[str, TrainedNetwork] = {}
  losses: Mapping[str, float] = {}
  seen: tuple[str, ...] = ()
  borrowed: tuple[str, ...] = ()
  limits: Mapping[str, tuple[float, float]] = {}
  ranges: Mapping[str, str] = {}
  added_to: tuple[str, str] | None = None

  @property
  @abc.abstractmethod
  def ports(self) -> Mapping[str, Port]:
    """The values it gives and where each enters the network."""

  @property
  @abc.abstractmethod
  def inputs(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """What it can be given, for one image; of these, what `draw` and `observe` leave out is optional."""

  def for_training(self) -> 'Condition':
    """Returns what is drawn of in training: the same, without a choice of what pictures show."""
    return self

  def training_key(self, key: jax.Array) -> jax.Array | None:
    """Returns what training observes with: the key, or None for the mean."""
    return key

  @abc.abstractmethod
  def observe(self, read: Read, batch: Batch, x: Image, key: jax.Array | None) -> Given:
    """Returns what it sees of each image.

    Args:
      read: what the stage reads.
      batch: beside the images; arrays that were stored are read instead of made.
      x: images in [-1, 1].
      key: of the posterior, one for the batch or one per image; None = its mean.
    """

  def observe_in_training(self, read: Read, batch: Batch, x: Image, key: jax.Array) -> Given:
    """Returns what training sees of each image: the same, unless it is made worse on purpose."""
    return self.observe(read, batch, x, self.training_key(key))

  def draw(self, read: Read, keys: Keys, indices: Int[Array, ' batch']) -> Given:
    """Returns what it draws of nothing for the images with these indices; {} = it cannot."""
    del read, keys, indices
    return {}

  def complete(self, read: Read, given: Given) -> Given:
    """Returns what was given with what follows from it, such as an image decoded of its code."""
    del read
    return given

  @abc.abstractmethod
  def values(self, read: Read, given: Given) -> Values:
    """Returns what the network reads of a complete `given`."""

  def shown(self, given: Given) -> dict[str, Image]:
    """Returns the images in [-1, 1] that are shown beside a sample, of a complete `given`."""
    del given
    return {}

  def nats(self, read: Read, x: Image) -> Values:
    """Returns its terms of a bound on -log p(x), per image, in nats."""
    del read, x
    return {}


def key_of(key: jax.Array, number: int) -> jax.Array:
  """Returns the key (or keys, one per image) of condition `number`: the first gets the key itself.

  The first may split it, and the parts of a split are keys with small numbers folded in: the others' numbers
  are from `LAST` down.
  """
  if number == 0:
    return key
  fold = lambda one: jax.random.fold_in(one, LAST - number)
  return jax.vmap(fold)(key) if key.ndim else fold(key)


@dataclasses.dataclass(frozen=True)
class Conditions:
  """All conditions of a network, in order."""

  each: tuple[Condition, ...] = ()

  @property
  def ports(self) -> dict[str, Port]:
    """The ports of all."""
    return {name: port for one in self.each for name, port in one.ports.items()}

  @property
  def named_ports(self) -> Named:
    """The same, as a module takes them."""
    return tuple(self.ports.items())

  @property
  def inputs(self) -> dict[str, jax.ShapeDtypeStruct]:
    """All inputs of which an image can be made, by name."""
    return {name: struct for one in self.each for name, struct in one.inputs.items()}

  @property
  def frozen(self) -> dict[str, reads.Reads]:
    """What all conditions read of other stages, by name."""
    return {name: source for one in self.each for name, source in one.frozen.items()}

  @property
  def trained(self) -> dict[str, TrainedNetwork]:
    """Networks that the stage trains beside its own."""
    return {name: network for one in self.each for name, network in one.trained.items()}

  @property
  def stored(self) -> dict[str, jax.ShapeDtypeStruct]:
    """What is read beside the batch."""
    return {name: struct for one in self.each for name, struct in one.stored.items()}

  @property
  def titles(self) -> dict[str, str]:
    """Of what is shown."""
    return {name: title for one in self.each for name, title in one.titles.items()}

  @property
  def title(self) -> str:
    """What all together are called in a table."""
    return '+'.join(one.title for one in self.each if one.title) or 'none'

  @property
  def num_groups(self) -> int:
    """Of the first that has groups."""
    return next((one.num_groups for one in self.each if one.num_groups), 0)

  @property
  def classes(self) -> tuple[int, ...]:
    """Of the one that has classes."""
    return next((one.classes for one in self.each if one.classes), ())

  @property
  def reconstructs(self) -> bool:
    """Whether one of them does."""
    return any(one.reconstructs for one in self.each)

  @property
  def reads_codes(self) -> bool:
    """Whether one of them does."""
    return any(one.reads_codes for one in self.each)

  @property
  def makers(self) -> tuple[reads.Sampled, ...]:
    """The stages whose samples feed them."""
    return tuple(one.maker for one in self.each if one.maker)

  @property
  def seen(self) -> tuple[str, ...]:
    """Inputs that only an image or another stage can supply, because `draw` cannot."""
    return tuple(name for one in self.each for name in one.seen)

  @property
  def borrowed(self) -> tuple[str, ...]:
    """The subset of `seen` that samples take from evaluation images, in order, when nothing is given."""
    return tuple(name for one in self.each for name in one.borrowed)

  @property
  def limits(self) -> dict[str, tuple[float, float]]:
    """Of the inputs of all."""
    return {name: limits for one in self.each for name, limits in one.limits.items()}

  @property
  def ranges(self) -> dict[str, str]:
    """Of the inputs of all, in words."""
    return {name: what for one in self.each for name, what in one.ranges.items()}

  @property
  def max_level(self) -> float:
    """Largest noise level that every noised condition was trained with (the minimum of their maxima).

    0 without any.
    """
    return min((one.max_level for one in self.each if one.max_level), default=0.0)

  @property
  def bounds_images(self) -> bool:
    """Whether a bound on the likelihood of images holds with every one of them."""
    return all(one.bounds_images for one in self.each)

  @property
  def droppable(self) -> tuple[str, ...]:
    """Names of those that training drops."""
    return tuple(one.name for one in self.each if one.dropout > 0)

  def for_training(self) -> 'Conditions':
    """Returns those that are drawn of in training."""
    return Conditions(tuple(one.for_training() for one in self.each))

  def observe(
    self, read: Read, batch: Batch, x: Image, key: jax.Array | None, *, training: bool = False
  ) -> Given:
    """Returns what they see of each image; see `Condition.observe`."""
    given = {}
    for number, one in enumerate(self.each):
      own = None if key is None else key_of(key, number)
      in_training = training and own is not None
      seen = one.observe_in_training if in_training else one.observe
      given |= seen(read, batch, x, own)
    return given

  def draw(self, read: Read, keys: Keys, indices: Int[Array, ' batch']) -> Given:
    """Returns what they draw of nothing; see `Condition.draw`."""
    given = {}
    for number, one in enumerate(self.each):
      given |= one.draw(read, key_of(keys, number), indices)
    return given

  def complete(self, read: Read, given: Given) -> Given:
    """Returns what was given with what follows from it."""
    for one in self.each:
      given = one.complete(read, given)
    return given

  def values(self, read: Read, given: Given) -> Values:
    """Returns what the network reads of a complete `given`."""
    return {name: value for one in self.each for name, value in one.values(read, given).items()}

  def with_losses(self, terms: dict[str, Array], values: Values) -> dict[str, Array]:
    """Returns terms of a loss of each example with those that are among the values, added to 'loss'."""
    for one in self.each:
      for name, weight in one.losses.items():
        if name in values:
          terms = {**terms, 'loss': terms['loss'] + weight * values[name], name: values[name]}
    return terms

  def shown(self, given: Given) -> dict[str, Image]:
    """Returns the images that are shown beside a sample."""
    return {name: image for one in self.each for name, image in one.shown(given).items()}

  def nats(self, read: Read, x: Image) -> Values:
    """Returns the terms of a bound."""
    return {name: value for one in self.each for name, value in one.nats(read, x).items()}

  def drop(self, key: jax.Array, count: int) -> Drop:
    """Returns what training drops of a batch: each condition whole, by its own chance."""
    masks = {}
    for number, one in enumerate(self.each):
      if one.dropout > 0:
        mask = jax.random.bernoulli(key_of(key, number), one.dropout, (count,))
        masks |= {name: mask for name, port in one.ports.items() if port.droppable}
    return masks

  def without(self, names: Collection[str], count: Any) -> Drop:  # a number, or the open size of an export
    """Returns the drop of all examples of a batch for some conditions, as guidance needs it."""
    masks = {}
    for one in self.each:
      if one.name in names:
        masks |= {name: jnp.ones(count, bool) for name, port in one.ports.items() if port.droppable}
    return masks
