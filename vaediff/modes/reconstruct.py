"""`--mode=reconstruct`: images of the evaluation split, encoded and drawn again."""

from vaediff.errors import UserError
from vaediff.evaluation.quality import mse
from vaediff.modes import pictures
from vaediff.run import images
from vaediff.run.config import Run
from vaediff.run.trained import Trained, open_last, say_figures


def mode(run: Run) -> None:
  """Reconstructs with the last stage and prints the errors."""
  say_figures(reconstruct(open_last(run)))


def reconstruct(trained: Trained) -> dict[str, float]:
  """Encodes images of the evaluation split and draws them again from z.

  Writes `reconstructions.png`: data, VAE reconstruction and, for a refiner, refined image.

  Returns:
    Mean squared error per pixel, pixels in [0, 1], of each kind of reconstruction.
  """
  if not trained.experiment.reads_image:
    trained.need_latents('reconstruct')
  settings = trained.config.reconstruct
  if settings.posterior not in ('mean', 'sample'):
    raise UserError(f"config.reconstruct.posterior must be 'mean' or 'sample', got {settings.posterior!r}")
  data, _ = trained.eval_images(settings.num_images)
  if trained.experiment.reads_image:
    result = trained.draw_all({'image': data})
  elif settings.posterior == 'sample':
    result = trained.draw_all({'z': trained.encode_sampled(data, trained.settings.seed)})
  else:
    result = trained.draw_all({'z': trained.encode(data)[0]})
  shown = [value[:pictures.MAX_RECONSTRUCTIONS] for value in (data, *result.values())]
  pictures.write_grid(trained, 'reconstructions', images.side_by_side(*shown), len(shown) * 4)
  return {f'mse/{name}': mse(data, value) for name, value in result.items()}
