"""What an import is made of: the config that it edits, the files, and what was assumed on the way.

A file says much of a network by the shapes of its tensors, and what it does not say is taken from its name,
from the config, or is what its authors used. All of that is said, and stored beside the checkpoint.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from vaediff import checks
from vaediff.errors import UserError
from vaediff.experiments.base import Experiment, TrainState
from vaediff.weights import families, state_dicts
from vaediff.weights.families import Part
from vaediff.weights.families.ncsnpp import BAND_ORDERS

SECTION = 'adopt'
"""The section of the config; `import` cannot be written as --config.import."""
SIZES, WEIGHTS = ('config', 'file'), ('ema', 'raw')
FORMULATIONS = ('', 'formulation1', 'formulation2')
BOUNDS = {
  'sizes': checks.one_of(SIZES),
  'weights': checks.one_of(WEIGHTS),
  'formulation': checks.one_of(FORMULATIONS),
  'num_heads': checks.count(0),
  'band_order': checks.one_of(('', *BAND_ORDERS)),
  'latent_scale': checks.at_least(0),
  'step': checks.count(0),
}
ORIGINS = {
  'diffusevae': ('kpandey008/DiffuseVAE', 'MIT'),
  'ddgan': ('NVlabs/denoising-diffusion-gan', 'NVIDIA Source Code License: research or evaluation only'),
  'wavediff': ('VinAIResearch/WaveDiff', 'AGPL-3.0'),
  'lddgan': ('the repository of LDDGAN', 'none is stated'),
  'ldm': ('CompVis/latent-diffusion or CompVis/taming-transformers', 'MIT'),
}
"""Repository and licence by origin: of the code; a file of weights may have its own."""
LEAST_NORM = 128
"""Channels from which on our group norms have the 32 groups that the published code has at any width."""
Finish = Callable[[Experiment, TrainState], TrainState]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
  """A network that becomes one of a stage.

  Attributes:
    part: where it is in the file.
    file: that it is in.
    stage: that it becomes a network of.
    options: what its table needs beside shapes; see `Family.entries`.
    origin: of `ORIGINS`.
    step: updates done.
  """

  part: Part
  file: state_dicts.StateDict
  stage: str
  options: Mapping[str, Any]
  origin: str
  step: int

  @property
  def network(self) -> str:
    """Its name in the stage."""
    return self.part.family.network


@dataclasses.dataclass
class Import:
  """An import while it is made.

  Attributes:
    config: of the run that it will be; changed on the way.
    settings: `config.adopt`, as it was asked for.
    stages: that were chosen.
    networks: found so far.
    assumed: (field or fact, value, where it is from), by stage.
    scales: by autoencoder stage, what its latents are divided by.
  """

  config: ConfigDict
  settings: ConfigDict
  stages: tuple[str, ...]
  networks: list[Network] = dataclasses.field(default_factory=list)
  assumed: dict[str, list[tuple[str, Any, str]]] = dataclasses.field(default_factory=dict)
  scales: dict[str, float] = dataclasses.field(default_factory=dict)

  def say(self, stage: str, what: str, value: Any, where: str) -> None:
    """Notes what is taken to be so, and why."""
    line = (what, value, where)
    if line not in self.assumed.setdefault(stage, []):
      self.assumed[stage].append(line)

  def value(self, stage: str, field: str) -> Any:
    """Returns the value of a field of a stage, as 'model.channels'."""
    inside = self.config[stage]
    for part in field.split('.'):
      inside = inside[part]
    return inside

  def take(self, stage: str, field: str, value: Any, where: str) -> None:
    """Sets a field of a stage, and notes it."""
    before = self.value(stage, field)
    if before != value:
      *path, last = field.split('.')
      inside = self.config[stage]
      for part in path:
        inside = inside[part]
      inside[last] = value
      self.teach(stage, field, value)
      where = f'{where}; the config said {before!r}'
    self.say(stage, field, value, where)

  def teach(self, stage: str, field: str, value: Any) -> None:
    """Sets what a stage's students have of it, theirs being copies: its network, and what that reads."""
    if field.split('.')[0] not in ('model', 'diffusion'):
      return
    for student in self.config.stages:
      if self.first_teacher(student) == stage != student:
        inside = self.config[student]
        *path, last = field.split('.')
        for part in path:
          inside = inside[part]
        inside[last] = value

  def first_teacher(self, stage: str) -> str:
    """Returns the stage that a chain of teachers begins with."""
    while 'teacher' in self.config[stage]:
      stage = self.config[stage].teacher.stage
    return stage

  def lay(self, stage: str, found: Mapping[str, Any], path: pathlib.Path) -> None:
    """Sets fields that say how large a network is; refuses others than the config's unless told otherwise.

    Raises:
      UserError: when they are others, and `config.adopt.sizes` is 'config'.
    """
    other = {field: value for field, value in found.items() if self.value(stage, field) != value}
    if other and self.settings.sizes == 'config':
      field, value = next(iter(other.items()))
      more = f' (and {len(other) - 1} more fields)' if len(other) > 1 else ''
      raise UserError(
        f'{path} holds a network with {field} = {value!r}, and config.{stage}.{field} is '
        f'{self.value(stage, field)!r}{more}: it is of another size or data set than this config. Name the '
        f'config that it is of, or take its sizes with --config.{SECTION}.sizes=file'
      )
    for field, value in found.items():
      self.take(stage, field, value, 'shapes in the file')

  def stage_of(self, part: Part, path: pathlib.Path) -> str:
    """Returns the stage whose network a part becomes; '' where the run has none.

    Raises:
      UserError: when there are several: name one of them.
    """
    kind = part.family.experiment
    found = [stage for stage in self.stages if self.config[stage].experiment == kind]
    found = [stage for stage in found if stage not in self.taken(part)]
    if len(found) > 1:
      raise UserError(
        f'{path} holds {part.family.title}, and {", ".join(found)} could have it: name one with --stages'
      )
    return found[0] if found else ''

  def taken(self, part: Part) -> set[str]:
    """Returns the stages that have this network already."""
    return {network.stage for network in self.networks if network.network == part.family.network}

  def check_groups(self, part: Part, narrowest: int, path: pathlib.Path) -> None:
    """Raises UserError for a network whose group norms would have other groups here."""
    if not self.settings.check_groups or has_published_groups(narrowest):
      return
    raise UserError(
      f'{path} holds {part.family.title} with a group norm of {narrowest} channels. The published code'
      f' always '
      f'has 32 groups; here they are 32 from {LEAST_NORM} channels on, in multiples of 32, so that its'
      f' images '
      f'would be others. If it was made with the groups of this package, set --config.{SECTION}.check_groups'
      '=False'
    )


def has_published_groups(width: int) -> bool:
  """Returns whether a group norm of so many channels has 32 groups here, as the published code has."""
  return width >= LEAST_NORM and width % 32 == 0


def attended(levels: tuple[bool, ...], side: int) -> tuple[int, ...]:
  """Returns the sides of the maps that get attention, by whether each level has it."""
  return tuple(side >> level for level, attends in enumerate(levels) if attends)


def parts_of(file: state_dicts.StateDict) -> list[Part]:
  """Returns the networks in a file.

  Raises:
    UserError: when there is none that has a place here.
  """
  found = families.parts(file.shapes)
  if not found:
    known = '; '.join(family.title for family in families.FAMILIES)
    names = ', '.join(list(file.shapes)[:3])
    raise UserError(
      f'{file.path} ({file.layout}, {len(file.shapes)} tensors: {names}, ...) holds no network that has a '
      f'place here. Known are: {known}'
    )
  return found
