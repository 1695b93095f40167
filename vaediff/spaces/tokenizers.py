"""Stages that turn images into codes: what a token prior and a diffusion decoder read of them.

A tokenizer has one or several levels of codes, coarse first, each a grid of ids below its number of codes.
Whoever reads it knows no more of it than this: not what bottleneck it has, nor which stage trained it.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
from jaxtyping import Array, Int32
from ml_collections import ConfigDict

from vaediff import reads
from vaediff.errors import UserError
from vaediff.models import codebook
from vaediff.spaces import encoders
from vaediff.types import Image, LatentMap, Params

CODES = 'codes'
"""Name of the ids, where there is one level."""
TOKENIZER = 'tokenizer'
"""Name of the tokenizer's network in `read`."""
Grids = tuple[Int32[Array, 'batch _ _'], ...]
"""Ids of each level, coarse first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer(abc.ABC):
  """Images in [-1, 1] as codes, and back.

  Attributes:
    source: where its parameters come from.
    network: its name among the networks of the stage that trains it.
  """

  source: reads.FromStage

  network: ClassVar[str]

  @property
  @abc.abstractmethod
  def grids(self) -> tuple[tuple[int, int], ...]:
    """(height, width) of the ids of each level, coarse first."""

  @property
  @abc.abstractmethod
  def sizes(self) -> tuple[int, ...]:
    """How many codes each level has: its ids are below."""

  @abc.abstractmethod
  def codes(self, params: Params, x: Image) -> Grids:
    """Returns the ids of images."""

  @abc.abstractmethod
  def embed(self, params: Params, codes: Grids) -> LatentMap:
    """Returns the map that the decoder takes, made of ids; on the grid of the finest level."""

  @abc.abstractmethod
  def decode(self, params: Params, codes: Grids) -> Image:
    """Returns the images of ids by the tokenizer's own decoder, not clipped."""

  @property
  def embedded(self) -> tuple[int, int, int]:
    """Shape of one map of `embed`."""
    codes = tuple(jax.ShapeDtypeStruct((1, *grid), 'int32') for grid in self.grids)
    params = jax.eval_shape(self.source.model.init, jax.random.key(0))
    return jax.eval_shape(self.embed, params, codes).shape[1:]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vq(Tokenizer):
  """An autoencoder whose bottleneck is a codebook: one level."""

  network = 'autoencoder'

  @property
  def grids(self) -> tuple[tuple[int, int], ...]:
    """One, f times smaller than the image."""
    side = self.source.model.inputs[0].shape[1] // self.source.model.module.factor
    return ((side, side),)

  @property
  def sizes(self) -> tuple[int, ...]:
    """Of the one codebook."""
    return (self.source.model.module.codebook_size,)

  def codes(self, params: Params, x: Image) -> Grids:
    """Returns the nearest code of each vector."""
    return (codebook.nearest(encoders.encode(self.source.model, params, x, None), params[encoders.CODES]),)

  def embed(self, params: Params, codes: Grids) -> LatentMap:
    """Returns the codes themselves."""
    return codebook.lookup(params[encoders.CODES], codes[0])

  def decode(self, params: Params, codes: Grids) -> Image:
    """Returns what the decoder makes of the codes."""
    return self.source.model.apply(params, self.embed(params, codes), method='decode')


def vq(config: ConfigDict, stage: str, workdir: str) -> Vq:
  """Returns the tokenizer of a stage with the experiment 'autoencoder'.

  Raises:
    UserError: when it has no codes.
  """
  section = config[stage]
  if section.model.bottleneck != 'vq':
    raise UserError(
      f"{stage}.model.bottleneck is {section.model.bottleneck!r}, which has no codes; 'vq' has"
    )
  model = encoders.autoencoder_model(section.model, config.data)
  return Vq(source=reads.FromStage(stage=stage, network=Vq.network, workdir=workdir, model=model))


def names_of(levels: int) -> tuple[str, ...]:
  """Returns the names of the ids of so many levels, coarse first: 'codes', or 'codes_0', 'codes_1', ..."""
  return (CODES,) if levels == 1 else tuple(f'{CODES}_{level}' for level in range(levels))


BY_EXPERIMENT: dict[str, Callable[[ConfigDict, str, str], Tokenizer]] = {'autoencoder': vq}
"""By the experiment of the stage: (config, stage, workdir) -> the tokenizer."""


def tokenizer_of(config: ConfigDict, stage: str, workdir: str, field: str) -> Tokenizer:
  """Returns the frozen tokenizer of a stage.

  Args:
    config: of the run.
    stage: its name.
    workdir: the run that holds it; '' = this run.
    field: of the config, that named it, as 'tokenizer.stage'; for the message.

  Raises:
    UserError: when the stage is none that has codes.
  """
  for experiment, make in BY_EXPERIMENT.items():
    if reads.is_stage(config, stage, experiment):
      return make(config, stage, workdir)
  raise UserError(
    f'{field} is {stage!r}, which is no tokenizer of this config: a stage with one of the experiments '
    f'{", ".join(BY_EXPERIMENT)} whose bottleneck has codes'
  )
