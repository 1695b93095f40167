"""What can be changed of a stage's samples: a control for each of its inputs, by shape and by how it comes.

Nothing here knows a condition: a new one whose inputs have a known kind of shape has its control at once.

| shape of one image | drawn of nothing | control |
|---|---|---|
| a map of floats, or the noise at the start | yes | a seed |
| floats [d] | | a code: a seed where it is drawn, and directions to move along |
| a whole number | | a class |
| a float | | a number |
| the ids of a caption | | a text |
| a map of floats or whole numbers | no, it is seen in an image | the picture that it is seen in |
| an image that is neither drawn nor seen | | the picture itself in its place |

No library of pages is imported here.
"""

import dataclasses
from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from vaediff.conditions.weight import WEIGHT
from vaediff.data import resize, sources, words
from vaediff.errors import UserError
from vaediff.experiments.base import NOISE, InSpace
from vaediff.run import classes, directions, draw
from vaediff.run.draw import HostArrays
from vaediff.run.trained import Trained

SEED, CODE, CLASS, NUMBER, CAPTION, SEEN, PICTURE = (
  'seed', 'code', 'class', 'number', 'caption', 'seen', 'picture',
)  # fmt: skip
"""Kinds of controls."""
TITLES = {NOISE: 'x_T', WEIGHT: 'guidance weight', words.TOKENS: 'caption'}
"""Of inputs that no condition's file names; others are called as their condition calls them."""
MAX_WEIGHT = 8.0
"""Largest guidance weight of a slider."""
CHANNELS = (1, 3)
MAX_RAW = 8
"""Numbers of a code that can be moved where no direction is known."""
MAX_CAPTIONS = 50
"""Captions that are offered as examples."""
MAX_CLASSES = 24
"""Directions of classes."""
PRINCIPAL, OF_CLASSES, RAW = 'principal directions', 'class directions', 'numbers of the code'
"""Groups of directions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Control:
  """How one input is chosen.

  Attributes:
    name: of the input.
    kind: one of the kinds above.
    title: for people.
    drawn: a seed draws it, where no picture is looked at.
    seen: it can be seen in an image.
    start: the first value of a number or a class.
    least: of a number.
    most: of a number; equal to `least` = any.
    choices: of a class, by number; of a caption, examples.
  """

  name: str
  kind: str
  title: str
  drawn: bool
  seen: bool
  start: float | int = 0
  least: float = 0.0
  most: float = 0.0
  choices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Direction:
  """A way to move a code.

  Attributes:
    name: unique in a stage.
    title: for people.
    group: of those that are shown together.
    of: the input that it moves.
    vector: what one unit adds.
    most: units, either way.
  """

  name: str
  title: str
  group: str
  of: str
  vector: np.ndarray
  most: float


def controls_for(trained: Trained) -> tuple[tuple[Control, ...], tuple[str, ...]]:
  """Returns a control for each input of a stage's samples, and what is said of inputs that have none.

  Classes, numbers and captions of the stages that feed it too: they are asked there for what is chosen here.
  """
  found, notes = [], []
  drawn, seen = made_of_nothing(trained), seen_in_images(trained)
  for name, struct in trained.experiment.inputs.items():
    kind = kind_of(name, struct, drawn, seen)
    if not kind:
      notes.append(f'{name} has a shape that no control is known for, {struct.shape}: it stays as drawn')
    elif kind != PICTURE or struct.shape[0] == trained.config.data.image_size:
      found.append(control(trained, name, kind, drawn=name in drawn, seen=name in seen))
  for source in filter(trained.has_maker, trained.experiment.makers):
    known = {one.name for one in found}
    others, _ = controls_for(trained.maker(source))
    found += [one for one in others if one.kind in (CLASS, NUMBER, CAPTION) and one.name not in known]
  return tuple(found), tuple(notes)


def control(trained: Trained, name: str, kind: str, *, drawn: bool, seen: bool) -> Control:
  """Returns the control of one input, of a kind that is known."""
  about = {}
  if kind == CLASS:
    about = {'choices': classes_of(trained, name)}
  elif kind == NUMBER:
    about = range_of(trained, name)
  elif kind == CAPTION:
    about = {'choices': trained.captions[:MAX_CAPTIONS]}
  title = TITLES[name] if name in TITLES else name.replace('_', ' ')
  return Control(name=name, kind=kind, title=title, drawn=drawn, seen=seen, **about)


def kind_of(name: str, struct: jax.ShapeDtypeStruct, drawn: Collection[str], seen: Collection[str]) -> str:
  """Returns the kind of the control of an input; '' where none is known.

  Args:
    name: of the input.
    struct: of one image.
    drawn: the inputs that are drawn of nothing.
    seen: those that are seen in images.
  """
  whole, rank = jnp.issubdtype(struct.dtype, jnp.integer), len(struct.shape)
  if name == words.TOKENS:
    return CAPTION
  if rank == 0:
    return CLASS if whole else NUMBER
  if rank == 1 and not whole and name != NOISE:
    return CODE if name in drawn or name in seen else ''  # none where it follows from others, as captions
  if name in drawn:
    return SEED
  if name in seen:
    return SEEN
  return PICTURE if rank == 3 and not whole and struct.shape[-1] in CHANNELS else ''


def made_of_nothing(trained: Trained) -> frozenset[str]:
  """Returns the names of the inputs that the stage draws of nothing."""
  numbers = jax.ShapeDtypeStruct((1,), jnp.int32)
  keys = jax.eval_shape(lambda: draw.image_keys(0, jnp.arange(1)))
  return frozenset(jax.eval_shape(trained.experiment.draw, trained.read, keys, numbers))


def seen_in_images(trained: Trained) -> frozenset[str]:
  """Returns the names of the inputs that the stage sees in images; numbers, as labels are, are not."""
  numbers = jax.ShapeDtypeStruct((1,), jnp.int32)
  x = jax.ShapeDtypeStruct((1, *resize.image_shape(trained.config.data)), jnp.float32)
  observe = lambda *args: trained.experiment.observe(*args)
  found = jax.eval_shape(observe, trained.read, {sources.LABEL: numbers}, x)
  return frozenset(name for name in found if len(found[name].shape) > 1)


def classes_of(trained: Trained, name: str) -> tuple[str, ...]:
  """Returns number and name of the classes that an input counts; without the data there are no names."""
  experiment = trained.experiment
  ports = experiment.conditions.ports if isinstance(experiment, InSpace) else {}
  count = ports[name].classes if name in ports else trained.config.data.num_classes
  try:
    names = trained.eval_source.label_names
  except UserError:
    names = ()
  return tuple(classes.title(names, index) for index in range(count))


def range_of(trained: Trained, name: str) -> dict[str, float]:
  """Returns `start`, `least` and `most` of a number: a guidance weight, a level of noise, or any."""
  sample = trained.settings
  if name == WEIGHT:
    start = float(sample.guidance_weight)
    return {'start': start, 'most': max(MAX_WEIGHT, 2 * start)}
  if trained.experiment.max_level:
    return {'start': float(sample.aug_level), 'most': float(trained.experiment.max_level)}
  return {}


# Directions --------------------------------------------------------------------------------------------


def directions_of(
  trained: Trained, controls: tuple[Control, ...], number: int, deviations: float, num_encoded: int
) -> tuple[tuple[Direction, ...], tuple[str, ...]]:
  """Returns the ways to move a stage's codes, and what is said of those that are not known.

  Args:
    trained: the stage.
    controls: its own.
    number: most principal directions of a code.
    deviations: how far to go along them, either way.
    num_encoded: most images of the evaluation split, for the means of classes.
  """
  found, notes = [], []
  for control in (one for one in controls if one.kind == CODE):
    own = []
    for make, args in (
      (principal, (trained, control.name, number, deviations)),
      (of_classes, (trained, control, num_encoded)),
    ):
      try:
        own += make(*args)
      except UserError as error:
        notes.append(str(error))
    found += own or raw(control.name, trained.experiment.inputs[control.name].shape[0], deviations)
  return tuple(found), tuple(notes)


def principal(trained: Trained, of: str, number: int, deviations: float) -> list[Direction]:
  """Returns the principal directions of a code, in units of their deviations, by falling signal."""
  arrays = directions.leading(trained, number)
  if not arrays or arrays['mean'].shape != trained.experiment.inputs[of].shape:
    return []
  return [
    Direction(
      name=f'{of}/principal/{index}',
      title=str(index + 1),
      group=PRINCIPAL,
      of=of,
      vector=arrays['directions'][:, index] * arrays['deviation'][index],
      most=deviations,
    )
    for index in range(directions.number_of(arrays))
  ]


def of_classes(trained: Trained, control: Control, num_encoded: int) -> list[Direction]:
  """Returns a direction for each class: to the mean code of its images from that of all, as one unit.

  [] where images have no classes, or the code is not seen in them.
  """
  if not control.seen:
    return []
  data, labels = trained.eval_images(num_encoded)
  present = np.unique(labels)[:MAX_CLASSES]
  if len(present) < 2:
    return []
  codes, names = trained.observe(data, labels)[control.name], trained.eval_source.label_names
  middle = codes.mean(axis=0)
  return [
    Direction(
      name=f'{control.name}/class/{label}',
      title=classes.title(names, int(label)),
      group=OF_CLASSES,
      of=control.name,
      vector=codes[labels == label].mean(axis=0) - middle,
      most=2.0,
    )
    for label in present
  ]


def raw(of: str, size: int, deviations: float) -> list[Direction]:
  """Returns the first numbers of a code themselves."""
  return [
    Direction(
      name=f'{of}/{index}',
      title=f'{of} {index}',
      group=RAW,
      of=of,
      vector=np.eye(size, dtype=np.float32)[index],
      most=deviations,
    )
    for index in range(min(size, MAX_RAW))
  ]


def moved(given: HostArrays, found: Collection[Direction], amounts: Mapping[str, float]) -> HostArrays:
  """Returns what images are made of with its codes moved, by the names of directions; the rest stays."""
  given = dict(given)
  for direction in found:
    amount = amounts[direction.name] if direction.name in amounts else 0.0
    if amount and direction.of in given:
      given[direction.of] = (given[direction.of] + amount * direction.vector).astype(np.float32)
  return given
