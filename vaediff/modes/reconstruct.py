"""`--mode=reconstruct`: images of the evaluation split, encoded and drawn again."""

import pathlib

import jax

from vaediff.errors import UserError
from vaediff.evaluation.quality import mse
from vaediff.modes import pictures
from vaediff.run import images
from vaediff.run.config import Run
from vaediff.run.trained import Trained, open_last, say_figures


def mode(run: Run) -> None:
  """Reconstructs with the last stage and prints the errors."""
  out = pictures.out_of(run)
  say_figures(reconstruct(open_last(run), out))


def reconstruct(trained: Trained, out: pathlib.Path | None = None) -> dict[str, float]:
  """Encodes images of the evaluation split and draws them again from z.

  Writes `reconstructions.png`: data, VAE reconstruction and, for a refiner, refined image.

  Args:
    trained: the stage.
    out: folder to write to; None = the run's.

  Returns:
    Mean squared error per pixel, pixels in [0, 1], of each kind of reconstruction.
  """
  settings = trained.config.reconstruct
  if settings.posterior not in ('mean', 'sample'):
    raise UserError(f"config.reconstruct.posterior must be 'mean' or 'sample', got {settings.posterior!r}")
  if not trained.experiment.reconstructs:
    raise UserError(
      f'--mode=reconstruct needs a stage that encodes images; stage {trained.stage!r} was trained '
      "without a VAE (diffusion.condition = 'none'). Use --mode=sample, or another stage with --stages"
    )
  data, labels = trained.eval_images(settings.num_images)
  key = jax.random.key(trained.settings.seed) if settings.posterior == 'sample' else None
  result = trained.draw_all(trained.observe(data, labels, key))
  data = trained.as_drawn(data)
  shown = [value[:pictures.MAX_RECONSTRUCTIONS] for value in (data, *result.values())]
  pictures.write_grid(trained, 'reconstructions', images.side_by_side(*shown), len(shown) * 4, out)
  return {f'mse/{name}': mse(data, value) for name, value in result.items()}
