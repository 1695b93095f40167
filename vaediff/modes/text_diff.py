"""`--mode=text_diff`: an image moved by the difference of two captions, in the space of a CLIP stage.

Ramesh et al. 2022 (arXiv:2204.06125), section 3.3. With z of the image, z_t of the caption that is wanted and
z_s of the one that the image has,

    z_d = (z_t - z_s) / |z_t - z_s|,    z(theta) = slerp(z, z_d, theta),   theta in [0, 1]

and x_T, which DDIM inversion finds for the image at z, stays. Half of the way, and often less, is enough.
"""

import pathlib

import jax
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from vaediff.data import oracle, shapes
from vaediff.diffusion.interpolation import on_sphere, unit
from vaediff.errors import UserError
from vaediff.evaluation import report
from vaediff.modes import pictures, vary
from vaediff.run import clips, images, log, scoring
from vaediff.run.config import Run
from vaediff.run.trained import Trained, open_last
from vaediff.storage import files

FIELD = 'config.text_diff'
MOST_SEARCHED = 1024
"""Evaluation images among which those are looked for that show what the first caption tells."""
LEAST = 1e-3
"""Of the length of z_t - z_s: vectors that are nearer say the same."""


def mode(run: Run) -> None:
  """Moves images with the last stage, as one caption differs from another."""
  out = pictures.out_of(run)
  text_diff(open_last(run), out)


def text_diff(trained: Trained, out: pathlib.Path | None = None) -> list[dict[str, float | str]]:
  """Writes `text_diff.png`: in each row an image, then its strip over theta, from 0, the image again, on.

  Prints, and writes to `text_diff.json`, a row for each theta: the change of pixels, the cosines of the drawn
  images' vectors with those of the image and of the wanted caption; on the data set `shapes` the share of
  them that show what the captions change, and that keep what they do not.

  Args:
    trained: the stage.
    out: folder to write to; None = the run's.

  Returns:
    A row for each theta.

  Raises:
    UserError: for a stage that reads no such vectors, a caption that cannot be read, captions that say the
      same, or a file that is no image of these data.
  """
  settings = trained.config.text_diff
  clips.need_vectors(trained, 'text_diff')
  if not settings.target.strip():
    raise UserError(f"{FIELD}.target is '': write the caption that the image is to be moved to")
  if shapes.is_named(trained.config.data):  # what images show is compared with what captions tell
    told_of(settings)
  clip = clips.open_clip(trained)
  wanted, direction = difference(clip, settings.source, settings.target)
  image, label = chosen(trained)
  given = clips.given_of(trained, image, label)
  noise = clips.noise_of(trained, image, given, settings.num_steps)
  thetas = np.linspace(0, settings.max_theta, settings.num_points)
  moved = np.stack([on_sphere(z, direction, thetas) for z in given[clips.EMBEDDING]])
  repeated = {name: np.repeat(value, len(thetas), axis=0) for name, value in given.items()}
  repeated[clips.EMBEDDING] = moved.reshape(-1, moved.shape[-1])
  drawn = clips.drawn_from(trained, repeated, np.repeat(noise, len(thetas), axis=0), settings.num_steps, 0.0)
  strips = drawn.reshape(len(image), len(thetas), *drawn.shape[1:]).swapaxes(0, 1)
  rows = [
    {'theta': float(theta), **figures(trained, clip, image, strip, wanted)}
    for theta, strip in zip(thetas, strips, strict=True)
  ]
  source = settings.source or 'the mean of captions of the evaluation split'
  log.say(f'{len(image)} images from {source!r} to {settings.target!r}')
  log.say(report.table(rows))
  picture = images.side_by_side(trained.as_drawn(image), *strips)
  pictures.write_grid(trained, 'text_diff', picture, len(thetas) + 1, out)
  if jax.process_index() == 0:
    path = pictures.path_of(trained, 'text_diff', 'json', out)
    files.write_json(path, {'num_images': len(image), 'rows': rows, 'made_of': trained.made_of})
    log.say(f'wrote {path}')
  return rows


def difference(
  clip: Trained, source: str, target: str
) -> tuple[Float[np.ndarray, ' d'], Float[np.ndarray, ' d']]:
  """Returns the vector of the wanted caption, and z_d to it from the other; '' = from none in particular.

  Raises:
    UserError: when both say the same.
  """
  wanted = clips.vectors_of(clip, [target])[0]
  before = clips.vectors_of(clip, [source])[0] if source.strip() else clips.neutral(clip)
  if np.linalg.norm(wanted - before) < LEAST:
    raise UserError(
      f'{FIELD}.source is {source!r} and target {target!r}: their vectors are the same, so that there is no '
      'direction from one to the other. Write captions that differ'
    )
  return wanted, unit(wanted - before).astype(np.float32)


def chosen(trained: Trained) -> tuple[np.ndarray, np.ndarray]:
  """Returns the images that are moved, and their labels.

  Those of files; else the first of the evaluation split, on the data set `shapes` the first that show what
  `source` tells.
  """
  settings, data = trained.config.text_diff, trained.config.data
  if settings.image or not (shapes.is_named(data) and settings.source.strip()):
    return vary.chosen(trained, settings.image, settings.num_images, f'{FIELD}.image')
  image, label = trained.eval_images(MOST_SEARCHED)
  asked, _ = told_of(settings)
  seen = oracle.Oracle(data.image_size, mini=shapes.is_mini(data)).read(image).attributes
  rows = np.flatnonzero(((asked < 0) | (seen == asked)).all(axis=1))[: settings.num_images]
  if not len(rows):
    raise UserError(
      f'{FIELD}.source is {settings.source!r}, and none of the first {len(image)} evaluation images shows '
      'that. Write another caption, or name a picture in text_diff.image'
    )
  return image[rows], label[rows]


def told_of(settings: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
  """Returns the attributes that both captions tell, of the data set `shapes`; -1 where they do not.

  Raises:
    UserError: for one that is none of its captions.
  """
  target = shapes.told(settings.target)
  return shapes.told(settings.source) if settings.source.strip() else np.full_like(target, -1), target


def figures(
  trained: Trained, clip: Trained, image: np.ndarray, other: np.ndarray, wanted: Float[np.ndarray, ' d']
) -> dict[str, float]:
  """Returns the figures of the images that were drawn at one theta."""
  scorer, settings, data = scoring.Scorer(clip), trained.config.text_diff, trained.config.data
  found = vary.figures(trained, scorer, image, other)
  if other.shape == image.shape:
    found['cosine to the caption'] = float(np.mean(scorer.images(other) @ wanted))
  if not shapes.is_named(data):
    return found
  source, target = told_of(settings)
  changed = (target >= 0) & (target != source)
  reader = oracle.Oracle(other.shape[1], mini=shapes.is_mini(data))
  before, after = (reader.read(x).attributes for x in (trained.as_drawn(image), other))
  kept = (after == before)[:, ~changed].all(axis=1)
  return {
    **{name: value for name, value in found.items() if not name.startswith('keeps ')},
    'shows the caption': float((after == target)[:, changed].all(axis=1).mean()),
    'keeps the rest': float(kept.mean()),
    'keeps shape': found['keeps shape'],
  }
