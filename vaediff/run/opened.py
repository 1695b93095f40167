"""Which checkpoint of a stage is opened: its latest, its best, or that of a step that is kept."""

import dataclasses
import functools
import pathlib

from vaediff import checks
from vaediff.errors import UserError
from vaediff.run import best, checkpoint


@dataclasses.dataclass(frozen=True)
class Opened:
  """A checkpoint of a stage.

  Attributes:
    stage: its name.
    folder: whose `checkpoints` hold it: `<workdir>/<stage>`, or the folder of its best.
    step: of the checkpoint; 0 = the latest of the folder.
  """

  stage: str
  folder: pathlib.Path
  step: int = 0

  @functools.cached_property
  def id(self) -> str:
    """The id of the checkpoint, as it was when it was first asked for; '' where there is none."""
    return checkpoint.identity_of(self.folder, self.step)


def choose(stage_folder: pathlib.Path, stage: str, choice: str) -> Opened:
  """Returns the checkpoint of a stage that `sample.checkpoint` names: 'latest', 'best', or a step.

  It stays that checkpoint where the stage is trained on meanwhile.

  Raises:
    UserError: when there is none, naming the steps that are kept; for any other word.
  """
  folder, step = folder_of(stage_folder, choice), checks.step_of(choice)
  if choice not in ('latest', 'best') and not step:
    raise UserError(f"sample.checkpoint must be 'latest', 'best' or a step that is kept, got {choice!r}")
  if choice == 'best' and checkpoint.latest_step(folder) is None:
    raise UserError(
      f'{folder} holds no checkpoint: none is kept unless train.best_measure is set while the stage trains'
    )
  found = Opened(stage, folder, int(checkpoint.folder_of(folder, step).name))
  found.id  # noqa: B018 (read now)
  return found


def folder_of(stage_folder: pathlib.Path, choice: str) -> pathlib.Path:
  """Returns the folder whose `checkpoints` hold what `sample.checkpoint` names."""
  return stage_folder / best.FOLDER if choice == 'best' else stage_folder


def id_of(stage_folder: pathlib.Path, choice: str) -> str:
  """Returns the id of what `sample.checkpoint` names; '' where that is not there."""
  return checkpoint.identity_of(folder_of(stage_folder, choice), checks.step_of(choice))
