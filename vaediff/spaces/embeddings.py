"""The vectors that a frozen CLIP stage makes of images, at mean 0 and deviation 1: where a prior diffuses.

    y = (z - mean) / std,    z = CLIP(x) / |CLIP(x)|

Mean and deviation of each number were measured over the training images. What is decoded is brought back to
the sphere: of a vector there is no image here, a diffusion that is given it draws one
(`conditions.clip_image`). DALL-E 2 (arXiv:2204.06125) scales its vectors by one number instead.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from vaediff import reads
from vaediff.errors import UserError
from vaediff.models import clip
from vaediff.models.functional import Model
from vaediff.models.text_tower import Tower
from vaediff.spaces.base import Space
from vaediff.spaces.latents import standard
from vaediff.types import Image, Read, Vectors

CLIP = 'clip'
"""Name of the network, and of the experiment that trains it."""
EMBEDDING = 'embedding'
"""An image as such a vector, float32 [n, embedding_size], of unit length; and the measurement of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embeddings(Space):
  """Vectors of images.

  Attributes:
    shape: (numbers,).
    source: the CLIP stage.
    statistics: of its vectors.
  """

  shape: tuple[int]
  source: reads.FromStage
  statistics: reads.Measured
  bound: float | None = None

  @property
  def frozen(self) -> Mapping[str, reads.Reads]:
    """The CLIP stage, and the statistics."""
    return {CLIP: self.source, EMBEDDING: self.statistics}

  def scale(self, read: Read) -> tuple[Array, Array]:
    """Returns mean and scale [1, numbers]: y = (z - mean) / scale."""
    found = read[EMBEDDING]
    return jnp.asarray(found['mean'])[None], jnp.maximum(found['std'], 1e-6)[None]

  def whitened(self, read: Read, z: Vectors) -> Vectors:
    """Returns what is diffused of vectors of unit length."""
    mean, scale = self.scale(read)
    return (z - mean) / scale

  def encode(self, read: Read, x: Image, key: jax.Array | None) -> Vectors:
    """Returns what is diffused of images in [-1, 1]."""
    del key
    return self.whitened(read, images(self.source, read, x))

  def decode_map(self, read: Read, y: Vectors) -> Vectors:
    """Returns vectors of unit length: there is no image of one."""
    mean, scale = self.scale(read)
    return clip.unit(y * scale + mean)

  def decode(self, read: Read, y: Vectors) -> dict[str, Array]:
    """Returns {EMBEDDING: vectors of unit length}."""
    return {EMBEDDING: self.decode_map(read, y)}


def images(source: reads.FromStage, read: Read, x: Image) -> Vectors:
  """Returns images in [-1, 1] as vectors of unit length, by a CLIP stage that is read."""
  return source.model.apply(read[CLIP], x, method='images')


def captions(source: reads.FromStage, read: Read, tokens: Int[Array, 'batch length']) -> Vectors:
  """Returns captions, as ids, as vectors of unit length, by a CLIP stage that is read."""
  return source.model.apply(read[CLIP], tokens.astype(jnp.int32), method='texts')


def embeddings(config: ConfigDict, named: ConfigDict, field: str) -> Embeddings:
  """Returns the space of the vectors of a CLIP stage.

  Args:
    config: of the run.
    named: a section with its `stage` and `workdir`.
    field: the name of that section, for messages.

  Raises:
    UserError: when it is no CLIP stage.
  """
  source = clip_of(config, named, field)
  size = source.model.module.embedding_size
  return Embeddings(
    shape=(size,),
    source=source,
    statistics=reads.Measured(
      stage=named.stage, workdir=named.workdir, measurement=EMBEDDING, neutral=lambda: standard(size)
    ),
  )


def clip_of(config: ConfigDict, named: ConfigDict, field: str) -> reads.FromStage:
  """Returns the frozen network of a CLIP stage; arguments and errors are those of `embeddings`."""
  reads.need_stage(config, named.stage, CLIP, f'{field}.stage', 'CLIP stage')
  return reads.FromStage(
    stage=named.stage, network=CLIP, workdir=named.workdir, model=clip_model(config, named.stage)
  )


def check_words(config: ConfigDict, stage: str, named: str, field: str) -> None:
  """Raises UserError unless a stage reads captions as the CLIP stage that it names does: by equal ids."""
  own, theirs = config[stage].text.to_dict(), config[named].text.to_dict()
  for name, value in theirs.items():
    if own[name] != value:
      raise UserError(
        f'text.{name} is {own[name]!r}, but {value!r} in the stage {named!r} ({field}.stage), which reads '
        'the captions: set both to the same value'
      )


def clip_model(config: ConfigDict, stage: str) -> Model:
  """Returns the network that the CLIP stage `config.<stage>` describes."""
  section, size, channels = config[stage], config.data.image_size, config.data.channels
  scale, bias = clip.FIRST[section.loss.kind]
  sizes: dict[str, Any] = section.model.to_dict()
  module = clip.Clip(
    image_size=size,
    vocabulary=section.text.vocab_size,
    scale=scale,
    bias=bias,
    **{**sizes, 'image': Tower(**sizes['image']), 'text': Tower(**sizes['text'])},
  )
  image = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
  return Model(module=module, inputs=(image, jax.ShapeDtypeStruct((1, section.text.length), jnp.int32)))
