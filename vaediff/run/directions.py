"""The principal directions of the code that a trained stage's samples start from, to walk along.

They are those of the VAE, whether or not the stage's network reads them, measured once for all who ask
(`conditions.pca`). `conditions.pca.along` moves a code.
"""

from vaediff import reads
from vaediff.conditions import pca
from vaediff.errors import UserError
from vaediff.run import log, measurements
from vaediff.run.trained import Trained
from vaediff.spaces import whole_numbers

FLOOR = 0.01
"""Of the scale of a code, which walks do not read."""


def leading(trained: Trained, number: int) -> pca.Arrays:
  """Returns `mean`, `directions` [d, k] and `deviation` [k] of at most so many directions, by falling signal.

  {} where none is asked for, or the VAE has collapsed, which is said.

  Raises:
    UserError: for a stage that reads no VAE and is none, or training images that are not there.
  """
  if not number:
    return {}
  stage, workdir = vae_of(trained)
  latent_dim = trained.config[stage].model.latent_dim
  settings = {'num_directions': min(number, latent_dim), 'min_signal': 0.0, 'floor': FLOOR}
  source = pca.measured(stage, workdir, latent_dim, settings)
  own = trained.opened if stage == trained.stage and not workdir else None
  try:
    return measurements.load(source, trained.config, trained.workdir, trained.mesh, own)
  except pca.NoSignal as error:
    log.say(f'no principal directions: {error}')
    return {}


def number_of(found: pca.Arrays) -> int:
  """Returns how many directions were found."""
  return found['directions'].shape[1] if found else 0


def vae_of(trained: Trained) -> tuple[str, str]:
  """Returns stage and run of the VAE whose code a stage's samples start from; '' = this run."""

  def is_vae(stage: str) -> bool:
    return reads.is_stage(trained.config, stage, 'vae') or whole_numbers.is_of(trained.config, stage, 'vae')

  for source in trained.experiment.frozen.values():
    if isinstance(source, reads.FromStage) and is_vae(source.stage):
      return source.stage, source.workdir
  if is_vae(trained.stage):
    return trained.stage, ''
  raise UserError(
    f'stage {trained.stage!r} starts from no code of a VAE, and a code alone has principal directions; '
    'choose another stage with --stages'
  )
