"""Which checkpoint of a stage is opened: its latest, its best, or that of a step that is kept."""

import dataclasses
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

  @property
  def id(self) -> str:
    """The id of the checkpoint; '' where there is none."""
    return checkpoint.identity_of(self.folder, self.step)


def choose(stage_folder: pathlib.Path, stage: str, choice: str) -> Opened:
  """Returns the checkpoint of a stage that `sample.checkpoint` names: 'latest', 'best', or a step.

  Raises:
    UserError: when there is none, naming the steps that are kept; for any other word.
  """
  step = checks.step_of(choice)
  if choice not in ('latest', 'best') and not step:
    raise UserError(f"sample.checkpoint must be 'latest', 'best' or a step that is kept, got {choice!r}")
  folder = stage_folder / best.FOLDER if choice == 'best' else stage_folder
  if choice == 'best' and checkpoint.latest_step(folder) is None:
    raise UserError(
      f'{folder} holds no checkpoint: none is kept unless train.best_measure is set while the stage trains'
    )
  checkpoint.folder_of(folder, step)
  return Opened(stage, folder, step)
