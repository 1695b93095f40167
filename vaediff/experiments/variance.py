"""A learned variance of a diffusion's steps, the bound that trains it, and grids of steps: what fits what."""

from ml_collections import ConfigDict

from vaediff import checks
from vaediff.diffusion import grids, schedules
from vaediff.errors import UserError
from vaediff.experiments import bounds
from vaediff.experiments.denoiser import LEARNED, OBJECTIVES

VARIANCES = ('fixed', LEARNED)
TIME_SAMPLERS = ('uniform', 'loss_second_moment')
HISTORY = 'losses'
"""Of the times of `loss_second_moment`, in the state."""
LOSS_BOUNDS = {
  'loss.objective': checks.one_of(OBJECTIVES),
  'loss.vlb_weight': bounds.weight(),
  'loss.perceptual_weight': bounds.weight(),
  'loss.time_sampler': checks.one_of(TIME_SAMPLERS),
}
"""Of how a learned variance is trained, which students do not have."""


def check(section: ConfigDict, schedule: schedules.Schedule, *, taught: bool) -> None:
  """Raises UserError for a variance, a bound or a grid that does not fit the rest; `taught` by a teacher."""
  diffusion, sample = section.diffusion, section.sample
  learned = diffusion.variance == LEARNED
  if learned and taught:
    raise UserError(
      "diffusion.variance = 'learned' is not distilled: a student takes few steps, without noise between "
      "them; set it to 'fixed'. It then starts as its teacher's prediction alone"
    )
  if learned and not schedule.train_steps:
    raise UserError(
      "diffusion.variance = 'learned' needs a table of steps, and diffusion.schedule = "
      f"{diffusion.schedule!r} is continuous; use 'linear' or 'iddpm_cosine'"
    )
  if sample.variance == LEARNED and not learned:
    raise UserError(
      "sample.variance = 'learned' needs a network trained with diffusion.variance = 'learned', got "
      f"{diffusion.variance!r}; use 'small' or 'large'"
    )
  if not taught:
    _check_objective(section.loss, learned)
  if sample.grid in grids.PUBLISHED_GRIDS:
    if taught:
      raise UserError(
        f'sample.grid = {sample.grid!r} starts below t = 1, and a student knows the times of its own grid, '
        "which starts at 1; use 'uniform'"
      )
    grids.time_grid(schedule, sample.grid, sample.num_steps, sample.t_start)
  if sample.bound_steps == 1:
    raise UserError('sample.bound_steps must be 0 (the whole table) or >= 2, got 1')
  if sample.bound_steps > max(schedule.train_steps, 1):
    raise UserError(
      f'sample.bound_steps must be at most the {schedule.train_steps} steps of the table of '
      f'diffusion.schedule = {diffusion.schedule!r} (0: it has none), got {sample.bound_steps}'
    )
  if sample.bound_steps:
    grids.time_grid(schedule, sample.grid, sample.bound_steps, field='sample.bound_steps')


def _check_objective(loss: ConfigDict, learned: bool) -> None:
  """Raises UserError for the objective of a variance that is not learned, and times that do not fit it."""
  if loss.objective == 'bound' and not learned:
    raise UserError("loss.objective = 'bound' needs diffusion.variance = 'learned', got 'fixed'")
  if loss.time_sampler != 'uniform' and loss.objective != 'bound':
    raise UserError(
      f"loss.time_sampler = {loss.time_sampler!r} is for loss.objective = 'bound' alone, whose terms differ "
      f"by orders of magnitude; with {loss.objective!r} use 'uniform'"
    )
