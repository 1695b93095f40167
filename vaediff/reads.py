"""What a stage reads of earlier ones, or of what was published: declarations; `run.frozen` loads them."""

import dataclasses
from collections.abc import Callable

from ml_collections import ConfigDict

from vaediff.models.functional import Model
from vaediff.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromStage:
  """A network of an earlier stage that an experiment reads: `frozen[name]` holds its parameters.

  Attributes:
    stage: name of the stage that trained it.
    network: its name in that stage.
    workdir: the run that holds it; '' = this run.
    model: its architecture, as this experiment builds it.
    latent_channels: above 0, `frozen[<name> + STATISTICS]` holds the statistics of its latents.
  """

  stage: str
  network: str
  workdir: str
  model: Model
  latent_channels: int = 0


STATISTICS = '_statistics'
"""What is appended to a frozen network's name for the statistics of its latents."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
  """Arrays that no stage has trained, such as published weights: `frozen[name]` holds what `load` returns.

  Attributes:
    load: returns them; raises UserError, saying how to get them, when they are not there.
  """

  load: Callable[[], Params]


def is_stage(config: ConfigDict, name: str, experiment: str) -> bool:
  """Returns whether `config.<name>` is the section of a stage with this experiment."""
  section = config[name] if name in config else None
  return isinstance(section, ConfigDict) and 'experiment' in section and section.experiment == experiment
