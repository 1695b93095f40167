"""A control image: what a sample should follow beside its caption, such as edges.

It enters no port of the network: a network of its own reads it and adds to the denoiser's maps
(`experiments.controlnet`). It is made of the image itself, after that was mirrored, so that the two never
disagree:

    edges            1 on an edge of any channel, 0 elsewhere (`data.edges`; of the data set `shapes` that is
                     its own control image)
    low_resolution   the means of factor x factor pixels, repeated

A control is in [0, 1], where the images that are diffused are in [-1, 1]. In sampling it is that of the
images of the evaluation split, in turn, or read of files (`sample.control`), or handed over.
"""

import dataclasses
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from vaediff import checks, reads
from vaediff.conditions.base import Condition
from vaediff.data import edges, folder, resize
from vaediff.errors import UserError
from vaediff.models import layers
from vaediff.models.ports import Port
from vaediff.spaces import Space
from vaediff.types import Batch, Given, Image, Keys, Read, Values

CONTROL = 'control'
"""Name of the condition, of its section, of its input and of its value."""
EDGES, LOW_RESOLUTION = 'edges', 'low_resolution'
KINDS = (EDGES, LOW_RESOLUTION)
FILES = 'control_images'
"""The name in `read` of control images that were read of files."""
RMSE = 'control_rmse'
"""How far a sample is from its control, where that is an image at a low resolution, for pixels in [0, 1]."""
METRICS = {edges.F1: True, edges.PRECISION: True, edges.RECALL: True, RMSE: False}
"""Of how far a sample follows its control: whether the largest is the best."""
BOUNDS = {
  'control.kind': checks.one_of(KINDS),
  'control.least': checks.inside(0, 1),
  'control.factor': checks.between(2, 64),
  'control.channels': checks.one_of((1, 3)),
  'sample.control': checks.Bound(
    lambda value: isinstance(value, tuple | list) and all(isinstance(one, str) and one for one in value),
    lambda field, value: (
      f"{field} must be files of control images, as ('edges.png',), or () = those of the images of the "
      f'evaluation split; got {value!r}'
    ),
  ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Control(Condition):
  """The control image of each example.

  Attributes:
    kind: one of `KINDS`.
    image_shape: of the data, (height, width, channels).
    space: of the state; its images are shown beside the control.
    least: of an edge.
    factor: of a low resolution.
    channels: of edges as the network reads them: 1, or 3 times the same.
    name: of its input and its value: `CONTROL`, or, of another stage's, that behind it.
  """

  kind: str
  image_shape: tuple[int, int, int]
  space: Space
  least: float
  factor: int
  channels: int = 1
  name: str = CONTROL

  dropout = 0.0
  reconstructs = True
  bounds_images = False

  @property
  def title(self) -> str:
    """Kind of the control image, for tables."""
    return f'{CONTROL} {self.kind}'

  @property
  def titles(self) -> Mapping[str, str]:
    """Of the control image."""
    return {self.name: self.title}

  @property
  def ports(self) -> Mapping[str, Port]:
    """None: the denoiser does not read it."""
    return {}

  @property
  def shape(self) -> tuple[int, int, int]:
    """Of a control image."""
    return (*self.image_shape[:2], 1 if self.kind == EDGES else self.image_shape[2])

  @property
  def hint_shape(self) -> tuple[int, int, int]:
    """Of what the network reads of it."""
    return (*self.shape[:2], max(self.shape[2], self.channels if self.kind == EDGES else 1))

  @property
  def inputs(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """The control image in [0, 1]."""
    return {self.name: jax.ShapeDtypeStruct(self.shape, jnp.float32)}

  @property
  def limits(self) -> Mapping[str, tuple[float, float]]:
    """Those of pixels over 255."""
    return {self.name: (0.0, 1.0)}

  @property
  def seen(self) -> tuple[str, ...]:
    """The control image: nothing draws it."""
    return (self.name,)

  @property
  def borrowed(self) -> tuple[str, ...]:
    """The control image: samples take those of evaluation images in order."""
    return (self.name,)

  def of(self, x: Image) -> Array:
    """Returns the control image, in [0, 1], of images in [-1, 1]."""
    x = (x + 1) / 2
    if self.kind == EDGES:
      return edges.edges(x, self.least)
    return layers.upsample_nearest(layers.average_pool(x, self.factor), self.factor)

  def observe(self, read: Read, batch: Batch, x: Image, key: jax.Array | None) -> Given:
    """Returns the control images of images."""
    del read, batch, key
    return {self.name: self.of(x)}

  def draw(self, read: Read, keys: Keys, indices: Int[Array, ' batch']) -> Given:
    """Returns those that were read of files, in turn; {} where none were."""
    del keys
    if self.name != CONTROL or FILES not in read:
      return {}
    return {self.name: read[FILES][indices % len(read[FILES])]}

  def values(self, read: Read, given: Given) -> Values:
    """Returns the control image as the network reads it.

    Raises:
      UserError: when it is of another size, has other channels, or is not scaled to [0, 1].
    """
    del read
    found = given[self.name]
    if found.shape[1:] != self.shape:
      raise UserError(
        f'the {self.title} must be {shown(self.shape)}, as in training, got {shown(found.shape[1:])} '
        '(height x width x channels)'
      )
    if not jnp.issubdtype(found.dtype, jnp.floating):
      raise UserError(
        f'the {self.title} must be numbers in [0, 1], float32, got {found.dtype}: divide bytes by 255'
      )
    return {self.name: jnp.broadcast_to(found, (len(found), *self.hint_shape))}

  def shown(self, given: Given) -> dict[str, Image]:
    """Returns the control image in [-1, 1], as large as the images that are drawn, in as many channels."""
    image = layers.average_pool(2 * given[self.name] - 1, self.space.factor)
    return {self.name: jnp.broadcast_to(image, (*image.shape[:3], self.image_shape[2]))}

  def followed(self, image: Image, control: Array) -> dict[str, Array]:
    """Returns how far images in [-1, 1] follow control images: a number per image, by the names of `METRICS`.

    Images that are smaller than the data are compared with their control made as small.
    """
    small = control.shape[1] // image.shape[1]
    if self.kind == EDGES:
      own = edges.edges((image + 1) / 2, self.least)
      wanted = (layers.average_pool(control, small) > 1 / (2 * small)).astype(jnp.float32)
      return edges.agreement(own, wanted)
    own = layers.average_pool((image + 1) / 2, max(1, self.factor // small))
    wanted = layers.average_pool(control, control.shape[1] // own.shape[1])
    return {RMSE: jnp.sqrt(jnp.mean(jnp.square(own - wanted), axis=(1, 2, 3)))}


def shown(shape: tuple[int, ...]) -> str:
  """Returns a shape in words."""
  return ' x '.join(map(str, shape))


@dataclasses.dataclass(frozen=True)
class Files:
  """Reads control images: what `reads.Published` calls.

  Attributes:
    paths: of the files.
    shape: that each must have.
  """

  paths: tuple[str, ...]
  shape: tuple[int, int, int]

  def __call__(self) -> np.ndarray:
    """Returns them, float32 in [0, 1]; one that is the same everywhere is warned of.

    Raises:
      UserError: a file is missing, no image, or of another size.
    """
    found = []
    for path in self.paths:
      if not pathlib.Path(path).is_file():
        raise UserError(f'sample.control names {path!r}, where no file is')
      one = folder.decode(pathlib.Path(path), self.shape[2])
      if one.shape != self.shape:
        raise UserError(
          f'sample.control names {path!r}, which is {shown(one.shape)}; {shown(self.shape)} are needed '
          '(height x width x channels), the size of the images that the stage was trained on'
        )
      if one.min() == one.max():
        logging.warning('sample.control: %s is %d everywhere: it says nothing', path, one.min())
      found.append(one.astype(np.float32) / 255)
    return np.stack(found)


def control_of(config: ConfigDict, stage: str, space: Space, name: str = CONTROL) -> Control:
  """Returns the control that a stage, an experiment of this kind, was trained with.

  Raises:
    UserError: for a value that is not allowed.
  """
  checks.check(config[stage], BOUNDS, f'config.{stage}.')
  section, data = config[stage].control, config.data
  if section.kind == LOW_RESOLUTION and data.image_size % section.factor:
    raise UserError(
      f'config.{stage}.control.factor is {section.factor}: it must divide the side of the images, '
      f'{data.image_size}'
    )
  return Control(
    kind=section.kind,
    image_shape=resize.image_shape(data),
    space=space,
    least=section.least,
    factor=section.factor,
    channels=section.channels,
    name=name,
  )


def files_of(config: ConfigDict, stage: str, shape: tuple[int, int, int]) -> Mapping[str, reads.Published]:
  """Returns the files of control images that samples follow, by name; {} = those of evaluation images."""
  paths = tuple(config[stage].sample.control)
  return {FILES: reads.Published(load=Files(paths, shape))} if paths else {}
