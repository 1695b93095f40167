"""Codes of a tokenizer: what makes a diffusion the decoder of discrete codes (DiVAE, arXiv:2206.00386).

The ids of an image are looked up, and the map of their codes enters the U-Net at its bottom level
(`models.token_injection`). The tokenizer's own decoder is not needed: what it makes of the same ids is shown
beside a sample. In sampling the ids are given, those of an image, or the samples of a stage that is named.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vaediff import checks, reads
from vaediff.conditions.base import Condition, TrainedNetwork
from vaediff.errors import UserError
from vaediff.models import codebook, token_injection
from vaediff.models.ports import Port
from vaediff.spaces import Space, tokenizers
from vaediff.spaces.tokenizers import CODES, TOKENIZER, names_of
from vaediff.types import Batch, Given, Image, Read, Values

DECODED = 'x0_codes'
"""The image that the tokenizer's own decoder makes of the ids."""
VECTORS, COMMITMENT = 'code_vectors', 'commitment'
"""While a tokenizer is trained: the codes that pass the gradient on, and the distance of its vectors."""
START = 'first_tokenizer'
"""The name in `read` of the tokenizer that training begins with."""
JOINT, WARM = 'joint', 'warm'
TRAINING = (tokenizers.FROZEN, JOINT, WARM)
BOUNDS = {
  'conditions.codes.position': checks.one_of(token_injection.POSITIONS),
  'conditions.codes.how': checks.one_of(token_injection.WAYS),
  'conditions.codes.dropout': checks.below_one(),
  'conditions.codes.training': checks.one_of(TRAINING),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codes(Condition):
  """The ids of each level, coarse first.

  Attributes:
    tokenizer: whose ids they are.
    shape: of one map of their codes.
    position: where their map enters, of `token_injection.POSITIONS`.
    how: of `token_injection.WAYS`.
    dropout: probability of the learned stand-in, one vector for all positions.
    flip: images are mirrored in training, so that their ids are not known before.
    maker: the stage whose samples are the ids in sampling; None = they are seen in data.
  """

  tokenizer: tokenizers.Tokenizer
  shape: tuple[int, int, int]
  position: str
  how: str
  dropout: float
  flip: bool
  maker: reads.Sampled | None

  name = CODES
  title = CODES
  reconstructs = True
  reads_codes = True

  @property
  def titles(self) -> Mapping[str, str]:
    """Of the image that is shown."""
    return {DECODED: 'tokenizer'} if self.tokenizer.decodes else {}

  @property
  def ports(self) -> Mapping[str, Port]:
    """The map of the codes, inside the network."""
    return {
      CODES: Port(enters=self.position, how=self.how, shape=self.shape, droppable=self.dropout > 0),
    }

  @property
  def inputs(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Ids of every level of the tokenizer."""
    grids = self.tokenizer.grids
    return {
      name: jax.ShapeDtypeStruct(grid, jnp.int32)
      for name, grid in zip(names_of(len(grids)), grids, strict=True)
    }

  @property
  def seen(self) -> tuple[str, ...]:
    """All levels: an image or a prior supplies them."""
    return tuple(self.inputs)

  @property
  def frozen(self) -> Mapping[str, reads.Reads]:
    """The tokenizer, whose codebook turns ids into a map."""
    return {TOKENIZER: self.tokenizer.source}

  @property
  def stored(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """The ids, unless images are mirrored: the ids of a mirrored image are not its ids mirrored."""
    return {} if self.flip else self.inputs

  def observe(self, read: Read, batch: Batch, x: Image, key: jax.Array | None) -> Given:
    """Returns the ids of the images; or what is stored."""
    del key
    if self.inputs.keys() <= batch.keys():
      return {name: batch[name] for name in self.inputs}
    return dict(zip(self.inputs, self.tokenizer.codes(read[TOKENIZER], x), strict=True))

  def complete(self, read: Read, given: Given) -> Given:
    """Returns the image of the tokenizer's own decoder, if it has one, beside the ids."""
    if not self.tokenizer.decodes:
      return given
    return {**given, DECODED: self.tokenizer.decode(read[TOKENIZER], self.ids(given))}

  def values(self, read: Read, given: Given) -> Values:
    """Returns the map of the codes."""
    return {CODES: self.tokenizer.embed(read[TOKENIZER], self.ids(given))}

  def shown(self, given: Given) -> dict[str, Image]:
    """Returns the image that the tokenizer's own decoder makes of the codes."""
    return {DECODED: given[DECODED]} if self.tokenizer.decodes else {}

  def nats(self, read: Read, x: Image) -> Values:
    """Returns 'codes', log K for each id: what a bound adds for ids that are taken to be equally likely."""
    del read
    levels = zip(self.tokenizer.grids, self.tokenizer.sizes, strict=True)
    return {CODES: jnp.full(len(x), sum(math.prod(grid) * math.log(size) for grid, size in levels))}

  def ids(self, given: Given) -> tokenizers.Grids:
    """Returns the ids of each level, of what was given.

    Raises:
      UserError: when they have another grid, or are no whole numbers.
    """
    found = tuple(given[name] for name in self.inputs)
    for (name, struct), ids in zip(self.inputs.items(), found, strict=True):
      if ids.shape[1:] != struct.shape or not jnp.issubdtype(ids.dtype, jnp.integer):
        wanted, got = (' x '.join(map(str, shape)) for shape in (struct.shape, ids.shape[1:]))
        raise UserError(
          f'{name} must be ids, {wanted} whole numbers per image, as the tokenizer '
          f'{self.tokenizer.source.stage!r} makes them; got {got} of type {ids.dtype}'
        )
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class JointCodes(Codes):
  """The ids of a tokenizer that the stage trains: the gradient of its loss passes straight through the codes.

  Attributes:
    tokenizer: encoder and codes.
    settings: of its bottleneck, the section `loss` of the stage that has its architecture.
    start: the trained tokenizer that it begins as; None = it begins fresh.
  """

  tokenizer: tokenizers.Coder
  settings: Mapping[str, Any]
  start: reads.FromStage | None

  stored = {}

  @property
  def frozen(self) -> Mapping[str, reads.Reads]:
    """The trained tokenizer that it begins as, if any."""
    return {START: self.start} if self.start else {}

  @property
  def trained(self) -> Mapping[str, TrainedNetwork]:
    """The tokenizer, which is trained beside the decoder."""
    start = START if self.start else ''
    return {TOKENIZER: TrainedNetwork(model=self.tokenizer.source.model, settings=self.settings, start=start)}

  @property
  def losses(self) -> Mapping[str, float]:
    """The commitment of its vectors to their codes."""
    return {COMMITMENT: self.settings['commitment_weight']}

  def observe_in_training(self, read: Read, batch: Batch, x: Image, key: jax.Array) -> Given:
    """Returns the ids with their codes, through which the gradient passes, and the commitment."""
    del batch, key
    ids, vectors, commitment = self.tokenizer.straight_through(read[TOKENIZER], x)
    return {**dict(zip(self.inputs, ids, strict=True)), VECTORS: vectors, COMMITMENT: commitment}

  def values(self, read: Read, given: Given) -> Values:
    """Returns the map of the codes; in training with the commitment beside it."""
    if VECTORS not in given:
      return super().values(read, given)
    return {CODES: given[VECTORS], COMMITMENT: given[COMMITMENT]}


def for_student(named: Mapping[str, Any], teacher: str, workdir: str) -> dict[str, Any]:
  """Returns the section of a student of a stage: it reads the tokenizer that the teacher was trained with.

  Where that is of another run, so is its prior, which the student does not know of.
  """
  if workdir:
    named = {**named, 'prior_stage': ''}
  if named['training'] == tokenizers.FROZEN:
    return dict(named)
  return {**named, 'stage': teacher, 'workdir': workdir, 'training': tokenizers.FROZEN}


def codes_condition(config: ConfigDict, stage: str, space: Space) -> Codes:
  """Returns the condition that `config.<stage>.conditions.codes` describes.

  Raises:
    UserError: for a value that is not allowed, or a stage without codes. Where the grid of the codes is not
      that of the U-Net's bottom level, the U-Net says so.
  """
  del space
  section = config[stage]
  checks.check(section, BOUNDS)
  named = section.conditions[CODES]
  if stage == named.stage:
    raise UserError(f'conditions.codes.stage is {stage!r}, the stage itself; name one that is trained before')
  tokenizer = tokenizers.tokenizer_of(config, named.stage, named.workdir, 'conditions.codes.stage')
  fields = {
    'shape': tokenizer.embedded,
    'position': named.position,
    'how': named.how,
    'dropout': named.dropout,
    'flip': section.train.flip,
    'maker': maker_of(config, stage, len(tokenizer.grids)),
  }
  if named.training == tokenizers.FROZEN:
    return Codes(tokenizer=tokenizer, **fields)
  if 'teacher' in section:
    raise UserError(
      f'conditions.codes.training is {named.training!r}, but a student trains no tokenizer: it reads that of '
      f'its teacher; use {tokenizers.FROZEN!r}'
    )
  return JointCodes(
    tokenizer=coder(config, stage, tokenizer),
    settings=config[named.stage].loss.to_dict(),
    start=tokenizer.source if named.training == WARM else None,
    **fields,
  )


def coder(config: ConfigDict, stage: str, tokenizer: tokenizers.Tokenizer) -> tokenizers.Coder:
  """Returns the tokenizer that a stage trains, of the architecture of another.

  Raises:
    UserError: when that has not one codebook that follows averages, or too many codes for a batch.
  """
  named, section = config[stage].conditions[CODES], config[tokenizer.source.stage]
  if type(tokenizer) is not tokenizers.Vq or section.loss.codebook != 'ema':
    raise UserError(
      f'conditions.codes.training is {named.training!r}, which takes the architecture of an autoencoder with '
      f"model.bottleneck = 'vq' and loss.codebook = 'ema', as the stage vqvae; {named.stage!r} has another. "
      f'Use training = {tokenizers.FROZEN!r}, or such a stage'
    )
  if section.loss.entropy_weight > 0:
    raise UserError(
      f'{named.stage}.loss.entropy_weight is {section.loss.entropy_weight:g}, which a tokenizer trained by a '
      f'diffusion (conditions.codes.training = {named.training!r}) does not read; set it to 0'
    )
  (height, width), (size,) = tokenizer.grids[0], tokenizer.sizes
  vectors = config[stage].train.batch_size * height * width
  codebook.check_restarts(vectors, size, section.loss.restart_below)
  return tokenizers.Coder.of(tokenizer, stage, '')


def maker_of(config: ConfigDict, stage: str, levels: int) -> reads.Sampled | None:
  """Returns the stage whose samples are the ids that a stage reads; None where it names none.

  Raises:
    UserError: when it is no prior of this config, or one of another tokenizer, whose ids mean other codes.
  """
  named = config[stage].conditions[CODES]
  prior = named.prior_stage
  if not prior:
    return None
  section = config[prior] if prior in config else None
  if not isinstance(section, ConfigDict) or 'experiment' not in section:
    raise UserError(f'conditions.codes.prior_stage is {prior!r}, which is no stage of this config')
  if TOKENIZER not in section:
    raise UserError(
      f'conditions.codes.prior_stage is {prior!r}, which draws no ids; name a stage with the experiment '
      "'token_prior', or '' for none"
    )
  own = named.stage if named.training == tokenizers.FROZEN else stage
  if section.tokenizer.stage != own:
    raise UserError(
      f'conditions.codes.prior_stage is {prior!r}, whose tokenizer.stage is {section.tokenizer.stage!r}, but '
      f'the codes of {stage!r} are those of {own!r}: the same ids mean others. Name a prior of {own!r}, or '
      "'' for none"
    )
  return reads.Sampled(stage=prior, workdir='', feeds=names_of(levels)[-1], depth=1)
