"""What a stage reads of earlier ones, of measurements, or of what was published.

These are declarations; `vaediff.run.frozen` loads what they name into the dict `read`.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vaediff.data import words
from vaediff.errors import UserError
from vaediff.machine import digests
from vaediff.models.functional import Model
from vaediff.storage import identity, places
from vaediff.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromStage:
  """A network of an earlier stage: `read[name]` holds its parameters.

  Attributes:
    stage: name of the stage that trained it.
    network: its name in that stage.
    workdir: the run that holds it; '' = this run.
    model: its architecture, as the reader builds it.
    step: of the checkpoint; 0 = the latest.
    section: of the reader's config that describes it; '' = that of its stage.
    same: names of networks that it must have been trained with and the reader reads: they must be the same.
  """

  stage: str
  network: str
  workdir: str
  model: Model
  step: int = 0
  section: str = ''
  same: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
  """What was measured of a stage over the training images, such as a prior: `read[name]` holds its arrays.

  Attributes:
    stage: name of the stage.
    workdir: the run that holds it; '' = this run.
    measurement: its name, of `vaediff.run.measurements`.
    neutral: returns arrays of the same shapes without a meaning, to compile and to measure speed with.
    settings: of the reader, what is made of what was measured; for measurements that leave that open.
  """

  stage: str
  workdir: str
  measurement: str
  neutral: Callable[[], Any]
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
  """Arrays that no stage has trained, such as published weights: `read[name]` holds its `value`.

  Attributes:
    load: returns them; raises UserError, saying how to get them, when they are not there.
  """

  load: Callable[[], Params]

  @functools.cached_property
  def value(self) -> Params:
    """What `load` returns; it is called once, at the first access, and raises as `load` does."""
    return self.load()

  @functools.cached_property
  def digest(self) -> str:
    """The id of the arrays, made once; all processes must ask for it, and it raises as `load` does."""
    return identity.digest(digests.of_parts(self.value))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled:
  """The stage whose samples feed a condition when it is sampled; nothing is read of it in training.

  Attributes:
    stage: name of the stage.
    workdir: the run that holds it; '' = this run.
    feeds: which of the condition's inputs its images are. Where it draws ids, or another array, of that name,
      they are this input, and what else it draws of the name of an input is that one.
    depth: how many stages are sampled, one after the other, before the one that it feeds: 1 or more.
  """

  stage: str
  workdir: str
  feeds: str
  depth: int


CAPTIONS = 'captions'
"""The name in `read` of the captions of samples."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Captions:
  """The captions that samples of a stage have: `read[name]` holds {`words.TOKENS`: int32 [captions, length]}.

  Attributes:
    stage: whose tokenizer and `sample.captions` they are of.
    workdir: the run that holds it; '' = this run.
    length: tokens of a caption.
    vocab_size: tokens are below it.
  """

  stage: str
  workdir: str
  length: int
  vocab_size: int

  def neutral(self) -> dict[str, np.ndarray]:
    """Returns one caption of no words, to compile and to measure speed with."""
    empty = np.full((1, self.length), words.PAD, np.int32)
    empty[0, :2] = [words.BOS, words.EOS]
    return {words.TOKENS: empty}


Reads = FromStage | Measured | Published | Captions


def workdir_of(source: Any, workdir: pathlib.Path) -> pathlib.Path:
  """Returns the folder of the run that holds what `source` names.

  Args:
    source: a declaration of this file, or a section of a config, with a `workdir`: a path that may begin with
      ~ or lie in a bucket, or '' = that of the run that asks.
    workdir: of the run that asks.

  Raises:
    UserError: when there is no such home folder, or the store of the bucket is not known.
  """
  return places.anywhere(source.workdir) if source.workdir else workdir


def is_stage(config: ConfigDict, name: str, experiment: str) -> bool:
  """Returns whether `config.<name>` is the section of a stage with this experiment."""
  section = config[name] if name in config else None
  return isinstance(section, ConfigDict) and 'experiment' in section and section.experiment == experiment


def need_stage(config: ConfigDict, name: str, experiment: str, field: str, what: str) -> ConfigDict:
  """Returns the section of the stage that a field names.

  Args:
    config: of the run.
    name: the field's value.
    experiment: that the stage must have.
    field: as 'vae.stage', for the message.
    what: a stage of that kind, as 'VAE stage', for the message.

  Raises:
    UserError: when the stage is none of this kind.
  """
  if not is_stage(config, name, experiment):
    raise UserError(f'{field} is {name!r}, which is no {what} of this config')
  return config[name]
