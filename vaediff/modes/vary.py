"""`--mode=vary`: images again and again, each time another one with the same vector of a CLIP stage.

Ramesh et al. 2022 (arXiv:2204.06125), section 3.1: an image is its vector z, what CLIP sees in it, and the
noise x_T that DDIM inversion finds for it, the rest. DDIM from x_T with eta = 0 is the image again; the noise
of eta > 0 takes the place of what z does not say.
"""

import pathlib

import jax
import numpy as np

from vaediff.data import oracle, pictures, shapes
from vaediff.evaluation import report
from vaediff.evaluation.quality import mse
from vaediff.modes import pictures as written
from vaediff.run import clips, images, log, scoring
from vaediff.run.config import Run
from vaediff.run.trained import Trained, open_last
from vaediff.storage import files

FIELD = 'config.vary.image'


def mode(run: Run) -> None:
  """Draws variations of images with the last stage."""
  out = written.out_of(run)
  vary(open_last(run), out)


def vary(trained: Trained, out: pathlib.Path | None = None) -> list[dict[str, float | str]]:
  """Writes `variations.png`: in each row an image, the image again by eta = 0, and its variations.

  Prints, and writes to `variations.json`, how far both are from the image: the root mean square change of
  pixels in [0, 1], and the cosine of the vectors. On the data set `shapes` also the share of them that show
  each attribute of the image.

  Args:
    trained: the stage.
    out: folder to write to; None = the run's.

  Returns:
    A row for the images again, and one for the variations.

  Raises:
    UserError: for a stage that reads no such vectors, or a file that is no image of these data.
  """
  settings = trained.config.vary
  clips.need_vectors(trained, 'vary')
  image, label = chosen(trained, settings.image, settings.num_images, FIELD)
  given = clips.given_of(trained, image, label)
  noise = clips.noise_of(trained, image, given, settings.num_steps)
  count, scorer = settings.num_variations, scoring.Scorer(clips.open_clip(trained))
  repeated = {name: np.repeat(value, count, axis=0) for name, value in given.items()}
  again = clips.drawn_from(trained, given, noise, settings.num_steps, 0.0)
  varied = clips.drawn_from(
    trained, repeated, np.repeat(noise, count, axis=0), settings.num_steps, settings.eta
  )
  each = [np.repeat(image, count, axis=0), varied]
  rows = [
    {'set': 'again, eta 0', **figures(trained, scorer, image, again)},
    {'set': f'variations, eta {settings.eta:g}', **figures(trained, scorer, *each)},
  ]
  log.say(f'{len(image)} images, {count} variations of each, {settings.num_steps} DDIM steps there and back')
  log.say(report.table(rows))
  by_number = varied.reshape(len(image), count, *varied.shape[1:]).swapaxes(0, 1)
  columns = [trained.as_drawn(image), again, *by_number]
  written.write_grid(trained, 'variations', images.side_by_side(*columns), len(columns), out)
  if jax.process_index() == 0:
    path = written.path_of(trained, 'variations', 'json', out)
    files.write_json(path, {'num_images': len(image), 'rows': rows, 'made_of': trained.made_of})
    log.say(f'wrote {path}')
  return rows


def chosen(trained: Trained, paths: str, count: int, field: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the pictures of files, or so many of the evaluation split, and labels: 0 for files."""
  if not paths:
    return trained.eval_images(count)
  found = pictures.read(paths, trained.config.data, field)
  return found, np.zeros(len(found), np.int32)


def figures(
  trained: Trained, scorer: scoring.Scorer, image: np.ndarray, other: np.ndarray
) -> dict[str, float]:
  """Returns how far drawn images are from those of the data, row by row; of `shapes` also what is the same.

  Vectors are those of images as large as the data; a stage of smaller ones has none to compare.
  """
  small = trained.as_drawn(image)
  found = {'rms change': float(np.sqrt(mse(small, other)))}
  if small.shape == image.shape:
    cosines = np.sum(scorer.images(image) * scorer.images(other), axis=1)
    found['cosine of vectors'] = float(np.mean(cosines))
  data = trained.config.data
  if not shapes.is_named(data):
    return found
  reader = oracle.Oracle(other.shape[1], mini=shapes.is_mini(data))
  same = reader.read(small).attributes == reader.read(other).attributes
  kept = {f'keeps {name}': float(x) for name, x in zip(shapes.ATTRIBUTES, same.mean(axis=0), strict=True)}
  return {**found, **kept}
