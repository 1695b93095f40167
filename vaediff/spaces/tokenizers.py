"""Stages that turn images into codes: what a token prior and a diffusion decoder read of them.

A tokenizer has one or several levels of codes, coarse first, each a grid of ids below its number of codes.
Whoever reads it knows no more of it than this: not what bottleneck it has, nor which stage trained it.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vaediff import reads
from vaediff.errors import UserError
from vaediff.models import codebook, relaxed_codes
from vaediff.spaces import encoders, hierarchies
from vaediff.types import Image, LatentMap, Params

CODES = 'codes'
"""Name of the ids, where there is one level."""
FROZEN = 'frozen'
"""What a tokenizer is that is trained before what reads it."""
TOKENIZER = 'tokenizer'
"""Name of the tokenizer's network in `read`."""
FREQUENCIES = 'code_frequencies'
"""The measurement of how often each code is used over the training images, and the name it is read by."""
Grids = hierarchies.Grids
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
  decodes: ClassVar[bool] = True
  """It has a decoder of its own."""

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
    z = encoders.encode(self.source.model, params, x, None)
    return (codebook.nearest(z, encoders.codes_of(self.source.model, params)),)

  def embed(self, params: Params, codes: Grids) -> LatentMap:
    """Returns the codes themselves."""
    return codebook.lookup(encoders.codes_of(self.source.model, params), codes[0])

  def decode(self, params: Params, codes: Grids) -> Image:
    """Returns what the decoder makes of the codes."""
    return self.source.model.apply(params, self.embed(params, codes), method='decode')


class Relaxed(Vq):
  """An autoencoder with relaxed codes: one level, whose ids are those of the largest logits."""

  def codes(self, params: Params, x: Image) -> Grids:
    """Returns the most likely code of each position: without noise."""
    return (relaxed_codes.most_likely(self.source.model.apply(params, x, method='logits')),)


class Coder(Vq):
  """The encoder and the codes of such an autoencoder, without its decoder: a diffusion is trained with it."""

  network = TOKENIZER
  decodes = False

  @classmethod
  def of(cls, tokenizer: Vq, stage: str, workdir: str) -> 'Coder':
    """Returns that of a tokenizer's architecture, as a stage trains it."""
    model = dataclasses.replace(tokenizer.source.model, entry='encode')
    return cls(source=reads.FromStage(stage=stage, network=cls.network, workdir=workdir, model=model))

  def decode(self, params: Params, codes: Grids) -> Image:
    """Raises UserError: such a tokenizer has no decoder of its own."""
    raise UserError(f'the tokenizer of stage {self.source.stage!r} has no decoder but its diffusion')

  def straight_through(self, params: Params, x: Image) -> tuple[Grids, LatentMap, Float[Array, ' batch']]:
    """Returns the ids, the codes whose gradient passes straight through to the encoder, and the commitment.

    That is the mean squared distance of an image's vectors from their codes, which do not follow it.
    """
    z = encoders.encode(self.source.model, params, x, None)
    codes = encoders.codes_of(self.source.model, params)
    embedded, ids = codebook.quantize(z, codes)
    fixed = jax.lax.stop_gradient(codebook.lookup(codes, ids))
    return (ids,), embedded, jnp.mean(jnp.square(z - fixed), axis=(1, 2, 3))


BY_BOTTLENECK = {'vq': Vq, 'gumbel': Relaxed}
"""By `model.bottleneck` of an autoencoder."""


def vq(config: ConfigDict, stage: str, workdir: str) -> Vq:
  """Returns the tokenizer of a stage with the experiment 'autoencoder'.

  Raises:
    UserError: when it has no codes.
  """
  section = config[stage]
  bottleneck = section.model.bottleneck
  if bottleneck not in BY_BOTTLENECK:
    valid = ', '.join(BY_BOTTLENECK)
    raise UserError(f'{stage}.model.bottleneck is {bottleneck!r}, which has no codes; with codes: {valid}')
  model = encoders.autoencoder_model(section.model, config.data)
  source = reads.FromStage(stage=stage, network=Vq.network, workdir=workdir, model=model)
  return BY_BOTTLENECK[bottleneck](source=source)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Levels(Tokenizer):
  """An autoencoder with codes on several grids: VQ-VAE-2."""

  network = hierarchies.NETWORK

  @property
  def grids(self) -> tuple[tuple[int, int], ...]:
    """One per level, each twice as fine as the one before."""
    return hierarchies.grids(self.source.model)

  @property
  def sizes(self) -> tuple[int, ...]:
    """The same at every level."""
    module = self.source.model.module
    return (module.codebook_size,) * module.num_levels

  def codes(self, params: Params, x: Image) -> Grids:
    """Returns the nearest code of each vector, which those above have a part in."""
    return hierarchies.encode(self.source.model, params, x)

  def embed(self, params: Params, codes: Grids) -> LatentMap:
    """Returns the codes of the finest level beside those above it, enlarged."""
    return hierarchies.embed(self.source.model, params, codes)

  def decode(self, params: Params, codes: Grids) -> Image:
    """Returns what the decoder makes of the codes."""
    return hierarchies.decode(self.source.model, params, self.embed(params, codes))


def levels(config: ConfigDict, stage: str, workdir: str) -> Levels:
  """Returns the tokenizer of a stage with the experiment 'hierarchy'."""
  model = hierarchies.hierarchy_model(config[stage].model, config.data)
  return Levels(source=reads.FromStage(stage=stage, network=Levels.network, workdir=workdir, model=model))


def coder(config: ConfigDict, stage: str, workdir: str) -> Coder:
  """Returns the tokenizer that a stage with the experiment 'diffusion' trains.

  Raises:
    UserError: when it trains none.
  """
  conditions = config[stage].conditions
  if CODES not in conditions or conditions[CODES].training == FROZEN:
    raise UserError(
      f"{stage!r} is a diffusion that trains no tokenizer: conditions.{CODES}.training is not 'joint' or "
      f"'warm' there; name a stage that does"
    )
  named = conditions[CODES].stage
  field = f'{stage}.conditions.{CODES}.stage'
  reads.need_stage(config, named, 'autoencoder', field, 'autoencoder with codes')
  return Coder.of(vq(config, named, ''), stage, workdir)


def names_of(levels: int) -> tuple[str, ...]:
  """Returns the names of the ids of so many levels, coarse first: 'codes', or 'codes_0', 'codes_1', ..."""
  return (CODES,) if levels == 1 else tuple(f'{CODES}_{level}' for level in range(levels))


BY_EXPERIMENT: dict[str, Callable[[ConfigDict, str, str], Tokenizer]] = {
  'autoencoder': vq,
  'hierarchy': levels,
  'diffusion': coder,
}
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


# How often each code is used -------------------------------------------------------------------------


def level_key(level: int) -> str:
  """Returns the name of the array of a level, coarse first, in the measurement `FREQUENCIES`."""
  return f'level_{level}'


def frequencies(tokenizer: Tokenizer) -> reads.Measured:
  """Returns the declaration of how often each code of a tokenizer is used over the training images.

  What is read holds a float32 array [codes] per level, by `level_key`, each with the sum 1.
  """
  source = tokenizer.source
  return reads.Measured(
    stage=source.stage,
    workdir=source.workdir,
    measurement=FREQUENCIES,
    neutral=lambda: uniform(tokenizer),
  )


def uniform(tokenizer: Tokenizer) -> dict[str, np.ndarray]:
  """Returns the frequencies of codes that are used equally: of no meaning, but of the right shapes."""
  sizes = enumerate(tokenizer.sizes)
  return {level_key(level): np.full(size, 1 / size, np.float32) for level, size in sizes}


def perplexity(frequencies: np.ndarray) -> float:
  """Returns exp(-sum p log p): 1 where one code is used alone, their number where all are equally."""
  used = np.asarray(frequencies, np.float64)
  used = used[used > 0]
  return float(np.exp(-np.sum(used * np.log(used))))
