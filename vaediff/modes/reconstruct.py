"""`--mode=reconstruct`: images of the evaluation split, encoded and drawn again.

Through what the conditions see in them, such as a VAE's z, or through the noise x_T that they are made of.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from vaediff.data import pixels
from vaediff.errors import UserError
from vaediff.evaluation import report
from vaediff.evaluation.quality import mse, psnr
from vaediff.experiments import restored as restoring
from vaediff.experiments.base import NOISE
from vaediff.modes import pictures
from vaediff.run import draw, images, log
from vaediff.run.config import Run
from vaediff.run.draw import HostArrays
from vaediff.run.trained import Trained, open_last, say_figures
from vaediff.storage import files


def mode(run: Run) -> None:
  """Reconstructs with the last stage and prints the errors."""
  out = pictures.out_of(run)
  trained = open_last(run)
  if run.config.reconstruct.through == 'noise':
    through_noise(trained, out)
  else:
    say_figures(reconstruct(trained, out))


def reconstruct(trained: Trained, out: pathlib.Path | None = None) -> dict[str, float]:
  """Encodes images of the evaluation split and draws them again from z.

  Writes `reconstructions.png`: data, VAE reconstruction and, for a refiner, refined image; or what else the
  stage makes of it, such as images of some of its levels. Prints what is beside what.

  Args:
    trained: the stage.
    out: folder to write to; None = the run's.

  Returns:
    Mean squared error per pixel, pixels in [0, 1], of each kind of reconstruction.
  """
  if not trained.experiment.reconstructs:
    raise UserError(
      f'--mode=reconstruct needs a stage that encodes images; stage {trained.stage!r} was trained '
      "without a VAE (diffusion.condition = 'none'). Set config.reconstruct.through = 'noise', use "
      '--mode=sample, or name another stage with --stages'
    )
  data, labels = trained.eval_images(trained.config.reconstruct.num_images)
  result = trained.draw_all(trained.observe(data, labels, key_of(trained)))
  data = trained.as_drawn(data)
  shown = [value[: pictures.MAX_RECONSTRUCTIONS] for value in (data, *result.values())]
  pictures.write_grid(trained, 'reconstructions', images.side_by_side(*shown), len(shown) * 4, out)
  titles = [trained.experiment.titles[name] for name in result if name in trained.experiment.titles]
  if titles:
    log.say(f'side by side: data, {", ".join(titles)}')
  return {f'mse/{name}': mse(data, value) for name, value in result.items()}


def key_of(trained: Trained) -> jax.Array | None:
  """Returns the key that conditions are observed with; None for the mean of what could be seen.

  Raises:
    UserError: for a posterior that is neither.
  """
  posterior = trained.config.reconstruct.posterior
  if posterior not in ('mean', 'sample'):
    raise UserError(f"config.reconstruct.posterior must be 'mean' or 'sample', got {posterior!r}")
  return jax.random.key(trained.settings.seed) if posterior == 'sample' else None


def through_noise(trained: Trained, out: pathlib.Path | None = None) -> dict[str, float]:
  """Finds the noise x_T of images of the evaluation split by DDIM inversion, and draws them again from it.

  With what the conditions see in the images, so that x_T holds the rest. Prints a row for each of
  `reconstruct.num_steps`: the error of the round trip, and mean and deviation of x_T, which are 0 and 1 where
  it is noise like that of samples. Writes `reconstructions-noise.png`, data and the images again by number
  of steps, and `reconstructions-noise.json`.

  Args:
    trained: the stage.
    out: folder to write to; None = the run's.

  Returns:
    The figures as '<figure>/<steps>'.

  Raises:
    UserError: for a stage that makes no samples of noise step by step.
  """
  settings, diffusion = trained.config.reconstruct, trained.experiment.diffusion
  if diffusion is None:
    raise UserError(
      "config.reconstruct.through = 'noise' needs a diffusion, whose samples are made of noise; stage "
      f"{trained.stage!r} is none. Choose another with --stages, or set reconstruct.through = ''"
    )
  data, labels = trained.eval_images(settings.num_images)
  x0 = np.asarray(pixels.to_unit_range(jnp.asarray(data)))
  given = {**trained.observe(data, labels, key_of(trained)), restoring.ORIGINAL: x0}
  rows, shown = [], [data]
  for num_steps in settings.num_steps:
    through = trained.with_experiment(restoring.through_noise(diffusion, num_steps))
    noise, again = noise_and_images(through, given)
    rows.append(
      {
        'steps': num_steps,
        'mse': mse(data, again),
        'psnr': psnr(data, again),
        'mean of x_T': float(noise.mean(dtype=np.float64)),
        'deviation of x_T': float(noise.std(dtype=np.float64)),
      }
    )
    shown.append(again)
  log.say(f'{len(data)} images of the evaluation split, x0 -> x_T -> x0 by DDIM, stage {trained.stage!r}')
  log.say(report.table(rows))
  picture = images.side_by_side(*(value[: pictures.MAX_RECONSTRUCTIONS] for value in shown))
  pictures.write_grid(trained, 'reconstructions-noise', picture, len(shown) * 2, out)
  if jax.process_index() == 0:
    path = pictures.path_of(trained, 'reconstructions-noise', 'json', out)
    files.write_json(path, {'num_images': len(data), 'rows': rows, 'made_of': trained.made_of})
  return {f'{name}/{row["steps"]}': row[name] for row in rows for name in row if name != 'steps'}


def noise_and_images(
  through: Trained, given: HostArrays
) -> tuple[Float[np.ndarray, 'n ...'], UInt8[np.ndarray, 'n h w c']]:
  """Returns x_T, float32 and unbounded, and the images drawn again from it, of one row of `given` each.

  In batches of the stage's sampling batch size.

  Args:
    through: the stage, drawn from by `experiments.restored.ThroughNoise`.
    given: the images, as `restored.ORIGINAL`, and what is seen in them.

  Raises:
    NotFinite: where x_T or an image is not finite.
  """
  count = len(given[restoring.ORIGINAL])
  size, noises, again = min(through.settings.batch_size, count), [], []
  for indices, num_real in draw.padded_batches(count, size):
    drawn = through.draw(indices, {name: value[indices] for name, value in given.items()}, handed=True)
    noises.append(drawn[NOISE][:num_real])
    again.append(drawn['x0'][:num_real])
  return np.concatenate(noises), np.concatenate(again)
