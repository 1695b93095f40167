"""An image as the vector that a frozen CLIP stage makes of it: what makes a diffusion DALL-E 2's decoder.

Ramesh et al. 2022 (arXiv:2204.06125), section 2.1. The vector joins the embedding of the time, and a linear
map makes tokens of it, 4 there, that the network attends to beside the words of a caption. The network reads
sqrt(d) z, whose numbers have a mean square of 1. In sampling the vector is given, such as that of an image
that is to be varied, or is a sample of the stage that is named.

With `of = 'caption'` the diffusion is trained on the vectors of captions in the place of images': the arm of
their section 5.1 that has no prior.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vaediff import checks, reads
from vaediff.conditions.base import Condition
from vaediff.data.words import TOKENS
from vaediff.errors import UserError
from vaediff.models.ports import Port
from vaediff.spaces import Space, embeddings
from vaediff.spaces.embeddings import CLIP, EMBEDDING
from vaediff.types import Batch, Given, Image, Read, Values

CLIP_IMAGE = 'clip_image'
"""Name of the condition, and of its section."""
AS_TOKENS = 'embedding_tokens'
"""The value that enters as tokens: the same vector again."""
OF = ('image', 'caption')
"""Whose vector is read."""
MOST_TOKENS, MOST_WIDTH = 1024, 2**16
BOUNDS = {
  'conditions.clip_image.of': checks.one_of(OF),
  'conditions.clip_image.dropout': checks.below_one(),
  'conditions.clip_image.num_tokens': checks.between(0, MOST_TOKENS),
  'conditions.clip_image.width': checks.between(1, MOST_WIDTH),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipImage(Condition):
  """The vector of an image, of unit length.

  Attributes:
    clip: the CLIP stage.
    num_tokens: that are made of it; 0 = it joins the embedding of the time alone.
    width: of a token.
    dropout: probability of the learned stand-ins.
    flip: images are mirrored in training, so that their vectors are not known before.
    maker: the stage whose samples are the vectors in sampling; None = they are seen in data.
    of_captions: the vectors are those of the captions, in training and in sampling.
  """

  clip: reads.FromStage
  num_tokens: int
  width: int
  dropout: float
  flip: bool
  maker: reads.Sampled | None
  of_captions: bool = False

  name = CLIP_IMAGE
  bounds_images = False

  @property
  def title(self) -> str:
    """Whether the vector is of an image or of a caption, for tables."""
    return 'clip_caption' if self.of_captions else CLIP_IMAGE

  @property
  def seen(self) -> tuple[str, ...]:
    """The vector, but where it follows from the caption."""
    return () if self.of_captions else (EMBEDDING,)

  @property
  def reconstructs(self) -> bool:
    """Whether it says what the image looks like: a caption leaves much open."""
    return not self.of_captions

  @property
  def size(self) -> int:
    """Numbers of the vector."""
    return self.clip.model.module.embedding_size

  @property
  def ports(self) -> Mapping[str, Port]:
    """The vector beside the time, and as tokens wherever the network has attention."""
    droppable = self.dropout > 0
    found = {EMBEDDING: Port(enters='vector', shape=(self.size,), droppable=droppable)}
    if self.num_tokens:
      made = (self.num_tokens, self.width)
      found[AS_TOKENS] = Port(
        enters='text', how='attention', shape=(self.size,), made=made, droppable=droppable
      )
    return found

  @property
  def inputs(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """The CLIP vector, of length 1."""
    return {EMBEDDING: jax.ShapeDtypeStruct((self.size,), jnp.float32)}

  @property
  def ranges(self) -> Mapping[str, str]:
    """What the values of the vector mean."""
    return {EMBEDDING: 'a vector of CLIP, of length 1'}

  @property
  def frozen(self) -> Mapping[str, reads.Reads]:
    """The CLIP stage that makes the vectors."""
    return {CLIP: self.clip}

  @property
  def stored(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """The vector, unless images are mirrored, or captions have it: of these there are few."""
    return {} if self.flip or self.of_captions else self.inputs

  def observe(self, read: Read, batch: Batch, x: Image, key: jax.Array | None) -> Given:
    """Returns the vectors of the images, or what is stored; of captions nothing, as they say it."""
    del key
    if self.of_captions:
      return {}
    if EMBEDDING in batch:
      return {EMBEDDING: batch[EMBEDDING]}
    return {EMBEDDING: embeddings.images(self.clip, read, x)}

  def complete(self, read: Read, given: Given) -> Given:
    """Returns what was given with the vectors of its captions, where these are read and none are given."""
    if not self.of_captions or EMBEDDING in given:
      return given
    return {**given, EMBEDDING: embeddings.captions(self.clip, read, given[TOKENS])}

  def values(self, read: Read, given: Given) -> Values:
    """Returns the vector times the square root of its size, once for each port.

    Raises:
      UserError: when it has another size than training had.
    """
    del read
    z = given[EMBEDDING]
    if z.shape[1:] != (self.size,):
      raise UserError(
        f'{EMBEDDING} must be {self.size} numbers per image, as the CLIP stage {self.clip.stage!r} makes '
        f'them (model.embedding_size); got {z.shape[1:]}'
      )
    return dict.fromkeys(self.ports, math.sqrt(self.size) * z)


def for_student(named: Mapping[str, Any], teacher: str, workdir: str) -> dict[str, Any]:
  """Returns the section of a student: where its teacher is of another run, so is the prior."""
  del teacher
  return {**named, 'prior_stage': ''} if workdir else dict(named)


def clip_image_condition(config: ConfigDict, stage: str, space: Space) -> ClipImage:
  """Returns the condition that `config.<stage>.conditions.clip_image` describes.

  Raises:
    UserError: for a value that is not allowed, a stage that is no CLIP stage, or a prior of other vectors.
  """
  del space
  section = config[stage]
  checks.check(section, BOUNDS)
  named = section.conditions[CLIP_IMAGE]
  of_captions = named.of == 'caption'
  if of_captions:
    _check_captions(config, stage)
  return ClipImage(
    clip=embeddings.clip_of(config, named, f'conditions.{CLIP_IMAGE}'),
    num_tokens=named.num_tokens,
    width=named.width,
    dropout=named.dropout,
    flip=section.train.flip,
    maker=maker_of(config, stage),
    of_captions=of_captions,
  )


def _check_captions(config: ConfigDict, stage: str) -> None:
  """Raises UserError unless a stage that reads the vectors of captions has captions, and no other source."""
  section, named = config[stage], config[stage].conditions[CLIP_IMAGE]
  field = f'config.{stage}.conditions.{CLIP_IMAGE}'
  if 'text' not in section.conditions:
    raise UserError(
      f"{field}.of is 'caption', but the stage reads no captions (conditions.text): take the variant unclip, "
      "or of = 'image'"
    )
  if named.prior_stage:
    raise UserError(
      f"{field}.of is 'caption', and prior_stage is {named.prior_stage!r}, which draws vectors of images: "
      "set prior_stage to '', or of to 'image'"
    )
  embeddings.check_words(config, stage, named.stage, field)
  for number, caption in enumerate(section.sample.captions):
    if not caption.strip():
      raise UserError(
        f'config.{stage}.sample.captions has no words at place {number}: the vector of no words is none that '
        f"training has seen ({field}.of is 'caption'). Write a caption"
      )


def maker_of(config: ConfigDict, stage: str) -> reads.Sampled | None:
  """Returns the stage whose samples are the vectors that a stage reads; None where it names none.

  Raises:
    UserError: when it is no prior of this config, or one of the vectors of another CLIP stage.
  """
  named = config[stage].conditions[CLIP_IMAGE]
  if not named.prior_stage:
    return None
  field = f'conditions.{CLIP_IMAGE}.prior_stage'
  reads.need_stage(config, named.prior_stage, 'embedding_prior', field, 'prior of vectors of images')
  of = config[named.prior_stage].clip
  if (of.stage, of.workdir) != (named.stage, named.workdir):
    raise UserError(
      f'{field} is {named.prior_stage!r}, whose vectors are those of {of.stage!r} (workdir {of.workdir!r}), '
      f'but {stage!r} reads those of {named.stage!r} (workdir {named.workdir!r}): the same numbers mean '
      "others. Name a prior of the same CLIP stage, or '' for none"
    )
  return reads.Sampled(stage=named.prior_stage, workdir='', feeds=EMBEDDING, depth=1)
